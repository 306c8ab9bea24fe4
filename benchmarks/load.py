"""From a checkpoint on disk to the first loss: time and memory, beside bitsandbytes and 16 bits.

Every run is a new process, as for a user. Memory is the process's anonymous resident memory, so
mapped files do not count, polled from outside: ``imported_mib`` before loading, ``peak_mib`` at
most while loading, ``kept_mib`` at its end. ``library_seconds`` is the import of the contender
alone, after torch. Imports end with the model's own code, which transformers otherwise imports
while it loads: most of that time is torch's compiler, which ``import bitsandbytes`` brings along,
so that the load of whoever does not import it would seem slow. Linux only. The checkpoint has
random weights, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

# What imports nf4 is imported by the parent only: the imports of a child are what is measured.
ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
# 418M weights: 12 layers whose largest matrix is 12 MiB in bfloat16, and two 94 MiB tables.
SIZES = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
TOKENS = 128
# Contender, and which checkpoint it loads.
RUNS = (
    ("transformers", "16bit"),
    ("nf4", "16bit"),
    ("bitsandbytes", "16bit"),
    ("nf4", "4bit"),
    ("bitsandbytes", "4bit"),
)


def _config(contender: str) -> Any:
    if contender == "transformers":
        return None
    if contender == "nf4":
        import nf4

        return nf4.NF4Config()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def child(contender: str, checkpoint: str, started: float) -> None:
    """Load, compute one loss, and print the times (monotonic clock) as JSON."""
    before = time.monotonic()
    importlib.import_module(contender)
    library = time.monotonic() - before
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = _config(contender)
    imported = time.monotonic()
    given = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, **given)
    loaded = time.monotonic()
    time.sleep(0.05)  # so that the memory at the end is polled
    ids = torch.arange(TOKENS)[None]
    loss = model.train()(ids, labels=ids).loss
    done = time.monotonic()
    modules = {type(m).__module__.partition(".")[0] for m in model.modules()}
    assert contender in modules, modules
    times = {"started": started, "imported": imported, "loaded": loaded, "done": done}
    print(json.dumps(times | {"library": library, "loss": loss.item()}))


def _anonymous(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", text, flags=re.MULTILINE)
    return 0 if found is None else int(found.group(1)) * 1024


def _poll(process: subprocess.Popen[str], seen: list[tuple[float, int]]) -> None:
    while process.poll() is None:
        try:
            seen.append((time.monotonic(), _anonymous(process.pid)))
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.001)


def measure(contender: str, checkpoint: Path) -> dict[str, float]:
    """One run of ``child`` in a new process."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.load", "--child", contender, str(checkpoint)]
    process = subprocess.Popen(
        [*command, str(started)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    seen: list[tuple[float, int]] = []
    poller = threading.Thread(target=_poll, args=(process, seen))
    poller.start()
    output, _ = process.communicate()
    poller.join()
    if process.returncode:
        raise RuntimeError(f"benchmarks.load: {contender} must load {checkpoint}, it failed")
    times = json.loads(output.splitlines()[-1])
    before = max(size for at, size in seen if at <= times["imported"])
    during = [size for at, size in seen if times["imported"] <= at <= times["loaded"]]
    after = [size for at, size in seen if times["loaded"] <= at <= times["loaded"] + 0.05]
    return {
        "library_seconds": times["library"],
        "import_seconds": times["imported"] - started,
        "load_seconds": times["loaded"] - times["imported"],
        "first_loss_seconds": times["done"] - started,
        "imported_mib": before / MIB,
        "peak_mib": max(during) / MIB,
        "kept_mib": after[-1] / MIB,
        "loss": times["loss"],
    }


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """A 16-bit checkpoint with random weights, and nf4's 4-bit one of it."""
    import nf4

    code = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
import nf4
torch.manual_seed(0)
sizes, dense, packed = eval(sys.argv[1]), *sys.argv[2:]
AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).save_pretrained(dense)
config = nf4.NF4Config()
model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
model.save_pretrained(packed)
"""
    paths = {name: folder / name for name in ("16bit", "4bit")}
    command = [sys.executable, "-c", code, str(SIZES), *map(str, paths.values())]
    where = {**os.environ, "PYTHONPATH": str(Path(nf4.__file__).parent.parent)}
    subprocess.run(command, check=True, env=where, stderr=subprocess.DEVNULL)
    return paths


def run(path: Path, rounds: int, folder: Path) -> None:
    """Measure every contender that is installed, in turn, and write the medians."""
    from benchmarks import peers, results

    checkpoints = {name: folder / name for name in ("16bit", "4bit")}
    if not all(p.exists() for p in checkpoints.values()):
        checkpoints = write_checkpoints(folder)
    runs = [(c, k) for c, k in RUNS if c != "bitsandbytes" or c in peers.installed()]
    samples: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in runs}
    for _ in range(rounds):
        for contender, kind in runs:
            samples[contender, kind].append(measure(contender, checkpoints[kind]))
    env = results.environment(torch.device("cpu"), "", torch.get_num_threads())
    names = ("date", "commit", "dirty", "torch", "bitsandbytes", "python", "hardware", "threads")
    rows = []
    for (contender, kind), measured in samples.items():
        medians = {k: statistics.median(m[k] for m in measured) for k in measured[0]}
        row = {"contender": contender, "checkpoint": kind, "rounds": rounds}
        row |= {k: f"{v:.4g}" for k, v in medians.items()}
        print(", ".join(f"{k} {v}" for k, v in row.items()))
        rows.append({name: getattr(env, name) for name in names} | row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], float(sys.argv[4]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/load_cpu.csv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoints", type=Path, help="a folder to keep the checkpoints in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments.csv, arguments.rounds, arguments.checkpoints or Path(temporary))
