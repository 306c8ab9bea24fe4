"""The ``bitsandbytes`` module that stands in where bitsandbytes is not installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from nf4.version import __version__

# The interface that is presented; transformers asks for 0.46.1 or newer.
VERSION = f"0.50.2+nf4.{__version__}"

_MODULES = {
    "bitsandbytes.functional": "nf4.drop_in.functional",
    "bitsandbytes.nn.modules": "nf4.drop_in.modules",
    "bitsandbytes.optim": "nf4.drop_in.optim",
}


class _Metadata(Distribution):
    """What importlib.metadata tells of bitsandbytes: accelerate and transformers ask there."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: {VERSION}\n"

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class _Finder(DistributionFinder):
    """Finds the metadata above, and no module."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[Distribution]:
        return [_Metadata()] if context.name == "bitsandbytes" else []


_finder = _Finder()


def installed() -> bool:
    """Whether ``import bitsandbytes`` gives nf4's modules."""
    module = sys.modules.get("bitsandbytes")
    return module is not None and getattr(module, "_nf4", False)


def install() -> None:
    """Put the modules into ``sys.modules``."""
    root = _module("bitsandbytes", _root_attribute, package=True)
    functional = importlib.import_module("nf4.drop_in.functional")
    root.__dict__.update(
        __version__=VERSION,
        _nf4=True,
        features={"multi_backend"},
        supported_torch_devices={"cpu", "cuda"},
        matmul_4bit=functional.matmul_4bit,
    )
    for name, source in _MODULES.items():
        module = _module(name, _refuser(name))
        implementation = importlib.import_module(source)
        public = {k: v for k, v in vars(implementation).items() if not k.startswith("_")}
        module.__dict__.update(public)
        sys.modules[name] = module
    optim = importlib.import_module("nf4.drop_in.optim")
    for name in optim.REFUSED:
        setattr(sys.modules["bitsandbytes.optim"], name, optim.refused(name))
    nn = _module("bitsandbytes.nn", _refuser("bitsandbytes.nn"), package=True)
    modules = sys.modules["bitsandbytes.nn.modules"]
    nn.__dict__.update({k: v for k, v in vars(modules).items() if not k.startswith("__")})
    nn.modules = modules  # type: ignore[attr-defined]
    root.nn, root.modules = nn, modules  # type: ignore[attr-defined]
    root.functional = sys.modules["bitsandbytes.functional"]  # type: ignore[attr-defined]
    root.optim = sys.modules["bitsandbytes.optim"]  # type: ignore[attr-defined]
    sys.modules["bitsandbytes.nn"] = nn
    sys.modules["bitsandbytes"] = root
    sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Take out what ``install`` put in."""
    if installed():
        for name in [n for n in sys.modules if n.partition(".")[0] == "bitsandbytes"]:
            del sys.modules[name]
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _module(name: str, attribute: Callable[[str], Any], package: bool = False) -> ModuleType:
    module = ModuleType(name, f"{name}, as nf4.drop_in presents it.")
    module.__spec__ = ModuleSpec(name, loader=None, origin="nf4.drop_in", is_package=package)
    module.__file__ = __file__
    if package:
        module.__path__ = []
    module.__package__ = name if package else name.rpartition(".")[0]
    module.__getattr__ = attribute  # type: ignore[method-assign]
    return module


def _root_attribute(name: str) -> Any:
    # Tutorials import it from bitsandbytes by mistake.
    if name == "BitsAndBytesConfig":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig
    return _refuser("bitsandbytes")(name)


def _refuser(module: str) -> Callable[[str], Any]:
    def attribute(name: str) -> Any:
        raise AttributeError(
            f"nf4.drop_in: {module}.{name} is not among what nf4 stands in for; "
            "install bitsandbytes for it"
        )

    return attribute
