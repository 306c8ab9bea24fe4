"""``nf4 doctor``: what this machine can run, what is missing, and what that costs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

import nf4
from nf4 import backends, optim
from nf4.backends import tuning_table
from nf4.cli.parser import Parser

# What a person loses without each part.
NO_GPU = "everything runs on the CPU"
BACKEND_COSTS = {
    "cpu": "CPU tensors run on the reference: exact, but many times slower, and it materialises W",
    "cuda": "CUDA tensors run on the Triton kernels",
    "triton": "CUDA tensors without the CUDA library run on the reference: slow, materialises W",
    "reference": "",
}
_HF = "pip install 'nf4[hf]'"
_CLI = "pip install 'nf4[cli]'"
PACKAGE_COSTS = {
    "torch": "nf4 needs it",
    "numpy": "nf4 needs it",
    "safetensors": "nf4 needs it",
    "triton": "no Triton kernels; torch.compile cannot make GPU code",
    "transformers": f"no loading of Hugging Face models, no commands but bench and doctor: {_HF}",
    "peft": f"no PEFT adapters over quantized models; nf4's own LoRA layers work: {_HF}",
    "accelerate": f"no Trainer and no device_map: {_HF}",
    "datasets": f"nf4 finetune and eval read no data: {_HF}",
    "trl": f"no nf4 finetune: {_CLI}",
    "rich": f"no nf4 demo: {_CLI}",
    "matplotlib": f"no nf4 demo, no loss curves and no bars of a benchmark: {_CLI}",
    "bitsandbytes": "nf4 bench and the tests compare with nothing; otherwise nf4 takes its place",
}
COMPILER_COSTS = {
    "c++": "the native CPU kernels cannot be built here",
    "nvcc": "the CUDA kernels cannot be built here",
    "ninja": "a build compiles every source anew",
}


def main(arguments: list[str]) -> int:
    parser = Parser("nf4 doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(arguments)
    report = collect()
    failed = any(result != "ok" for result in report["self-test"].values())
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(_text(report))
    return 1 if failed else 0


def collect() -> dict[str, Any]:
    """The whole report."""
    status = nf4.available_backends()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "nf4": nf4.__version__,
        "system": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpu": _cpu_name(),
            "cpu kernels": backends.cpu.isa() or "none",
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "packages": {name: _version(name) for name in PACKAGE_COSTS},
        "compilers": {name: _compiler(name) for name in COMPILER_COSTS},
        "backends": {
            name: {"usable": s.usable, "reason": s.reason, "cost": "" if s else _cost(name, gpus)}
            for name, s in status.items()
        },
        "defaults": {
            device: backends.backend_for(torch.device(device))
            for device in ("cpu", "cuda")
            if device == "cpu" or torch.cuda.is_available()
        },
        "tuning tables": {name: tuning_table.status(name) for name in gpus},
        "self-test": {name: self_test(name) for name, s in status.items() if s},
    }


def self_test(backend: str) -> str:
    """Run every op on a small weight and compare with the reference: "ok", or what went wrong."""
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 160, generator=generator).to(device)
    x = torch.randn(5, 160, generator=generator).to(device)
    lora_a = torch.randn(8, 160, generator=generator).to(device)
    lora_b = torch.randn(96, 8, generator=generator).to(device)
    seed = torch.tensor([1234], device=device)

    def compute(name: str) -> list[torch.Tensor]:
        inputs = tuple(t.clone().requires_grad_() for t in (x, lora_a, lora_b))
        leaf_x, leaf_a, leaf_b = inputs
        with nf4.use_backend(name):
            q = nf4.quantize(weight)
            y = nf4.linear_lora(leaf_x, q, leaf_a, leaf_b, 0.5, dropout_p=0.1, seed=seed)
            y.square().sum().backward()
            results = [q.packed, q.absmax, nf4.dequantize(q), nf4.linear(x, q), y.detach()]
            stepped = torch.nn.Parameter(weight.clone())  # large enough for 8-bit states
            stepped.grad = weight.flip(0)
            optim.AdamW8bit([stepped], lr=0.1).step()
            results.append(stepped.detach())
        return results + [t.grad for t in inputs if t.grad is not None]

    try:
        for got, want in zip(compute(backend), compute("reference"), strict=True):
            error = (got.double() - want.double()).norm() / want.double().norm()
            if not error <= 1e-5:  # float32 throughout; also false for NaN
                return f"a result is off by {error:.1e} of its norm"
    except Exception as error:  # a report, not a crash, is what the user asked for
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "ok"


def _text(report: dict[str, Any]) -> str:
    lines = [f"nf4 {report['nf4']}"]
    costs = {"system": {}, "packages": PACKAGE_COSTS, "compilers": COMPILER_COSTS}
    for section, cost in costs.items():
        lines.append(f"\n{section}")
        for name, value in report[section].items():
            shown = (", ".join(value) or "none") if isinstance(value, list) else value
            lines.append(f"  {name:14} {shown or f'missing: {cost[name]}'}")
    lines.append("\nbackends")
    for name, entry in report["backends"].items():
        if entry["usable"]:
            lines.append(f"  {name:14} usable, self-test: {report['self-test'][name]}")
        else:
            lines.append(f"  {name:14} not usable: {entry['reason']}")
            if entry["cost"]:
                lines.append(f"  {'':14} cost: {entry['cost']}")
    for device, name in report["defaults"].items():
        lines.append(f"  {device} tensors run on: {name}")
    for name, text in report["tuning tables"].items():
        lines.append(f"  tuning table of {name}: {text}")
    return "\n".join(lines)


def _cost(backend: str, gpus: list[str]) -> str:
    return BACKEND_COSTS[backend] if gpus or backend == "cpu" else NO_GPU


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compiler(name: str) -> str:
    beside_python = os.path.dirname(sys.executable)
    path = shutil.which(name) or shutil.which(name, path=beside_python)
    if path is None:
        return ""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    # nvcc prints its copyright first and its release later.
    return next((line for line in lines if "release" in line), lines[0] if lines else path)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
