"""The ops of nf4/ops.py on CPU tensors by the emulated CUDA kernels: a backend for tests.

The calls mirror csrc/torch/bindings_cuda.cpp: allocate outputs and workspace, call a launcher. A
launcher's failure, and every defect that the emulation reports, raises.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable, Sequence
from ctypes import byref, c_double, c_int32, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Weight(ctypes.Structure):
    """nf4_weight of csrc/cuda/api.h."""

    _fields_ = [
        ("packed", c_void_p),
        ("absmax", c_void_p),
        ("nested_absmax", c_void_p),
        ("offset", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("block_size", c_int32),
        ("format", c_int32),
    ]


class Lora(ctypes.Structure):
    """nf4_lora of csrc/cuda/api.h."""

    _fields_ = [
        ("a", c_void_p),
        ("b", c_void_p),
        ("seed", c_void_p),
        ("scaling", c_double),
        ("dropout_p", c_double),
        ("r", c_int64),
        ("dtype", c_int32),
    ]


class Member(ctypes.Structure):
    """nf4_member of csrc/cuda/api.h."""

    _fields_ = [
        ("weight", Weight),
        ("bias", c_void_p),
        ("lora", Lora),
        ("y", c_void_p),
        ("s", c_void_p),
    ]


class Library:
    """One build of the emulated kernels."""

    def __init__(self, path: Path, mode: str) -> None:
        self._c = ctypes.CDLL(str(path))
        self._c.nf4_emulation_reports.restype = ctypes.c_char_p
        self._race = mode == "race"
        # "<multiprocessors>:<compute capability>" of the device that launchers see, and
        # ":no tensor maps" for a driver that encodes none.
        device = os.environ.get("NF4_EMULATED_DEVICE", "6:90").split(":")
        seed = int(os.environ.get("NF4_EMULATED_SEED", random.randrange(8)))
        print(f"CUDA emulation: {mode}, schedule seed {seed}, device {device}")
        self.configure(seed, int(device[0]), int(device[1]), len(device) == 2)

    def configure(
        self, seed: int, multiprocessors: int, compute_capability: int, tensor_maps: bool
    ) -> None:
        """Seed of the thread schedule (0: round robin, odd: warp-greedy) and the fake device."""
        self._c.nf4_emulation_configure(
            ctypes.c_uint64(seed), multiprocessors, compute_capability, int(tensor_maps)
        )

    def size(self, name: str, *args: Any) -> int:
        """A workspace query."""
        function = getattr(self._c, f"nf4_cuda_{name}_workspace")
        function.restype = c_size_t
        return int(function(*args))

    def call(self, name: str, *args: Any, reads: Sequence, writes: Sequence) -> None:
        """Call a launcher; ``reads`` and ``writes`` are all the tensors that it may touch."""
        if self._race:
            for tensors, writable in ((reads, 0), (writes, 1)):
                for t in tensors:
                    if t is not None and t.numel():
                        size = c_size_t(t.numel() * t.element_size())
                        self._c.nf4_emulation_register(_pointer(t), size, writable)
        status = getattr(self._c, f"nf4_cuda_{name}")(*args)
        reports = self._c.nf4_emulation_reports().decode()
        if self._race:
            self._c.nf4_emulation_forget()
        if reports:
            raise AssertionError(f"nf4_cuda_{name} under emulation:\n{reports}")
        if status == 801:
            raise NotImplementedError(f"nf4_cuda_{name}: dtype or format not supported")
        if status != 0:
            raise AssertionError(f"nf4_cuda_{name}: status {status}")


def _pointer(t: Tensor | None) -> c_void_p:
    return c_void_p(None if t is None or t.numel() == 0 else t.data_ptr())


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


class Ops:
    """One function for each op of nf4/ops.py, with its arguments."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def _weight(self, parts: tuple, n: int, k: int, block_size: int, format: int) -> Weight:
        return Weight(*(_pointer(t) for t in parts), n, k, block_size, format)

    def quantize(self, x: Tensor, block_size: int, format: int) -> tuple[Tensor, Tensor]:
        x = x.detach().contiguous()
        n = x.numel()
        packed = torch.empty(n if format >= 2 else (n + 1) // 2, 1, dtype=torch.uint8)
        absmax = torch.empty(-(-n // block_size))
        self.library.call(
            "quantize", _pointer(x), DTYPES[x.dtype], c_int64(n), block_size, format,
            _pointer(packed), _pointer(absmax), None, reads=[x], writes=[packed, absmax],
        )  # fmt: skip
        return packed, absmax

    def double_quantize(self, absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        absmax = absmax.contiguous()
        n = absmax.numel()
        codes = torch.empty_like(absmax, dtype=torch.uint8)
        nested, offset = torch.empty(-(-n // 256)), torch.empty(())
        work = _workspace(self.library.size("double_quantize", c_int64(n)))
        self.library.call(
            "double_quantize", _pointer(absmax), c_int64(n), _pointer(codes), _pointer(nested),
            _pointer(offset), _pointer(work), None,
            reads=[absmax], writes=[codes, nested, offset, work],
        )  # fmt: skip
        return codes, nested, offset

    def dequantize(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        shape: list[int],
        block_size: int,
        format: int,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        self.dequantize_out(packed, absmax, nested_absmax, offset, block_size, format, out)
        return out

    def dequantize_out(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        block_size: int,
        format: int,
        out: Tensor,
    ) -> None:
        parts = (packed, absmax, nested_absmax, offset)
        weight = self._weight(parts, 0, 0, block_size, format)
        dense = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
        self.library.call(
            "dequantize", byref(weight), c_int64(out.numel()), _pointer(dense),
            DTYPES[out.dtype], None, reads=parts, writes=[dense],
        )  # fmt: skip
        if dense is not out:
            out.copy_(dense)

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        n: int,
        block_size: int,
        format: int,
    ) -> Tensor:
        x = x.contiguous()
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        k = x.shape[-1]
        m = x.numel() // k
        parts = (packed, absmax, nested_absmax, offset)
        weight = self._weight(parts, n, k, block_size, format)
        y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
        work = _workspace(self.library.size("linear", byref(weight), c_int64(m), DTYPES[x.dtype]))
        self.library.call(
            "linear", _pointer(x), byref(weight), _pointer(bias), _pointer(y), c_int64(m),
            DTYPES[x.dtype], _pointer(work), None, reads=[x, *parts, bias], writes=[y, work],
        )  # fmt: skip
        return y

    def linear_backward(
        self,
        grad_y: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        k: int,
        block_size: int,
        format: int,
    ) -> Tensor:
        grad_y = grad_y.contiguous()
        n = grad_y.shape[-1]
        m = grad_y.numel() // n
        dtype = DTYPES[grad_y.dtype]
        parts = (packed, absmax, nested_absmax, offset)
        weight = self._weight(parts, n, k, block_size, format)
        dx = torch.empty(*grad_y.shape[:-1], k, dtype=grad_y.dtype)
        work = _workspace(self.library.size("linear_backward", byref(weight), c_int64(m), dtype))
        self.library.call(
            "linear_backward", _pointer(grad_y), byref(weight), _pointer(dx), c_int64(m), dtype,
            _pointer(work), None, reads=[grad_y, *parts], writes=[dx, work],
        )  # fmt: skip
        return dx

    def linear_lora(
        self,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        n: int,
        block_size: int,
        format: int,
    ) -> tuple[Tensor, Tensor]:
        x, a, b = x.contiguous(), lora_a.contiguous(), lora_b.contiguous()
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        k, r = x.shape[-1], a.shape[0]
        m = x.numel() // k
        dtype = DTYPES[x.dtype]
        parts = (packed, absmax, nested_absmax, offset)
        weight = self._weight(parts, n, k, block_size, format)
        lora = Lora(
            _pointer(a), _pointer(b), _pointer(seed), scaling, dropout_p, r, DTYPES[a.dtype]
        )
        y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
        s = torch.empty(*x.shape[:-1], r)
        size = self.library.size("linear_lora", byref(weight), byref(lora), c_int64(m), dtype)
        work = _workspace(size)
        self.library.call(
            "linear_lora", _pointer(x), byref(weight), _pointer(bias), byref(lora), _pointer(y),
            _pointer(s), c_int64(m), dtype, _pointer(work), None,
            reads=[x, *parts, bias, a, b, seed], writes=[y, s, work],
        )  # fmt: skip
        return y, s

    def linear_lora_group(
        self,
        x: Tensor,
        packed: list[Tensor],
        absmax: list[Tensor],
        nested_absmax: list[Tensor | None],
        offset: list[Tensor | None],
        bias: list[Tensor | None],
        lora_a: list[Tensor],
        lora_b: list[Tensor],
        scaling: list[float],
        dropout_p: float,
        seeds: Tensor | None,
        block_size: int,
        format: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        x, k, count = x.contiguous(), x.shape[-1], len(packed)
        m, dtype = x.numel() // k, DTYPES[x.dtype]
        reads, ys, ss = [x, seeds], [], []
        members = (Member * count)()
        for i in range(count):
            parts = (packed[i], absmax[i], nested_absmax[i], offset[i])
            a, b = lora_a[i].contiguous(), lora_b[i].contiguous()
            added = bias[i] if bias[i] is None else bias[i].to(x.dtype).contiguous()
            seed = None if seeds is None else seeds[i : i + 1]
            ys.append(torch.empty(*x.shape[:-1], b.shape[0], dtype=x.dtype))
            ss.append(torch.empty(*x.shape[:-1], a.shape[0]))
            lora = Lora(
                _pointer(a), _pointer(b), _pointer(seed), scaling[i], dropout_p, a.shape[0],
                DTYPES[a.dtype],
            )  # fmt: skip
            weight = self._weight(parts, b.shape[0], k, block_size, format)
            members[i] = Member(weight, _pointer(added), lora, _pointer(ys[i]), _pointer(ss[i]))
            reads += [*parts, a, b, added]
        size = self.library.size("linear_lora_group", members, count, c_int64(m), dtype)
        work = _workspace(size)
        self.library.call(
            "linear_lora_group", _pointer(x), members, count, c_int64(m), dtype, _pointer(work),
            None, reads=reads, writes=[*ys, *ss, work],
        )  # fmt: skip
        return ys, ss

    def linear_lora_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        s: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        block_size: int,
        format: int,
        needs_dx: bool,
        needs_dab: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_y, x, s = grad_y.contiguous(), x.contiguous(), s.contiguous()
        a, b = lora_a.contiguous(), lora_b.contiguous()
        k, n, r = x.shape[-1], grad_y.shape[-1], a.shape[0]
        m = x.numel() // k
        dtype = DTYPES[x.dtype]
        parts = (packed, absmax, nested_absmax, offset)
        weight = self._weight(parts, n, k, block_size, format)
        lora = Lora(
            _pointer(a), _pointer(b), _pointer(seed), scaling, dropout_p, r, DTYPES[a.dtype]
        )
        dx = torch.empty(x.shape if needs_dx else (0,), dtype=x.dtype)
        da = torch.empty(a.shape if needs_dab else (0,), dtype=a.dtype)
        db = torch.empty(b.shape if needs_dab else (0,), dtype=b.dtype)
        size = self.library.size(
            "linear_lora_backward", byref(weight), byref(lora), c_int64(m), dtype
        )
        work = _workspace(size)
        self.library.call(
            "linear_lora_backward", _pointer(grad_y), _pointer(x), _pointer(s), byref(weight),
            byref(lora), _pointer(dx), _pointer(da), _pointer(db), c_int64(m), dtype,
            _pointer(work), None,
            reads=[grad_y, x, s, *parts, a, b, seed], writes=[dx, da, db, work],
        )  # fmt: skip
        return dx, da, db


def install(path: Path, mode: str) -> Library:
    """Make the backend "cuda" run on CPU tensors by the emulated kernels, in this process."""
    from cuda_on_cpu.emulated_optimizer import adamw_step

    from nf4.backends import cuda
    from nf4.ops import SCHEMAS

    library = Library(path, mode)
    ops = Ops(library)
    cuda.adamw_step = partial(adamw_step, library)
    for op in SCHEMAS:
        implementation: Callable | None = getattr(ops, op, None)
        if implementation is not None:
            setattr(cuda, op, implementation)
    on_device = cuda.unsupported
    cuda.unsupported = lambda device: None if device.type == "cpu" else on_device(device)
    return library


def pytest_configure() -> None:
    """As a pytest plugin: install the build that NF4_EMULATED names, "<mode>:<path>"."""
    mode, _, path = os.environ["NF4_EMULATED"].partition(":")
    install(Path(path), mode)
