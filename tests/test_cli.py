"""Every command through a real process, on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folder import write_checkpoint

from nf4 import cli

AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
pytest.importorskip("trl")
ROOT = Path(__file__).resolve().parent.parent


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "nf4.cli", *map(str, words)]


def run(*words: object, fails: bool = False, **env: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*words),
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer (base/), texts and instruction pairs."""
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder, "base")
    return folder


def evaluate(model: Path, folder: Path, *more: object) -> list[dict[str, Any]]:
    """The rows of ``nf4 eval`` on the pairs, which are what the adapter learned."""
    words = (
        "--data",
        folder / "pairs.jsonl",
        "--max-length",
        64,
        "--max-windows",
        4,
        "--json",
        *more,
    )
    return json.loads(run("eval", "--model", model, *words).stdout)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """An adapter trained for a few steps, which moved the model."""
    output = folder / "adapter"
    words = ("--output", output, "--max_steps", 20, "--save_steps", 10, "--learning_rate", 0.01)
    done = run("finetune", "--model", folder / "base", "--data", folder / "pairs.jsonl", *words)
    assert "adapter saved; loss" in done.stdout
    assert "\r" not in done.stdout + done.stderr  # fit for a pipe
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.png", "log.json"):
        assert (output / name).stat().st_size > 0
    return output


def test_help_lists_every_command_and_each_has_its_own(capsys: pytest.CaptureFixture) -> None:
    listed = run("--help").stdout
    for name in ("quantize", "generate", "merge", "eval", "estimate", "doctor", "demo"):
        assert name in listed
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert f"usage: nf4 {name}" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and "nf4 0." in capsys.readouterr().out
    assert cli.main(["fly"]) == 2 and "no command 'fly'" in capsys.readouterr().err


def test_quantize_streams_and_the_result_equals_quantizing_on_load(folder: Path) -> None:
    done = run("quantize", "--model", folder / "base", "--output", folder / "nf4", "--json")
    sizes = json.loads(done.stdout)
    assert sizes["written"] < sizes["read"]
    stored = evaluate(folder / "nf4", folder)
    plain, on_load = evaluate(folder / "base", folder)
    assert stored[0]["loss"] == on_load["loss"] != plain["loss"]
    again = ("quantize", "--model", folder / "base", "--output", folder / "nf4")
    assert "has contents already" in run(*again, fails=True).stderr
    assert (
        "is quantized already"
        in run("quantize", "--model", folder / "nf4", "--output", folder / "x", fails=True).stderr
    )


