"""The self-test of ``nf4 doctor`` runs every op, and sees one that is wrong."""

from __future__ import annotations

import pytest
import torch

from nf4.cli import doctor
from nf4.ops import SCHEMAS


def test_every_op_is_run() -> None:
    results = doctor.results_of("reference")
    assert set(results) == set(SCHEMAS)
    assert all(results.values())


@pytest.mark.parametrize("op", SCHEMAS)
def test_a_wrong_op_is_named(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.results_of("reference")

    def results(backend: str) -> dict[str, list[torch.Tensor]]:
        wrong = [t.float() + 0.1 * t.float().abs().max() for t in right[op]]
        return {**right, op: wrong} if backend == "cpu" else right

    monkeypatch.setattr(doctor, "results_of", results)
    assert doctor.self_test("cpu").startswith(f"{op} is off by")
    assert doctor.self_test("reference") == "ok"
