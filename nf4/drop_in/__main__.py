"""``python -m nf4.drop_in train.py [arguments]``: run a script with nf4 in bitsandbytes' place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script named first, with the rest as its arguments."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m nf4.drop_in SCRIPT [ARGUMENTS]", file=sys.stderr)
        raise SystemExit(2)
    script = sys.argv[1]
    if not Path(script).is_file():
        raise SystemExit(f"nf4.drop_in: SCRIPT must be a file, got {script!r}")
    # As `python SCRIPT` has them.
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