def test_quantized_output_loads_in_bitsandbytes(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run("quantize", "--model", folder / "base", "--output", tmp_path / "q")
    script = (
        "import torch, bitsandbytes as bnb; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(tmp_path / 'q')!r})\n"
        "layers = [x for x in m.modules() if isinstance(x, bnb.nn.Linear4bit)]\n"
        "w = layers[0].weight; d = bnb.functional.dequantize_4bit(w.data, w.quant_state)\n"
        "import nf4\n"
        "q = nf4.QuantizedTensor(w.data, w.quant_state.absmax, w.quant_state.state2.absmax,\n"
        "    w.quant_state.offset, w.quant_state.shape, torch.bfloat16, 64, 'nf4')\n"
        "print(len(layers), torch.equal(d, nf4.dequantize(q)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == ["14", "True"]


def test_dynamic8_quantizes_and_evaluates(folder: Path, tmp_path: Path) -> None:
    words = ("--output", tmp_path / "q8", "--format", "dynamic8")
    run("quantize", "--model", folder / "base", *words)
    plain, on_load = evaluate(folder / "base", folder, "--format", "dynamic8")
    stored = evaluate(tmp_path / "q8", folder, "--format", "dynamic8")
    assert stored[0]["loss"] == on_load["loss"]
    assert abs(on_load["loss"] - plain["loss"]) < 0.04


def test_generate_streams_one_prompt_and_batches_a_file(folder: Path, adapter: Path) -> None:
    # What a model of 20 steps says is chance, down to saying nothing at once: compare, not judge.
    model = ("--model", folder / "base", "--adapter", adapter, "--max-new-tokens", 6)
    streamed = run("generate", *model, "--prompt", "the quick").stdout
    (row,) = run("generate", *model, "--prompt", "the quick", "--json").stdout.splitlines()
    assert streamed == json.loads(row)["text"] + "\n"
    prompts = folder / "prompts.txt"
    prompts.write_text("the quick\nlazy dogs and\nfox\n")
    done = run("generate", *model, "--prompts", prompts, "--json", "--batch-size", 2)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["the quick", "lazy dogs and", "fox"]


def test_merges_keep_what_the_adapter_learned(folder: Path, adapter: Path, tmp_path: Path) -> None:
    base = ("--model", folder / "base", "--adapter", adapter)
    _, quantized, adapted = evaluate(folder / "base", folder, "--adapter", adapter)
    learned = quantized["loss"] - adapted["loss"]
    assert learned > 0.05
    run("merge", *base, "--output", tmp_path / "m16")
    assert "quantization_config" not in json.loads((tmp_path / "m16/config.json").read_text())
    run("merge", *base, "--output", tmp_path / "m4", "--into", "nf4")
    for name in ("m16", "m4"):
        (merged, *_) = evaluate(tmp_path / name, folder)
        assert abs(merged["loss"] - adapted["loss"]) < 0.25 * learned, name
    run("quantize", "--model", folder / "base", "--output", tmp_path / "q")
    words = ("--model", tmp_path / "q", "--adapter", adapter, "--output", tmp_path / "m")
    done = run("merge", *words, "--into", "nf4", fails=True)
    assert "--base original needs 16-bit weights" in done.stderr


def test_a_yaml_file_configures_finetune_and_the_command_line_wins(
    folder: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {folder / 'base'}\ndata: {folder / 'text.txt'}\n"
        f"output_dir: {tmp_path / 'run'}\nmax_steps: 5\nlora_r: 2\nlogging_steps: 1\n"
    )
    run("finetune", "--config", config, "--max_steps", 2)
    log = json.loads((tmp_path / "run/log.json").read_text())
    assert max(row["step"] for row in log) == 2
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["r"] == 2


def test_bench_leaves_rows_and_bars(tmp_path: Path) -> None:
    words = ("--op", "dequantize", "--shape", "256x256", "--rounds", 1, "--csv", tmp_path / "x.csv")
    done = run("bench", *words)
    assert "dequantize 256x256" in done.stdout and "bars:" in done.stdout
    assert ",dequantize,nf4,256,256," in (tmp_path / "x.csv").read_text()
    assert (tmp_path / "x.png").stat().st_size > 0
    assert "rows of a case" in run("bench", "--help").stdout.lower()
    assert "NxK" in run("bench", "--shape", "big", fails=True).stderr


@pytest.mark.parametrize("packing", [False, True])
def test_messages_train_through_the_chat_template(
    folder: Path, tmp_path: Path, packing: bool
) -> None:
    shutil.copytree(folder / "base", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": i}]}
        for i in map(str, range(16))
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = ("--model", tmp_path / "chat")
    words = ("--data", tmp_path / "chat.jsonl", "--output", tmp_path / "run", "--max_steps", 2)
    done = run("finetune", *model, *words, "--packing", packing, "--max_length", 128)
    assert "step 2/2" in done.stdout
    words = ("--chat", "--prompt", "say 3", "--max-new-tokens", 3, "--json")
    answer = json.loads(run("generate", *model, "--adapter", tmp_path / "run", *words).stdout)
    assert answer["prompt"] == "say 3"
    refused = run("generate", "--model", folder / "base", *words, fails=True).stderr
    assert "has no chat template" in refused and "Traceback" not in refused


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_finetune_resumes_from_its_last_checkpoint(
    folder: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    output = tmp_path / "run"
    words = ("--model", folder / "base", "--data", folder / "pairs.jsonl", "--output", output)
    steps = ("--max_steps", 60, "--save_steps", 2)
    process = subprocess.Popen(
        command("finetune", *words, *steps),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        # A shell's background jobs, and so perhaps these tests, ignore what Ctrl-C sends.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 240
    while not list(output.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    assert process.wait() == (130 if stop is signal.SIGINT else -stop)
    assert not (output / "adapter_model.safetensors").exists()
    done = run("finetune", *words, "--max_steps", 62, "--save_steps", 20)
    assert "Resuming from" in done.stdout
    steps_seen = [row["step"] for row in json.loads((output / "log.json").read_text())]
    assert max(steps_seen) == 62


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "--model", "/nowhere/x", "--data", "x.txt"), "nf4 eval:"),
        (("estimate", "--model", "."), "holds no config.json"),
        (("finetune", "--model", ".", "--data", "pairs", "--output", "o"), "nf4 finetune:"),
    ],
)
def test_errors_are_one_line(words: tuple[str, ...], message: str) -> None:
    lines = run(*words, fails=True).stderr.strip().splitlines()
    assert message in lines[-1] and "--debug" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_bad_rows_are_named(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"question": "?"}\n')
    words = ("finetune", "--model", folder / "base", "--data", bad, "--output", tmp_path / "o")
    assert "line 2: a row must have 'text'" in run(*words, fails=True).stderr


def test_doctor_reports_every_backend() -> None:
    report = json.loads(run("doctor", "--json").stdout)
    assert set(report["backends"]) == {"cpu", "cuda", "triton", "reference"}
    assert report["self-test"]["reference"] == "ok"
    for entry in report["backends"].values():
        assert entry["usable"] or (entry["reason"] and entry["cost"])


def test_doctor_says_what_each_missing_part_costs(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without compilers, packages or the native library."""
    from nf4.backends import cpu
    from nf4.cli import doctor

    monkeypatch.setattr(doctor, "_version", lambda package: "")
    monkeypatch.setattr(doctor, "_compiler", lambda name: "")
    monkeypatch.setattr(cpu, "LOAD_ERROR", "no library")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*doctor.PACKAGE_COSTS, *doctor.COMPILER_COSTS):
        (line,) = (line for line in lines if line.split()[:1] == [name] and "missing" in line)
        assert len(line.partition("missing: ")[2]) > 10, line
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["cpu"] and "usable" in line)
    assert "not usable: no library" in lines[at] and "many times slower" in lines[at + 1]
    assert "  cpu tensors run on: reference" in lines
