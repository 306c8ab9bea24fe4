"""``python tests/without_bitsandbytes.py [-m MODULE | SCRIPT] ...``: ``python`` with the same
arguments on a machine that has no bitsandbytes, which this file plays by blocking its import.

At exit it prints how many fused LoRA calls were made, and that nothing got around the block.
"""

import atexit
import runpy
import sys
from importlib.abc import MetaPathFinder


class Block(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")


sys.meta_path.insert(0, Block())

from nf4 import functional  # noqa: E402

fused = 0
original = functional.linear_lora


def counted(*args, **kwargs):
    global fused
    fused += 1
    return original(*args, **kwargs)


def report():
    module = sys.modules["bitsandbytes"]
    assert module._nf4 and not hasattr(module, "cextension")
    print("fused calls", fused)


functional.linear_lora = counted
atexit.register(report)
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
