"""The README's examples, run as they stand on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from checkpoint_folder import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    write_checkpoint(folder, "my-llama")
    (folder / "text.txt").rename(folder / "held-out.txt")
    return folder


def run(words: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"


def test_python_blocks_run(folder: Path) -> None:
    assert len(blocks("python")) == 3
    # One process: importing everything anew for each would take most of the time.
    run([sys.executable, "-c", "\n".join(blocks("python"))], folder)
    assert (folder / "my-adapter/adapter_model.safetensors").exists()
    assert (folder / "my-llama-nf4/config.json").exists()


def test_commands_run(folder: Path) -> None:
    shell = "\n".join(blocks("bash"))
    commands = re.findall(r"^nf4 (?!doctor|bench)(.*?)(?: +#.*)?$", shell, flags=re.MULTILINE)
    assert [c.split()[0] for c in commands] == [
        "quantize",
        "finetune",
        "generate",
        "merge",
        "eval",
        "estimate",
    ]
    for command in commands:
        words = [word.strip('"') for word in command.split()]
        words = ["2" if word == "100" else word for word in words]  # steps
        words = [w + "-2" if w == "my-llama-nf4" else w for w in words]
        run([sys.executable, "-m", "nf4.cli", *words], folder)
    assert (folder / "merged/model.safetensors").exists()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
