"""Modules over quantized weights."""

from nf4.nn.embedding import NF4Embedding
from nf4.nn.experts import NF4Experts
from nf4.nn.linear import Linear4bitLoRA, NF4Linear

__all__ = ["Linear4bitLoRA", "NF4Embedding", "NF4Experts", "NF4Linear"]
