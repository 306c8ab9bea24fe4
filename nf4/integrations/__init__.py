"""Other libraries' interfaces to nf4. Importing this package imports none of them."""

from nf4.integrations.hooks import importable, on_import

__all__ = ["importable", "on_import"]
