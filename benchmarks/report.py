"""Rows to Markdown and plots. Deterministic: the same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import plot_gpu
from benchmarks.results import Environment, Measurement, Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
# A peer that computes in a lower precision is not in the same race: bitsandbytes' eval path rounds
# float32 activations to bf16, an error 10,000 times larger.
_SAME_PRECISION = 10.0
_OURS = ("nf4", "nf4_cuda", "nf4_triton")
_BITSANDBYTES = (
    "bitsandbytes",
    "bitsandbytes_eval",
    "bitsandbytes_new_output",
    "peft_bitsandbytes",
)
_TABLE_SHAPES = ("4096x4096", "14336x4096", "8192x8192", "64x64", "100000000x1")
_NAMES = {
    "quantize": "quantize",
    "quantize_flat": "quantize, kernel alone",
    "dequantize": "dequantize, `out=`",
    "linear": "linear",
    "linear_lora": "linear_lora forward + backward",
    "linear_lora_forward": "linear_lora forward",
    "overhead": "linear, call overhead",
    "adamw8bit": "AdamW8bit step",
}


def _case(m: Measurement) -> tuple[str, str, int, str]:
    return (m.op, m.shape, m.m, m.dtype)


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, int, str], dict[str, Measurement]]:
    """Measurements by case, then by contender, in the order of the rows."""
    cases: dict[tuple[str, str, int, str], dict[str, Measurement]] = {}
    for row in rows:
        cases.setdefault(_case(row.measurement), {})[row.measurement.contender] = row.measurement
    return cases


def best_peer(
    ours: Measurement, contenders: dict[str, Measurement], names: Sequence[str]
) -> Measurement | None:
    """The fastest of the named peers that does the whole op as precisely as ours."""
    fit = []
    for name in names:
        peer = contenders.get(name)
        if peer is None or (peer.error is None and ours.error is not None):
            continue
        bound = _SAME_PRECISION * ours.error if ours.error else None
        if bound is None or peer.error is None or peer.error <= bound:
            fit.append(peer)
    return min(fit, key=lambda peer: peer.ms_p50, default=None)


def _times(ours: Measurement, peer: Measurement | None) -> str:
    return "" if peer is None else f"{peer.ms_p50 / ours.ms_p50:.2f}x"


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value >= 0.1 else f"{value:.4f}"


def _heading(env: Environment, rows: Sequence[Row]) -> str:
    commits = sorted({row.environment.commit + "+" * row.environment.dirty for row in rows})
    versions = [f"torch {env.torch}"]
    for name in ("bitsandbytes", "peft", "triton", "torchao"):
        version = getattr(env, name)
        if version and (name != "triton" or env.driver):
            versions.append(f"{name} {version}")
    threads = "" if env.driver else f", {env.threads} threads, {env.isa}"
    date = max(row.environment.date for row in rows)[:10]
    return (
        f"**{env.hardware}**{threads}; {', '.join(versions)}; commit {', '.join(commits)}; {date}"
    )


def markdown(rows: Sequence[Row]) -> str:
    """One table per machine and instruction-set level; the last line says how to read it.

    On a GPU a cell holds the figures of the CUDA and the Triton kernel, in that order.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        env = row.environment
        groups.setdefault((env.hardware, env.isa, env.threads), []).append(row)
    parts = []
    for group in groups.values():
        ours = "nf4 CUDA / Triton, ms" if group[0].environment.driver else "nf4, ms"
        lines = [
            _heading(group[0].environment, group),
            "",
            f"| op | weight | M | dtype | {ours} | of the limit | x bitsandbytes | x torch |",
            "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for (op, shape, tokens, dtype), contenders in sorted(
            by_case(group).items(), key=lambda item: _order(*item[0])
        ):
            if shape not in _TABLE_SHAPES:
                continue
            if any(name in contenders for name in _OURS):
                lines.append(_line(op, shape, tokens, dtype, contenders))
        parts.append("\n".join(lines))
    note = (
        "Medians of interleaved rounds. *Limit*: the longer of the bytes at this machine's own "
        "stream rate and the operations at its own arithmetic rate, measured in the same run. "
        "*x bitsandbytes*: its fastest path that computes as precisely (PEFT on bitsandbytes for "
        "linear_lora); *x torch*: the 16-bit or float32 weight, unquantized, with the same "
        "adapters. Every row, with p20 and p80, is in `benchmarks/results/`."
    )
    return "\n\n".join([*parts, note])


