"""``integrations.on_import``: callbacks when another package comes, and none of them before."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from nf4.integrations import importable, on_import

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package that is not imported yet."""
    name = f"awaited_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("value = 1\n")
    (tmp_path / name / "part.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for key in [k for k in sys.modules if k.partition(".")[0] == name]:
        del sys.modules[key]


def test_callbacks_run_once_after_the_import(package: str) -> None:
    seen = []
    on_import(f"{package}.part", lambda module: seen.append(("first", module.value)))
    on_import(f"{package}.part", lambda module: seen.append(("second", module.value)))
    importlib.import_module(package)
    assert seen == []
    module = importlib.import_module(f"{package}.part")
    assert seen == [("first", 2), ("second", 2)]
    importlib.reload(module)
    assert len(seen) == 2
    assert "exec_module" not in vars(module.__spec__.loader)


def test_callback_runs_at_once_for_an_imported_module(package: str) -> None:
    importlib.import_module(package)
    seen = []
    on_import(package, lambda module: seen.append(module.value))
    assert seen == [1]


def test_error_of_a_callback_surfaces_at_the_import(package: str) -> None:
    def refuse(module: object) -> None:
        raise RuntimeError("too old")

    on_import(package, refuse)
    with pytest.raises(RuntimeError, match="too old"):
        importlib.import_module(package)


def test_importable(package: str) -> None:
    assert importable(package)
    assert importable("json")
    assert not importable("no_such_package_at_all")


def test_import_nf4_imports_no_other_library() -> None:
    """Nor the compiler of torch, which takes most of the time that importing bitsandbytes does."""
    code = (
        "import sys, nf4; "
        "print([m for m in ('transformers', 'peft', 'accelerate', 'bitsandbytes', 'torch._dynamo')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
