"""What importing nf4 does, and does not do, to a process; each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run ``code`` in a new interpreter with this nf4 importable; its output, or fail with it."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_import_brings_no_other_framework() -> None:
    """transformers alone takes seconds to import; nf4 waits for it with an import hook."""
    others = ("transformers", "peft", "accelerate", "bitsandbytes", "datasets", "matplotlib", "trl")
    out = run(f"import sys, nf4\nprint([m for m in {others!r} if m in sys.modules])")
    assert out.strip() == "[]"


def test_import_initializes_no_gpu_and_starts_no_compiler() -> None:
    """A process that forks after the import must still be able to use CUDA."""
    out = run(
        "import sys, nf4, torch\n"
        "print(torch.cuda.is_initialized(), 'torch._inductor' in sys.modules)"
    )
    assert out.split() == ["False", "False"]


def test_public_names_exist() -> None:
    out = run("import nf4\nprint([n for n in nf4.__all__ if not hasattr(nf4, n)], nf4.__version__)")
    assert out.startswith("[] ")


def test_typed_marker_and_license() -> None:
    assert (ROOT / "nf4" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("first", ["transformers", "nf4"])
def test_transformers_imports_beside_nf4(first: str) -> None:
    """From the repository root, where the folder ``kernels`` lies: transformers looks for Hugging
    Face's package of that name, and must not take ours for it."""
    second = {"transformers": "nf4", "nf4": "transformers"}[first]
    out = run(
        f"import {first}, {second}\n"
        "import transformers\n"
        "from transformers import AutoModelForCausalLM, Trainer, BitsAndBytesConfig\n"
        "from transformers.utils import is_kernels_available\n"
        "from importlib.metadata import packages_distributions\n"
        "print('kernels' in packages_distributions() or not is_kernels_available())"
    )
    assert out.split()[-1] == "True"


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_peft_imports_beside_nf4() -> None:
    run("import nf4\nimport peft\nfrom peft import LoraConfig, get_peft_model")
