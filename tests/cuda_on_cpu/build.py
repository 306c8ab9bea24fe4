"""Compiles csrc/cuda with g++ against the emulation, once per build mode and source content."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Kernel files get the mode's flags; the emulation's own files only the second tuple.
MODES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "asan": (
        ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        ("-O2", "-fsanitize=address"),
    ),
    # libtsan is not linked: checker.cpp defines its hooks.
    "race": (("-O1", "-fsanitize=thread", "-DNF4_RACE_BUILD"), ("-O2",)),
}
COMMON = (
    "-std=c++17", "-g", "-fPIC", "-DNF4_EMULATE", "-ffp-contract=off", "-fno-strict-aliasing",
    "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-psabi",
)  # fmt: skip


def cuda_include() -> Path | None:
    """The folder of cuda_bf16.h, or None."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    if nvcc is not None:
        candidates.append(Path(nvcc).resolve().parent.parent / "include")
    return next((path for path in candidates if (path / "cuda_bf16.h").exists()), None)


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if os.uname().machine != "x86_64":
        return "the emulation switches stacks in x86-64 assembly"
    if shutil.which("g++") is None:
        return "no g++ to build the emulation with"
    if cuda_include() is None:
        return "no CUDA headers to build the emulation with"
    return None


def build(mode: str, plant: str | None = None, kernels: Sequence[Path] | None = None) -> Path:
    """The library of one mode, compiled on first use; ``plant`` defines NF4_PLANT_<name>.

    ``kernels`` are the files to compile, by default all of csrc/cuda.
    """
    kernel_flags, runtime_flags = MODES[mode]
    if kernels is None:
        kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    runtime = sorted(HERE.glob("*.cpp"))
    headers = [
        *(ROOT / "csrc" / "cuda").glob("*.*h"),
        *(ROOT / "csrc" / "include" / "nf4").glob("*.h"),
        *HERE.glob("*.h"),
    ]
    include = [
        *(f"-I{path}" for path in (HERE, ROOT / "csrc" / "include", ROOT / "csrc" / "cuda")),
        f"-isystem{cuda_include()}",
    ]
    cache = ROOT / "build" / "cuda_on_cpu"
    cache.mkdir(parents=True, exist_ok=True)
    shared = b"".join(path.read_bytes() for path in sorted(headers))

    def digest(*parts: bytes) -> str:
        return hashlib.sha256(b"\0".join((shared, *parts))).hexdigest()[:20]

    def with_headers(source: Path) -> str:
        """The text of a file and of all headers that it includes, at any depth."""
        text, left = source.read_text(), headers
        while found := [path for path in left if f'"{path.name}"' in text]:
            text += "".join(path.read_text() for path in found)
            left = [path for path in left if path not in found]
        return text

    def compile_one(source: Path) -> Path:
        own = runtime_flags if source in runtime else kernel_flags
        text = with_headers(source)
        if plant is not None and f"NF4_PLANT_{plant}" in text:
            own = (*own, f"-DNF4_PLANT_{plant}")
        name = digest(source.read_bytes(), " ".join((*COMMON, *own)).encode())
        target = cache / f"{source.stem}-{name}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.part")
            command = ["g++", *COMMON, *own, *include, "-x", "c++", "-c", str(source)]
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*runtime, *kernels]))
    library = cache / f"{mode}-{digest(*(str(path).encode() for path in objects))}.so"
    if not library.exists():
        link = ["-fsanitize=address,undefined"] if mode == "asan" else []
        partial = library.with_suffix(f".{os.getpid()}.part")
        command = ["g++", "-shared", *link, *map(str, objects), "-ldl", "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(library)
    return library


def environment(mode: str) -> dict[str, str]:
    """What a Python process that loads the library of ``mode`` must be started with."""
    if mode != "asan":
        return {}
    # libasan has to come first in the process, and libstdc++ before torch asks it to throw.
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in names
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0"
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options}
