"""What ``import nf4`` leaves behind: integrations that install once their package is imported."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType

from nf4.integrations.hooks import on_import

# Package, and the module whose install() runs after it.
INTEGRATIONS = (
    ("transformers.quantizers.auto", "nf4.integrations.transformers"),
    ("peft", "nf4.integrations.peft"),
    ("transformers.trainer", "nf4.integrations.trainer"),
)


def register() -> None:
    """Await every package in ``INTEGRATIONS``; those imported already are hooked now."""
    for package, integration in INTEGRATIONS:
        on_import(package, partial(_install, integration))


def _install(integration: str, package: ModuleType) -> None:
    module = importlib.import_module(integration)
    # One that is being imported, and so imported its package, installs at its own end.
    if hasattr(module, "install"):
        module.install()
