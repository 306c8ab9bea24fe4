"""The private names of other libraries that nf4 uses are all in one list, and all there."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

import pytest

from nf4.integrations import private_names
from nf4.integrations.private_names import Name

INTEGRATIONS = Path(private_names.__file__).parent
LISTS = {
    "transformers": private_names.TRANSFORMERS,
    "peft": private_names.PEFT,
    "accelerate": private_names.ACCELERATE,
}
NAMES = [pytest.param(name, id=".".join(name)) for names in LISTS.values() for name in names]
# In transformers.trainer and the like, but documented.
PUBLIC = {"transformers.BitsAndBytesConfig"}


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_release_has_it(name: Name) -> None:
    """The failure says which release moved it."""
    pytest.importorskip(name[0].partition(".")[0])
    owner, last = private_names.resolve(name)
    assert hasattr(owner, last)


@pytest.mark.parametrize(("package", "names"), LISTS.items())
def test_a_moved_one_is_named_with_the_release(package: str, names: tuple[Name, ...]) -> None:
    pytest.importorskip(package)
    module, path = names[0]
    release = importlib.metadata.version(package)
    for moved in ((module, f"{path}_moved"), (f"{module}_moved", path)):
        with pytest.raises(ImportError, match=f"{moved[1]} .*got {package} {release}"):
            private_names.resolve(moved)


def test_no_other_file_reaches_for_one_that_is_not_listed() -> None:
    """Whatever is imported from a submodule of another library is in the list."""
    names = [name for names in LISTS.values() for name in names]
    listed = {f"{module}.{path.split('.')[0]}" for module, path in names}
    modules = {module for module, _ in names}
    reached = set()
    for file in [*INTEGRATIONS.glob("*.py"), *INTEGRATIONS.parent.glob("[dln]*/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                reached |= {a.name for a in node.names if a.name.count(".")}
            elif isinstance(node, ast.ImportFrom) and node.module:
                reached |= {f"{node.module}.{alias.name}" for alias in node.names}
    theirs = {name for name in reached if name.partition(".")[0] in LISTS}
    assert theirs, "the walk finds no import"
    assert theirs <= listed | modules | PUBLIC, theirs - listed - modules - PUBLIC