def _order(op: str, shape: str, tokens: int, dtype: str) -> tuple[int, int, str, int]:
    return (
        list(_NAMES).index(op),
        _TABLE_SHAPES.index(shape) if shape in _TABLE_SHAPES else 9,
        (dtype),
        tokens,
    )


def _line(op: str, shape: str, tokens: int, dtype: str, contenders: dict[str, Measurement]) -> str:
    bnb_names = _BITSANDBYTES if op != "linear_lora" else ("peft_bitsandbytes",)
    columns = []
    for ours in (contenders[name] for name in _OURS if name in contenders):
        torch_names = ("torch_dense_lora",) if ours.rank else ("torch_dense", "torch_fused")
        columns.append(
            (
                _milliseconds(ours.ms_p50) + ("*" if ours.noisy else ""),
                f"{ours.share:.0%}" if ours.limit else "",
                _times(ours, best_peer(ours, contenders, bnb_names)),
                _times(ours, best_peer(ours, contenders, torch_names)),
            )
        )
    figures = [
        " / ".join(one or "-" for one in of_each) if any(of_each) else ""
        for of_each in zip(*columns, strict=True)
    ]
    return f"| {' | '.join([_NAMES[op], shape, str(tokens or ''), dtype, *figures])} |"


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the bench markers of a file; ValueError if there are none."""
    old = path.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise ValueError(f"benchmarks: {path.name} must hold {BEGIN} and {END} once each")
    head, rest = old.split(BEGIN)
    tail = rest.split(END)[1]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    partial.replace(path)


def between_markers(path: Path) -> str | None:
    """What stands between the bench markers of a file; None where it has none."""
    text = path.read_text()
    if BEGIN not in text:
        return None
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Bars against the machine's limit, one panel per weight shape; needs matplotlib.

    Of a GPU's rows: see ``plot_gpu``.
    """
    if rows[0].environment.driver:
        return plot_gpu.plot(rows, by_case(rows), path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {
        case: contenders
        for case, contenders in by_case(rows).items()
        if any(c.limit for c in contenders.values())
    }
    shapes = list(dict.fromkeys(shape for _, shape, _, _ in cases))
    names = [
        name
        for name in dict.fromkeys(n for contenders in cases.values() for n in contenders)
        if not name.startswith("limit:")
    ]
    colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(
        len(shapes), 1, figsize=(11, 3.0 * len(shapes)), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        here = sorted((c for c in cases if c[1] == shape), key=lambda c: _order(*c))
        for position, case in enumerate(here):
            present = [n for n in names if n in cases[case]]
            width = 0.8 / max(len(present), 1)
            for i, name in enumerate(present):
                share = cases[case][name].share
                axis.bar(position - 0.4 + (i + 0.5) * width, share, width, color=colors[name])
        axis.axhline(1.0, color="black", linewidth=0.8)
        labels = [
            f"{op}\n{f'M={m} ' if m else ''}{dtype.replace('bfloat', 'bf').replace('float', 'fp')}"
            for op, _, m, dtype in here
        ]
        axis.set_xticks(range(len(here)), labels, fontsize=6)
        axis.set_ylabel("share of the limit")
        axis.set_title(f"weight {shape}", fontsize=9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    env = rows[0].environment
    figure.suptitle(f"{env.hardware}, {env.isa}, {env.threads} threads", fontsize=9)
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return path
