"""The plot of a GPU's rows: for each weight the shares of memory, linear by M, and LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.findings import Cases
from benchmarks.results import Row

COLORS = {
    "nf4_cuda": "#1f77b4",
    "nf4_triton": "#17becf",
    "nf4": "#1f77b4",
    "torch_dense": "#555555",
    "torch_dense_lora": "#aaaaaa",
    "torch_fused": "#aaaaaa",
    "bitsandbytes": "#d62728",
    "bitsandbytes_new_output": "#ff9896",
    "peft_bitsandbytes": "#8c1a1b",
    "torchao": "#bcbd22",
}
STREAMING = {
    "dequantize": "dequantize",
    "quantize_flat": "quantize\n(kernel)",
    "quantize": "quantize\n(nested)",
    "adamw8bit": "AdamW8bit\n(1e8)",
}
TRAINING = {"linear_lora_forward": "forward", "linear_lora": "forward +\nbackward"}


def plot(rows: Sequence[Row], cases: Cases, path: Path) -> Path:
    """Write a PNG: bars of shares, lines of microseconds against the limit, bars of milliseconds.

    Needs matplotlib. A contender that no color is given here is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(shape for op, shape, _, _ in cases if op != "adamw8bit"))
    figure, axes = pyplot.subplots(
        len(shapes), 3, figsize=(15, 3.3 * len(shapes)), squeeze=False, layout="constrained"
    )
    used: set[str] = set()
    for row, shape in zip(axes, shapes, strict=True):
        here = {c: v for c, v in cases.items() if c[1] == shape}
        if shape == shapes[0]:
            here |= {c: v for c, v in cases.items() if c[0] == "adamw8bit"}
        used |= _streaming(row[0], here)
        used |= _linear(row[1], here)
        used |= _training(row[2], here)
        row[0].set_title(f"{shape}: share of the copy bandwidth", fontsize=9)
        row[1].set_title(f"{shape}: linear, microseconds", fontsize=9)
        row[2].set_title(f"{shape}: LoRA, milliseconds", fontsize=9)
    env = rows[0].environment
    figure.suptitle(f"{env.hardware}; torch {env.torch}, triton {env.triton}", fontsize=10)
    names = [name for name in COLORS if name in used]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _bars(axis: Any, groups: dict[str, dict[str, float]], label: str) -> set[str]:
    """One group of bars for each entry, with the value above each bar."""
    used = set()
    for position, values in enumerate(groups.values()):
        present = [n for n in COLORS if n in values]
        used |= set(present)
        width = 0.84 / max(len(present), 1)
        for i, name in enumerate(present):
            x = position - 0.42 + (i + 0.5) * width
            axis.bar(x, values[name], 0.94 * width, color=COLORS[name])
            text = f"{values[name]:{label}}"
            axis.text(x, values[name], text, ha="center", va="bottom", fontsize=6)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=7)
    axis.margins(y=0.12)
    return used


def _streaming(axis: Any, cases: Cases) -> set[str]:
    groups = {}
    for op, label in STREAMING.items():
        for case, contenders in cases.items():
            if case[0] == op:
                groups[label] = {name: m.share for name, m in contenders.items()}
    used = _bars(axis, groups, ".0%")
    axis.axhline(1.0, color="black", linewidth=0.8)
    return used


def _linear(axis: Any, cases: Cases) -> set[str]:
    lines: dict[str, list[tuple[int, float]]] = {}
    limit: dict[int, float] = {}
    for (op, _, m, _), contenders in cases.items():
        if op == "linear":
            for name, measured in contenders.items():
                lines.setdefault(name, []).append((m, 1e3 * measured.ms_p50))
                limit[m] = 1e3 * measured.limit_ms
    for name, color in COLORS.items():
        if name in lines:
            ours = name.startswith("nf4")
            axis.plot(
                *zip(*sorted(lines[name]), strict=True),
                color=color, marker="o", markersize=3, linewidth=1.8 if ours else 1.0,
            )  # fmt: skip
    if limit:
        axis.plot(*zip(*sorted(limit.items()), strict=True), "k--", linewidth=1, label="limit")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted(limit), [str(m) for m in sorted(limit)], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel("M", fontsize=7)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return {name for name in lines if name in COLORS}


def _training(axis: Any, cases: Cases) -> set[str]:
    groups = {}
    for op, label in TRAINING.items():
        for (name, _, m, _), contenders in sorted(cases.items()):
            if name == op:
                groups[f"{label}\nM={m}"] = {n: c.ms_p50 for n, c in contenders.items()}
    return _bars(axis, groups, ".3g")
