"""The argument parser of the commands: what is wrong in one line, with the way to the options."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineErrors(argparse.ArgumentParser):
    """Without the usage text, which hides the one line that matters."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the options\n")


class Parser(OneLineErrors):
    """The parser of one command; ``description`` is its module's docstring."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog,
            description=(description or "").replace("``", ""),
            formatter_class=_Defaults,
            allow_abbrev=False,
        )


class _Defaults(argparse.RawDescriptionHelpFormatter):
    """Shows the default of an option that has one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.help or ""
        plain = action.default in (None, False, argparse.SUPPRESS) or not action.option_strings
        if plain or "default" in shown:
            return shown
        value = action.default
        text = " ".join(map(str, value)) if isinstance(value, list) else "%(default)s"
        return f"{shown} (default: {text})" if shown else f"default: {text}"
