"""Each op once at small ragged shapes: what a memory checker runs under.

``python -m benchmarks.gpu_smoke [cuda | triton]``; every usable GPU backend if none is named.
"""

from __future__ import annotations

import sys

import torch

import nf4


def _run(backend: str) -> None:
    device = torch.device("cuda")
    with nf4.use_backend(backend):
        # Blocks of 32 send many tokens through dequantized weights, forward and backward; k = 136
        # sends few through float32.
        shapes = ((96, 136, 1, 64), (128, 256, 17, 64), (200, 320, 130, 64), (136, 128, 90, 32))
        for n, k, m, block_size in shapes:
            w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
            q = nf4.quantize(w, block_size=block_size)
            nf4.dequantize(q)
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16, requires_grad=True)
            a = torch.randn(16, k, device=device, requires_grad=True)
            b = torch.randn(n, 16, device=device, requires_grad=True)
            nf4.linear(x, q).sum().backward()
            nf4.linear_lora(x, q, a, b, 2.0, dropout_p=0.1).sum().backward()
            ys = nf4.linear_lora_group(x, [q, q], [a, a], [b, b], [2.0, 2.0])
            sum(y.sum() for y in ys).backward()
            a.grad = torch.randn_like(a)
            nf4.optim.AdamW8bit([a]).step()
    torch.cuda.synchronize()
    print(f"{backend}: every op ran")


def main() -> int:
    if not torch.cuda.is_available():
        print("benchmarks.gpu_smoke: needs a CUDA device, torch sees none", file=sys.stderr)
        return 1
    for name in sys.argv[1:] or ("cuda", "triton"):
        status = nf4.available_backends()[name]
        if status:
            _run(name)
        else:
            print(f"{name}: {status.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
