"""The ``nf4`` command line: one module per command, imported only when it is the one that runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nf4.version import __version__

# name -> one line of help; the module nf4.cli.<name> has add_arguments(parser) and run(args).
COMMANDS = {
    "demo": "train, quantize, fine-tune, merge and compare a small model in a few minutes",
    "doctor": "say what this machine can run, what is missing and what that costs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="nf4", description="NF4 quantization for QLoRA.")
    parser.add_argument("--version", action="version", version=f"nf4 {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            module = importlib.import_module(f"nf4.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("nf4: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"nf4 {args.command}: {error}", file=sys.stderr)
        return 1
