"""The layer rules of the package, by reading its sources: imports go one way only."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nf4"
KERNELS = ROOT / "kernels"

# Rank of each module or subpackage of nf4: one may import its own rank's package and lower ranks.
LAYERS: list[set[str]] = [
    {"version", "formats", "config", "ops", "kernels"},
    {"backends"},
    {"autograd", "tensor"},
    {"functional"},
    {"nn", "optim"},
    {"lora"},
    {"integrations"},
    {"drop_in", "cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Where third-party packages that are not required may be imported, if only inside a function.
OPTIONAL = {
    "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "matplotlib",
    "rich", "yaml", "torchao",
}  # fmt: skip
MAY_IMPORT_OPTIONAL = {"integrations", "drop_in", "cli"}
# Only when called: a model made by transformers or PEFT is at hand then.
MAY_IMPORT_LAZILY = {"lora", "nn"}

SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)
relative = {p: p.relative_to(PACKAGE).as_posix() for p in SOURCES}
each_source = pytest.mark.parametrize("path", SOURCES, ids=relative.get)


def layer(path: Path) -> str:
    """The part of nf4 that a file belongs to: its module or subpackage."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def type_checking(node: ast.AST) -> bool:
    """Whether a statement is ``if TYPE_CHECKING:``, which never runs."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(module, whether only inside a function, line) of each import below ``node``."""
    for child in ast.iter_child_nodes(node):
        if type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: import by the full name, nf4.something"
            yield child.module, lazy, child.lineno
            yield from ((f"{child.module}.{a.name}", lazy, child.lineno) for a in child.names)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, lazy or inside)


def imports_of(path: Path) -> list[tuple[str, bool, int]]:
    return list(imports(ast.parse(path.read_text())))


def test_every_part_has_a_layer() -> None:
    parts = {layer(p) for p in SOURCES} - {"__init__"}
    assert parts <= RANK.keys(), f"add to LAYERS: {sorted(parts - RANK.keys())}"


@each_source
def test_imports_go_down(path: Path) -> None:
    """``from nf4 import x`` counts as importing nf4.x; the package itself imports everything."""
    if path == PACKAGE / "__init__.py":
        return
    own = layer(path)
    for module, _, line in imports_of(path):
        head, _, rest = module.partition(".")
        if head != "nf4" or not rest:
            continue
        target = rest.split(".")[0]
        if target not in RANK:  # a public name of the package, which only the outermost may use
            assert RANK[own] >= RANK["cli"], f"{relative[path]}:{line}: imports {module}"
            continue
        assert target == own or RANK[target] <= RANK[own], (
            f"{relative[path]}:{line}: {own} must not import {target}"
        )


@each_source
def test_optional_packages_stay_outside(path: Path) -> None:
    own = layer(path)
    for module, lazy, line in imports_of(path):
        head = module.split(".")[0]
        if head in OPTIONAL and own not in MAY_IMPORT_OPTIONAL:
            allowed = own in MAY_IMPORT_LAZILY and lazy
            assert allowed, f"{relative[path]}:{line}: {own} must not import {head}"


@each_source
def test_ops_and_formats_stand_alone(path: Path) -> None:
    """formats needs numpy only, ops torch only, so that any part may import them."""
    allowed = {"formats.py": {"numpy"}, "ops.py": {"torch"}, "version.py": set()}
    own = relative[path]
    if own not in allowed:
        return
    for module, lazy, line in imports_of(path):
        head = module.split(".")[0]
        standard = head in sys.stdlib_module_names
        assert standard or head in allowed[own] or lazy, f"{own}:{line}: imports {module}"


def test_kernels_are_linked_and_no_package() -> None:
    """An importable top-level package ``kernels`` would shadow Hugging Face's and break
    transformers; the link makes the same files ``nf4.kernels`` in a wheel."""
    link = PACKAGE / "kernels"
    assert link.is_symlink() and link.readlink().as_posix() == "../kernels"
    assert not list(ROOT.glob("conftest.py"))
    assert not list(KERNELS.rglob("__init__.py"))


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_no_torch(path: Path) -> None:
    for module, _, line in imports_of(path):
        head = module.split(".")[0]
        assert head in {"triton", *sys.stdlib_module_names} or module.startswith("nf4.kernels"), (
            f"kernels/{path.name}:{line}: imports {module}"
        )


NATIVE = sorted(
    p
    for folder in ("cpu", "cuda", "include")
    for p in (ROOT / "csrc" / folder).rglob("*")
    if p.suffix in {".h", ".cpp", ".cuh", ".cu", ".inc"}
)


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_native_kernels_include_no_torch(path: Path) -> None:
    """They take raw pointers and a stream, so that anything can call and test them."""
    for included in re.findall(r'^\s*#\s*include\s*[<"]([^">]+)', path.read_text(), re.MULTILINE):
        assert not re.match(r"(torch|ATen|c10|caffe2|pybind11|Python\.h)", included), included


@pytest.mark.parametrize("path", SOURCES, ids=relative.get)
def test_files_stay_readable(path: Path) -> None:
    """About 400 lines a file, and no file named for nothing."""
    assert len(path.read_text().splitlines()) <= 440
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}
