"""What a training run shows: one bar on a terminal, elsewhere one line for each log entry."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def show_status(trainer: Any) -> Status:
    """Put a ``Status`` in the place of Trainer's own bar and printed dictionaries."""
    for other in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other)
    status = Status()
    trainer.add_callback(status)
    return status


class Status(ProgressCallback):
    """The progress bar with loss, tokens a second and memory beside it.

    Where there is no terminal, a line for each log entry. ``speed`` is the tokens a second of this
    process, without the steps before a resumed checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started, self.first_tokens, self.speed = time.monotonic(), 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:  # without the steps a second: 80 columns hold all
                self.training_bar.bar_format = _BAR
        self.started, self.first_tokens = time.monotonic(), state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def close(self) -> None:
        """Leave the bar of an interrupted run above what is printed next."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        elapsed = time.monotonic() - self.started
        self.speed = (state.num_input_tokens_seen - self.first_tokens) / max(elapsed, 1e-9)
        status = {"tokens/s": f"{self.speed:.0f}", "memory": f"{_memory() / 2**30:.2f} GiB"}
        losses = {k: f"{float(logs[k]):.4f}" for k in ("loss", "eval_loss") if k in logs}
        status = {**losses, **status}
        if self.training_bar is not None:
            self.training_bar.set_postfix(status)
        elif losses:
            shown = ", ".join(f"{name} {value}" for name, value in status.items())
            print(f"step {state.global_step}/{state.max_steps}: {shown}", flush=True)


def _memory() -> float:
    """Bytes in use: the GPU's, or this process's peak."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
