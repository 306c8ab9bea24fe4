"""The sdist and the wheel: what is in them, and that they live beside Hugging Face's `kernels`."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# As pyproject.toml asks: older ones do not read its license.
SETUPTOOLS = 77


def _build(kind: str, target: Path, source: Path, **env: str) -> Path:
    """Run setuptools' own hook, in this environment, for a wheel or an sdist."""
    release = importlib.metadata.version("setuptools")
    if int(release.partition(".")[0]) < SETUPTOOLS:
        pytest.skip(f"setuptools {SETUPTOOLS} or newer is not installed")
    hook = {"wheel": "build_wheel", "sdist": "build_sdist"}[kind]
    code = f"from setuptools import build_meta as b; print(b.{hook}({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, "NF4_BUILD_CUDA": "0", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(_build("sdist", folder, ROOT)) as archive:
        archive.extractall(folder, filter="data")
    return next(p for p in folder.iterdir() if p.is_dir())


@pytest.fixture(scope="module")
def pure_wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from the sdist on a machine without a compiler."""
    return _build("wheel", tmp_path_factory.mktemp("wheel"), unpacked_sdist, CXX="/no/compiler")


def test_sdist_holds_what_a_build_needs(unpacked_sdist: Path) -> None:
    for name in ("csrc/include/nf4/codes.h", "csrc/cpu", "kernels", "LICENSE", "setup.py"):
        assert (unpacked_sdist / name).exists(), name
    assert list((unpacked_sdist / "nf4/kernels").glob("*.py"))
    assert not list(unpacked_sdist.rglob("*.so"))


def test_wheel_contents(pure_wheel: Path) -> None:
    names = zipfile.ZipFile(pure_wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert "kernels" not in top and "tests" not in top and "csrc" not in top
    kernels = {p.name for p in (ROOT / "kernels").glob("*.py")}
    assert kernels <= {Path(n).name for n in names if n.startswith("nf4/kernels/")}
    assert "nf4/py.typed" in names and "nf4/cli/demo_pairs.jsonl" in names


_SCRIPT = """
import sys
sys.path[:0] = [{wheel!r}, {beside!r}]
import kernels
assert kernels.MARK == "hugging face", kernels
import nf4, torch
assert nf4.__file__.startswith({wheel!r})
import transformers.integrations.hub_kernels
q = nf4.quantize(torch.randn(8, 64))
print(nf4.dequantize(q).shape, nf4.available_backends()["cpu"].reason)
"""


def test_wheel_works_beside_the_kernels_package(pure_wheel: Path, tmp_path: Path) -> None:
    """Unpacked next to a package called `kernels`, neither hides the other, and transformers
    imports; without its native library nf4 runs on the reference and says why."""
    installed, beside = tmp_path / "site", tmp_path / "beside"
    zipfile.ZipFile(pure_wheel).extractall(installed)
    (beside / "kernels").mkdir(parents=True)
    (beside / "kernels/__init__.py").write_text('MARK = "hugging face"\n')
    script = _SCRIPT.format(wheel=str(installed), beside=str(beside))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.Size([8, 64])" in done.stdout and "native CPU library" in done.stdout


def test_repo_root_on_the_path_leaves_transformers_importable() -> None:
    code = "import transformers.integrations.hub_kernels"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_documents_name_only_files_that_exist() -> None:
    for document in ("README.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text()
        for path in re.findall(r"`((?:nf4|csrc|kernels|tests|benchmarks)/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{document} names {path}"


@pytest.mark.check
def test_native_wheel_is_abi3(unpacked_sdist: Path, tmp_path: Path) -> None:
    wheel = _build("wheel", tmp_path, unpacked_sdist)
    assert "-cp310-abi3-" in wheel.name
    assert "nf4/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()
