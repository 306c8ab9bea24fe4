#!/usr/bin/env python
"""Benchmark nf4 against its peers and this machine's own limits.

  python benchmarks/run.py --quick                    one small case of each op, under a minute
  python benchmarks/run.py --csv out.csv              the whole sweep
  python benchmarks/run.py --op linear --shape 4096x4096 --m 1,2,4 --csv out.csv
  python benchmarks/run.py --memory                   peak memory of the ops, on the CPU
  python benchmarks/run.py --check out.csv            the project's thresholds against a file
  python benchmarks/run.py --plot out.csv --readme README.md

Rows of a case replace older ones of the same machine in the file, so a sweep can be run in pieces,
and --missing repeats what another process disturbed. Exit status 1: an nf4 op was wrong (it is then
not timed), or a threshold of --check was missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where `ops` and `timing` would be top-level modules.
sys.path[0] = str(ROOT)

ISA_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
# What holds torch, oneDNN and MKL at the level that NF4_CPU_ISA holds nf4 at.
_ISA_ENVIRONMENT = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {},
}


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = (int(v) for v in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape must read NxK, got {text!r}") from None
    return n, k


def _numbers(text: str) -> list[int]:
    return [int(v) for v in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to run (default: the whole sweep)")
    what.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    what.add_argument("--op", action="append", help="only this op; may be repeated")
    what.add_argument("--shape", action="append", type=_shape, metavar="NxK", help="repeatable")
    what.add_argument("--m", type=_numbers, metavar="1,2,..", help="token counts")
    what.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"))
    what.add_argument("--contender", action="append", help="time only this one; repeatable")
    what.add_argument("--no-peers", action="store_true", help="nf4, torch and the limits only")
    what.add_argument("--memory", action="store_true", help="peak memory instead of times")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument("--backend", action="append", help="nf4 backends to compare; repeatable")
    how.add_argument("--isa", choices=ISA_LEVELS, help="hold nf4 and torch at this CPU level")
    how.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    how.add_argument("--rounds", type=int)
    how.add_argument("--csv", type=Path, metavar="FILE", help="append the rows here")
    how.add_argument("--seconds", type=float, default=float("inf"), help="start no case after")
    how.add_argument("--missing", action="store_true", help="only what --csv lacks or has noisy")
    show = parser.add_argument_group("instead of running, show files of rows")
    show.add_argument("--check", type=Path, nargs="+", metavar="CSV", help="thresholds, pass/fail")
    show.add_argument("--table", type=Path, nargs="+", metavar="CSV", help="as Markdown")
    show.add_argument("--plot", type=Path, nargs="+", metavar="CSV", help="a PNG beside the first")
    show.add_argument("--readme", type=Path, help="with --table: write between its bench markers")
    return parser


def _hold_isa(level: str) -> None:
    """Start this command again with the level in the environment, where libraries look first."""
    wanted = {"NF4_CPU_ISA": level, **_ISA_ENVIRONMENT[level]}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def _show(args: argparse.Namespace) -> int:
    from benchmarks import report, results, thresholds

    status = 0
    if args.check:
        text, passed = thresholds.report(results.read(args.check))
        print(text)
        status = 0 if passed else 1
    if args.table:
        table = report.markdown(results.read(args.table))
        if args.readme:
            report.write_between_markers(args.readme, table)
        else:
            print(table)
    if args.plot:
        print(report.plot(results.read(args.plot), args.plot[0].with_suffix(".png")))
    return status


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.check or args.table or args.plot:
        return _show(args)
    if args.isa:
        _hold_isa(args.isa)
    if args.memory:
        from benchmarks import memory

        memory.run(args.csv)
        return 0
    from benchmarks import sweep

    start = time.perf_counter()
    red = sweep.run(args)
    print(f"done in {time.perf_counter() - start:.0f} s")
    if red:
        print(f"WRONG, and not timed: {'; '.join(red)}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
