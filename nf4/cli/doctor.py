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
from nf4.formats import WEIGHT_FORMATS
from nf4.ops import SCHEMAS

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
        print(f"```text\n{_text(report)}\n```")  # ready to paste into an issue
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
    try:
        got, want = results_of(backend), results_of("reference")
        for op, tensors in want.items():
            for one, other in zip(got[op], tensors, strict=True):
                error = (one.double() - other.double()).norm() / other.double().norm()
                # Both round to bfloat16, each from its own sums; false for NaN as well.
                if not error <= (1e-2 if other.dtype is torch.bfloat16 else 1e-5):
                    return f"{op} is off by {error:.1e} of its norm in {other.dtype}"
    except Exception as error:  # a report, not a crash, is what the user asked for
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "ok"


def results_of(backend: str) -> dict[str, list[torch.Tensor]]:
    """What each op of ``nf4.ops`` gives on a backend for the same small inputs."""
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weight, inputs = random(96, 160), (random(5, 160), random(8, 160), random(96, 8))
    seed = torch.tensor([1234], device=device)
    results: dict[str, list[torch.Tensor]] = {op: [] for op in SCHEMAS}
    with nf4.use_backend(backend):
        for form in WEIGHT_FORMATS:
            single = nf4.quantize(weight, double_quant=False, format=form)
            results["quantize"] += [single.packed, single.absmax]
        q = nf4.quantize(weight)
        results["double_quantize"] += [t for t in q.tensors[1:] if t is not None]
        results["dequantize"].append(nf4.dequantize(q))
        results["dequantize_out"].append(nf4.dequantize(q, out=torch.empty_like(weight)))
        for dtype in (torch.float32, torch.bfloat16):
            x, a, b = (t.to(dtype).clone().requires_grad_() for t in inputs)
            _record(results, "linear", [nf4.linear(x, q)], [x])
            y = nf4.linear_lora(x, q, a, b, 0.5, dropout_p=0.1, seed=seed)
            _record(results, "linear_lora", [y], [x, a, b])
            ys = nf4.linear_lora_group(x, [q, q], [a, a], [b, b], [0.5, 2.0])
            _record(results, "linear_lora_group", list(ys), [x, a, b])
        stepped = torch.nn.Parameter(weight.clone())  # large enough for 8-bit states
        stepped.grad = weight.flip(0)
        optim.AdamW8bit([stepped], lr=0.1).step()
        results["adamw_step"].append(stepped.detach())
    return results


def _record(
    results: dict[str, list[torch.Tensor]],
    op: str,
    outputs: list[torch.Tensor],
    leaves: list[torch.Tensor],
) -> None:
    """Add an op's outputs, and its gradients under the name of its backward."""
    results[op] += [y.detach() for y in outputs]
    sum(y.float().square().sum() for y in outputs).backward()  # type: ignore[union-attr]
    for leaf in leaves:
        assert leaf.grad is not None
        results[f"{op}_backward"].append(leaf.grad)
        leaf.grad = None


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
