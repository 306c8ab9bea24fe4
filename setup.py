"""Builds the native libraries of csrc/; everything else about the package is in pyproject.toml.

``nf4/_C.abi3.so`` (the CPU kernels) needs a C++17 compiler. Without one the package installs and
runs on the plain-PyTorch reference. ``NF4_SANITIZE=address,undefined`` builds with sanitizers.
``nf4/_C_cuda.abi3.so`` (the CUDA kernels) is built where nvcc is found, for the architectures in
``NF4_CUDA_ARCHS``; ``NF4_BUILD_CUDA=0`` leaves it out.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The stable ABI of torch 2.10: one binary for it and every later version.
TORCH_TARGET = "0x020a000000000000"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
CPU_SOURCES: dict[str, list[str]] = {
    "csrc/torch/bindings_cpu.cpp": [],
    "csrc/torch/bindings_optimizer.cpp": [],
    "csrc/cpu/dispatch.cpp": [],
    "csrc/cpu/isa_portable.cpp": [],
}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_SOURCES |= {
        "csrc/cpu/isa_avx2.cpp": AVX2,
        "csrc/cpu/isa_avx512.cpp": AVX512,
        "csrc/cpu/isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi"],
    }


@dataclass
class Library:
    """One shared object: the compile command of each source, and the link command."""

    name: str  # module name; the file is nf4/<stem>.abi3.so
    compile: dict[str, list[str]]  # source -> command without -c, -o and dependency flags
    link: list[str]  # command without objects and -o
    depends: list[str] = field(default_factory=list)  # globs, for the sdist

    def extension(self) -> Extension:
        """What setuptools needs to know."""
        return Extension(
            self.name, sources=list(self.compile), depends=self.depends, py_limited_api=True
        )


def skip(what: str, why: str) -> None:
    """Say in one line that a library is left out."""
    print(f"nf4: {what} not built: {why}", file=sys.stderr)


def cpp_compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, or the first that is there; None where there is none."""
    chosen = os.environ.get("CXX", "").split()
    found = chosen or next(([c] for c in ("g++", "clang++", "c++") if shutil.which(c)), [""])
    return found if shutil.which(found[0]) else None


def torch_paths() -> tuple[list[str], Path] | None:
    """Include directories and library directory of the installed torch, if there is one."""
    try:
        import torch
    except ImportError:
        return None
    base = Path(torch.__file__).resolve().parent
    return [str(base / "include"), str(base / "include/torch/csrc/api/include")], base / "lib"


def cpu_library() -> Library | None:
    """The CPU kernels and their bindings; None where they cannot be built."""
    what = "the native CPU kernels (nf4._C)"
    if sys.platform != "linux":
        return skip(what, f"they are for Linux, this is {sys.platform}; the reference is used")
    compiler = cpp_compiler()
    if compiler is None:
        return skip(what, "no C++ compiler (install g++ or set CXX); the reference is used")
    torch = torch_paths()
    if torch is None:
        return skip(what, "torch is not importable (pip install --no-build-isolation)")
    includes, libraries = torch
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # Bit-exact (de)quantization: `code * scale + offset` is two roundings. gcc 12 also warns
    # wrongly about its own AVX-512 headers.
    flags += ["-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-pthread", f"-I{ROOT / 'csrc/include'}"]
    flags += [f"-isystem{path}" for path in includes]
    link = [*compiler, "-shared", "-pthread", f"-L{libraries}", "-ltorch_cpu"]
    sanitizers = os.environ.get("NF4_SANITIZE")
    if sanitizers:
        extra = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"]
        flags += extra
        link += extra
    return Library(
        "nf4._C",
        {src: [*compiler, *flags, *isa] for src, isa in CPU_SOURCES.items()},
        link,
        ["csrc/cpu/*", "csrc/torch/*.h", "csrc/include/nf4/*"],
    )


# What QLoRA users own: T4 (float16), A100, RTX 30, RTX 40 and L4, H100 and H200, B200, RTX 50.
CUDA_ARCHS = "75;80;86;89;90a;100;120"


