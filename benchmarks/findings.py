"""A threshold and what was measured against it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.results import Measurement

Cases = dict[tuple[str, str, int, str], dict[str, Measurement]]


@dataclass(frozen=True)
class Finding:
    """One threshold: ``value`` (None: not measured) against ``least``; ``reach`` is the aim."""

    what: str
    value: float | None
    least: float
    reach: float
    unit: str = "x"
    at_most: bool = False
    noisy: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        good = self.value <= self.least if self.at_most else self.value >= self.least
        best = self.value <= self.reach if self.at_most else self.value >= self.reach
        return "reached" if good and best else "pass" if good else "FAIL"

    def line(self) -> str:
        sign = "<=" if self.at_most else ">="
        value = "" if self.value is None else f"{self.value:.2f}{self.unit}"
        noisy = " (noisy)" if self.noisy else ""
        least, reach = f"{sign} {self.least:g}{self.unit}", f"{sign} {self.reach:g}{self.unit}"
        return f"| {self.what} | {value}{noisy} | {least} | {reach} | {self.verdict} |"


def ratio(
    cases: Cases,
    what: str,
    case: tuple[str, str, int, str],
    peer: str,
    least: float,
    reach: float,
    name: str = "nf4",
) -> Finding:
    """How many times longer ``peer`` takes than the nf4 contender ``name``."""
    contenders = cases.get(case, {})
    ours, other = contenders.get(name), contenders.get(peer)
    if ours is None or other is None:
        return Finding(what, None, least, reach)
    return Finding(what, other.ms_p50 / ours.ms_p50, least, reach, noisy=ours.noisy or other.noisy)
