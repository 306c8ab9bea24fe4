"""The ``nf4`` command line: one module per command, imported only when it is the one that runs."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from nf4.version import __version__

# name -> one line of help. The module nf4.cli.<name> has main(arguments) -> exit status.
COMMANDS = {
    "demo": "train, quantize, fine-tune, merge and compare a small model in a few minutes",
    "quantize": "quantize a checkpoint to 4 bits, tensor by tensor",
    "finetune": "QLoRA: train an adapter over a quantized model",
    "generate": "complete prompts with a model and an adapter",
    "merge": "fold an adapter into a model's weights",
    "eval": "perplexity of the 16-bit model, the quantized one and the adapter",
    "estimate": "the memory that training a model will take, from its config alone",
    "tune": "measure the Triton kernels' configurations on this GPU, for one model's layers",
    "bench": "measure the kernels against their peers and this machine's limits",
    "doctor": "say what this machine can run, what is missing and what that costs",
}


def usage() -> str:
    """The text of ``nf4 --help``."""
    lines = ["usage: nf4 [--debug] <command> [options]", "", "NF4 quantization for QLoRA.", ""]
    lines += [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    lines += ["", "nf4 <command> --help lists a command's options; --debug shows tracebacks."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. Errors are one line, a traceback with ``--debug``."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"nf4 {__version__}")
        return 0
    name, *arguments = words
    if name not in COMMANDS:
        print(f"nf4: no command {name!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Where it is installed, PEFT imports it, and it warns of kernels that nothing here would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return int(importlib.import_module(f"nf4.cli.{name}").main(arguments) or 0)
    except KeyboardInterrupt:
        print(f"nf4 {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away
        return 141
    except ImportError as error:
        if debug:
            raise
        print(f"nf4 {name}: {error}; try: pip install 'nf4[cli]'", file=sys.stderr)
        return 1
    except Exception as error:  # the one place where an error becomes a line
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"{error.filename}: {error.strerror.lower()}"
        print(f"nf4 {name}: {text} (--debug shows where)", file=sys.stderr)
        return 1