def cuda_library() -> Library | None:
    """The CUDA kernels and their bindings; None where they cannot or shall not be built."""
    what = "the CUDA kernels (nf4._C_cuda)"
    if os.environ.get("NF4_BUILD_CUDA") == "0":
        return skip(what, "NF4_BUILD_CUDA=0")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return skip(what, "no nvcc on PATH")
    compiler = cpp_compiler()
    if compiler is None:
        return skip(what, "no C++ compiler for nvcc (install g++ or set CXX)")
    torch = torch_paths()
    if torch is None:
        return skip(what, "torch is not importable (pip install --no-build-isolation)")
    includes, libraries = torch
    # nvcc on PATH may be a link or a script: the toolkit is where its runtime library is.
    homes = [os.environ.get("CUDA_HOME", ""), str(Path(nvcc).resolve().parent.parent)]
    places = [Path(home) / lib for home in [*homes, "/usr/local/cuda"] for lib in ("lib64", "lib")]
    runtime = next((d for d in places if (d / "libcudart_static.a").exists()), None)
    if runtime is None:
        return skip(what, "no libcudart_static.a beside nvcc (set CUDA_HOME)")
    toolkit = runtime.parent
    archs = (os.environ.get("NF4_CUDA_ARCHS") or CUDA_ARCHS).replace(",", ";").strip(";")
    # Bit-exact (de)quantization: no contraction to fma; kernels call fmaf where they want one.
    kernel = [nvcc, "-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    kernel += ["--threads=1", f"-I{ROOT / 'csrc/include'}"]
    kernel += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs.split(";")]
    if "90a" in archs.split(";"):
        kernel.append("-DNF4_SM90A")  # wgmma is in sm_90a, not in sm_90
    binding = [*compiler, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
    binding += [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f"-DNF4_CUDA_ARCHS={archs.replace(';', '_')}",
    ]
    binding += [f"-I{ROOT / 'csrc/include'}", f"-isystem{toolkit / 'include'}"]
    binding += [f"-isystem{path}" for path in includes]
    sources = {
        f"csrc/torch/{name}.cpp": binding for name in ("bindings_cuda", "bindings_cuda_optimizer")
    }
    sources |= {
        path.relative_to(ROOT).as_posix(): kernel
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    }
    # The runtime is linked in: the library then needs no CUDA toolkit of a certain version.
    link = [*compiler, "-shared", "-pthread", f"-L{runtime}", f"-L{libraries}"]
    link += ["-ltorch_cpu", "-lcudart_static", "-ldl", "-lrt"]
    depends = ["csrc/cuda/*", "csrc/torch/*.h", "csrc/include/nf4/*"]
    return Library("nf4._C_cuda", sources, link, depends)


def run(commands: list[list[str]]) -> None:
    """Run independent commands on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda c: subprocess.run(c, cwd=ROOT), commands):
            if result.returncode:
                raise SystemExit(f"nf4: command failed: {' '.join(result.args)}")


def run_ninja(ninja: str, steps: list[tuple[str, Path, list[str]]], directory: Path) -> None:
    """Compile what has changed, headers included."""
    lines = ["rule cc", "  command = $cmd -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d"]
    lines += ["  deps = gcc"]
    for source, target, command in steps:
        lines += [f"build {target}: cc {ROOT / source}", f"  cmd = {' '.join(command)}"]
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([ninja, "-C", str(directory)], check=True)


class BuildNative(build_ext):
    """Compiles each source with its own flags, which setuptools has no way to say."""

    def build_extension(self, ext: Extension) -> None:
        library = LIBRARIES[ext.name]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        variant = "-sanitized" if os.environ.get("NF4_SANITIZE") else ""
        directory = (ROOT / self.build_temp / (ext.name + variant)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        steps = [
            (source, directory / (Path(source).name + ".o"), command)
            for source, command in library.compile.items()
        ]
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja:
            run_ninja(ninja, steps, directory)
        else:
            run([[*c, "-c", str(ROOT / source), "-o", str(o)] for source, o, c in steps])
        objects = [str(o) for _, o, _ in steps]
        run([[library.link[0], *objects, *library.link[1:], "-o", str(target)]])

    def copy_extensions_to_source(self) -> None:
        """Put the libraries into nf4/ by renaming: a process may have the old one mapped."""
        for ext in self.extensions:
            target = ROOT / self.get_ext_filename(ext.name)
            fresh = target.with_name(target.name + ".new")
            shutil.copyfile(Path(self.build_lib) / self.get_ext_filename(ext.name), fresh)
            fresh.chmod(0o755)
            os.replace(fresh, target)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"


_kernels = ROOT / "nf4" / "kernels"
if not (_kernels.is_symlink() or _kernels.is_dir()):
    raise SystemExit(
        "nf4: nf4/kernels must be a link to ../kernels (or, in an sdist, a directory); git writes "
        "a text file instead where core.symlinks is false: set it to true and check out again"
    )

LIBRARIES = {lib.name: lib for lib in (cpu_library(), cuda_library()) if lib is not None}

setup(
    ext_modules=[library.extension() for library in LIBRARIES.values()],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIBRARIES else {},
)
