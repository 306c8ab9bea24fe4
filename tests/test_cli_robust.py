"""The commands' promises at their edges: memory, kills and chat prompts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folder import write_checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
safetensors_torch = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def run(*words: object) -> str:
    """Standard output of a command."""
    done = subprocess.run(
        [sys.executable, "-m", "nf4.cli", *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    write_checkpoint(folder, "base")
    return folder


# Anonymous memory, for the pages of the mapped checkpoint are the kernel's to drop. The shard that
# is being written is held, so it is made small here beside a layer.
_PEAK = """
import re, sys, threading, time
import nf4.cli, nf4.cli.quantize
import nf4.integrations.stream as stream
stream.SHARD_BYTES = 2**21

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

peaks = []
for source, target in (sys.argv[1:3], sys.argv[1:2] + sys.argv[3:4], sys.argv[4:6]):
    done, seen = threading.Event(), [anonymous()]
    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    assert nf4.cli.main(["quantize", "--model", source, "--output", target]) == 0
    done.set()
    thread.join()
    peaks.append(max(seen))
print("peaks", *peaks[1:])  # the first run loads what the process needs but once
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantize_takes_the_memory_of_a_layer_whatever_the_model_s_size(tmp_path: Path) -> None:
    for layers in (2, 16):
        config = transformers.LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=8,
            vocab_size=64,
        )
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / str(layers), max_shard_size="20MB")
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    small, large = tmp_path / "2", tmp_path / "16"
    words = (small, tmp_path / "a", tmp_path / "b", large, tmp_path / "c")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *map(str, words)],
        cwd=ROOT,
        env={**ENVIRONMENT, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(int, done.stdout.splitlines()[-1].split()[1:])
    # 14 layers more are 97 MB in 16 bits and 25 MB in 4 bits.
    assert second - first < layer, (first, second, layer)


def _whole(output: Path) -> None:
    """Every file under a final name can be read to its end."""
    for path in output.rglob("*"):
        if any(part.startswith(".partial-") for part in path.relative_to(output).parts):
            continue
        if path.suffix == ".safetensors":
            safetensors_torch.load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=False)
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    for checkpoint in output.glob("checkpoint-*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert {"trainer_state.json", "adapter_model.safetensors", "optimizer.pt"} <= names


@pytest.mark.check
def test_finetune_killed_at_random_moments_loses_only_steps_since_a_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words: tuple[Any, ...] = ("--model", folder / "base", "--data", folder / "pairs.jsonl")
    words += ("--output", output, "--max_steps", 40, "--save_steps", 2)
    line = [sys.executable, "-u", "-m", "nf4.cli", "finetune", *map(str, words)]
    kept = 0
    for _ in range(5):
        with (tmp_path / "out.txt").open("w+") as out:
            process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=out)
            # After its first step (or at the end): before that there is nothing to lose.
            while "step " not in (tmp_path / "out.txt").read_text() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(random.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
            shown = (tmp_path / "out.txt").read_text().splitlines()
        _whole(output)
        found = [int(p.name.split("-")[1]) for p in output.glob("checkpoint-*[0-9]")]
        last = max(found, default=0)
        steps = [int(row.split()[1].split("/")[0]) for row in shown if row.startswith("step ")]
        if steps:
            assert steps[0] == kept + 1  # went on from the last checkpoint
            assert max(steps) - last <= 2 + 1  # at the most the step that was being saved
        kept = last
    run("finetune", *words)
    _whole(output)
    assert not list(output.glob(".partial-*"))
    log = json.loads((output / "log.json").read_text())
    steps = [row["step"] for row in log if "loss" in row]
    assert steps == list(range(1, 41))


@pytest.mark.check
def test_dynamic8_trains_generates_and_merges(folder: Path, tmp_path: Path) -> None:
    base = ("--model", folder / "base")
    words = ("--data", folder / "pairs.jsonl", "--output", tmp_path / "run")
    eight = ("--format", "dynamic8")
    run("finetune", *base, *words, *eight, "--max_steps", 20, "--learning_rate", 0.01)
    adapted = ("--adapter", tmp_path / "run", *eight)
    prompt = ("--prompt", "say 3", "--instruction", "--max-new-tokens", 4, "--json")
    on_load = run("generate", *base, *adapted, *prompt)
    run("quantize", *base, *eight, "--output", tmp_path / "q8")
    assert run("generate", "--model", tmp_path / "q8", *adapted, *prompt) == on_load
    data = ("--data", folder / "pairs.jsonl", "--max-windows", 4, "--max-length", 64, "--json")
    rows = json.loads(run("eval", *base, *adapted, *data))
    learned = rows[-2]["loss"] - rows[-1]["loss"]
    assert learned > 0.05
    for into in ("16bit", "nf4"):  # "nf4" keeps the format of the layers
        run("merge", *base, *adapted, "--output", tmp_path / into, "--into", into)
        merged = json.loads(run("eval", "--model", tmp_path / into, *eight, *data))[0]
        assert abs(merged["loss"] - rows[-1]["loss"]) < 0.25 * learned, into
    settings = json.loads((tmp_path / "nf4/config.json").read_text())["quantization_config"]
    assert "dynamic8" in json.dumps(settings)


def test_chat_prompts_hold_the_bos_token_once(folder: Path) -> None:
    """A template writes it, and so would a tokenizer that adds special tokens."""
    from nf4.cli import generate

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    bos = tokenizer.eos_token
    ids: list[list[int]] = []

    class Recorder:
        device = torch.device("cpu")

        def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
            ids.append(input_ids[0].tolist())
            return input_ids

    class WithBos:
        """The tokenizer as Llama's: it puts a BOS before what it encodes."""

        pad_token_id = tokenizer.pad_token_id
        batch_decode = tokenizer.batch_decode

        def __call__(self, prompts: list[str], **options: Any) -> Any:
            if options.get("add_special_tokens", True):
                prompts = [bos + prompt for prompt in prompts]
            return tokenizer(prompts, **options)

    generate._complete(Recorder(), WithBos(), [bos + "say 3"], True, {})
    generate._complete(Recorder(), WithBos(), ["say 3"], False, {})
    for row in ids:
        assert row.count(tokenizer.eos_token_id) == 1
        assert row[0] == tokenizer.eos_token_id


def test_a_command_leaves_the_progress_bars_as_they_were() -> None:
    """Commands are functions too: a notebook that called one still sees its own bars."""
    import datasets
    from transformers.utils import logging

    from nf4.cli.models import quiet_transformers

    verbosity = logging.get_verbosity()
    for bars in (True, False):
        logging.enable_progress_bar()
        with quiet_transformers(bars=bars):
            assert logging.is_progress_bar_enabled() is bars
            assert datasets.are_progress_bars_disabled() is not bars
        assert logging.is_progress_bar_enabled() and not datasets.are_progress_bars_disabled()
        assert logging.get_verbosity() == verbosity
    logging.disable_progress_bar()
    try:
        with quiet_transformers(bars=False):
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
