"""Callbacks that run once another package has been imported, so that nf4 need not import it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], object]

_waiting: dict[str, list[Callback]] = {}


class _Finder(MetaPathFinder):
    """Finds nothing itself: it has the loader of an awaited module run the callbacks after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _run_callbacks_after(spec)
                return spec
        return None


def _run_callbacks_after(spec: ModuleSpec) -> None:
    loader = spec.loader
    if loader is None or not hasattr(loader, "exec_module"):
        return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        # The loader outlives the import (reload uses it): it is as it was from here on.
        del loader.exec_module
        execute(module)
        for callback in _waiting.pop(spec.name, []):
            callback(module)

    # Set on the instance: the loader keeps its class, which other tools look at.
    loader.exec_module = exec_module  # type: ignore[method-assign]


_finder = _Finder()


def on_import(module_name: str, callback: Callback) -> None:
    """Call ``callback(module)`` when ``module_name`` is imported, or now if it has been.

    Callbacks run once, in the order given, after the module's own code. An exception in one
    surfaces from the import statement that triggered it.
    """
    module = sys.modules.get(module_name)
    if module is not None:
        callback(module)
        return
    _waiting.setdefault(module_name, []).append(callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def importable(module_name: str) -> bool:
    """Whether ``import module_name`` would find a module, without importing it."""
    try:
        return importlib.util.find_spec(module_name) is not None
    except (ImportError, ValueError):  # refused by a finder; a module without __spec__
        return module_name in sys.modules and sys.modules[module_name] is not None
