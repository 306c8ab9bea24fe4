"""NF4 quantization kernels for QLoRA."""

from nf4.backends import available_backends, use_backend
from nf4.version import __version__

__all__ = ["__version__", "available_backends", "use_backend"]
