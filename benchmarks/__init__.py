"""Benchmarks: `python benchmarks/run.py --help` is the one command line."""
