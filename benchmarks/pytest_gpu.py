"""A pytest plugin for runs on a GPU: ``python -m pytest -p benchmarks.pytest_gpu``.

An illegal access leaves a CUDA context unusable, and every later test of the process would fail
with it. A worker of xdist whose context is broken is ended, and xdist starts another. Failures are
appended to the file that NF4_FAILURES names as they come, for a run that does not end in time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

_FAILURES = os.environ.get("NF4_FAILURES")
_WORKER = "PYTEST_XDIST_WORKER" in os.environ
# Seconds until the report of the failed test has surely left for the controller.
_SENT = 0.7
_failed = False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    if not report.failed:
        return
    _failed = True
    if _FAILURES and not _WORKER:
        with Path(_FAILURES).open("a") as file:
            file.write(f"{report.nodeid} [{report.when}]\n{report.longreprtext[-3000:]}\n\n")


def pytest_runtest_logfinish() -> None:
    global _failed
    if not _failed:
        return
    _failed = False
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if not _WORKER:
            pytest.exit(f"the CUDA context is broken: {error}", returncode=3)
        time.sleep(_SENT)
        os._exit(3)
