"""``NF4Embedding``: an embedding table kept in blockwise quantized form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nf4 import functional
from nf4.nn.weight import QuantizedWeight
from nf4.tensor import QuantizedTensor


class NF4Embedding(QuantizedWeight):
    """``nn.Embedding`` over a frozen quantized table ``[num_embeddings, embedding_dim]``.

    Only the rows asked for are decoded. The output dtype is the dtype quantized from, or
    ``compute_dtype``. ``padding_idx`` has no effect on a frozen table; it is kept for the
    module's signature.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        format: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            block_size=block_size,
            double_quant=double_quant,
            format=format,
            compute_dtype=compute_dtype,
            device=device,
            dtype=dtype,
        )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    def from_quantized(
        cls,
        q: QuantizedTensor,
        *,
        padding_idx: int | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Embedding:
        """A module over a table ``[num_embeddings, embedding_dim]``; nothing is copied."""
        module = cls(
            q.shape[0], q.shape[1], padding_idx, compute_dtype=compute_dtype, device="meta"
        )
        module.set_quantized(q)
        return module

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        format: str = "nf4",
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Embedding:
        """Quantize the table of an ``nn.Embedding``, which is left as it is."""
        q = functional.quantize(
            embedding.weight.detach(),
            block_size=block_size,
            double_quant=double_quant,
            format=format,
        )
        return cls.from_quantized(q, compute_dtype=compute_dtype, padding_idx=embedding.padding_idx)

    def forward(self, ids: Tensor) -> Tensor:
        return lookup(self.q, ids, self.compute_dtype or self.weight_dtype)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The ``nn.Embedding`` that this module came from, with the dequantized table."""
        table = self.dequantize(dtype)
        embedding = nn.Embedding(
            table.shape[0], table.shape[1], padding_idx=self.padding_idx, device="meta"
        )
        embedding.weight = nn.Parameter(table)
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}, "
            f"block_size={self.block_size}"
        )


def lookup(q: QuantizedTensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` (any shape, integer) of a quantized table ``[V, D]``: ``[*ids.shape, D]``."""
    rows, width = q.shape
    flat_ids = ids.reshape(-1)
    if flat_ids.numel() and not torch.compiler.is_compiling() and flat_ids.device.type == "cpu":
        low, high = int(flat_ids.min()), int(flat_ids.max())
        if low < 0 or high >= rows:
            raise IndexError(
                f"nf4.NF4Embedding: ids must be in [0, {rows}), got {low if low < 0 else high}"
            )
    if width % q.block_size:  # blocks cross rows
        return functional.dequantize(q, dtype)[flat_ids].view(*ids.shape, width)
    gathered = QuantizedTensor(
        q.packed.view(rows, -1)[flat_ids].reshape(-1, 1),
        functional.scales(q).view(rows, -1)[flat_ids].reshape(-1),
        None,
        None,
        torch.Size((flat_ids.numel(), width)),
        dtype,
        q.block_size,
        q.format,
    )
    return functional.dequantize(gathered).view(*ids.shape, width)
