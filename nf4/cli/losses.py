"""The losses of a training run, from Trainer's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def loss_summary(log: list[dict[str, Any]]) -> str:
    """First and last training loss of a Trainer log."""
    losses = [row["loss"] for row in log if "loss" in row]
    if losses:
        return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    means = [row["train_loss"] for row in log if "train_loss" in row]  # no step was logged
    return f"mean loss {means[-1]:.3f}" if means else "nothing logged"


def plot_losses(log: list[dict[str, Any]], path: Path) -> None:
    """The loss curve of a Trainer log as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[key]) for row in log if key in row]
        if points:
            ax.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "", label=label)
            ax.legend()
    ax.set(xlabel="step", ylabel="loss (nats/token)")
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
