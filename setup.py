"""Build script: the native operations in csrc/. Everything else about the package stands in pyproject.toml.

The native parts are optional. They are built where a C++ compiler and the headers of an installed torch are found, so
not in pip's isolated builds, which have no torch; the CUDA part where nvcc is found as well. `make native`, that is
`python setup.py build_ext --inplace`, builds them beside the sources at any time. They use torch's stable ABI and no
Python, so that one build serves every torch from 2.11 and every Python.

CYCLEGAN_FAST_NATIVE       0: do not build; 1: fail if they cannot be built. Otherwise: build if possible.
CYCLEGAN_FAST_CUDA         the same for the CUDA part.
CYCLEGAN_FAST_CUDA_ARCHS   compute capabilities, for example "80;90"; the last one also as code for later ones.
CXX, NVCC                  the compilers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
CPU = "cyclegan_fast._C"
CUDA = "cyclegan_fast._C_cuda"
# The oldest torch whose stable ABI the sources use: 2.11.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma"]
# The warning is about GCC 12's own header; the other instruction sets compile the same source with it.
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mprefer-vector-width=512",
    "-Wno-uninitialized",
]
# Flags of the files that only machines with the instruction set run.
INSTRUCTION_SETS = {
    "instance_norm_portable.cpp": [],
    "instance_norm_avx2.cpp": AVX2,
    "instance_norm_avx512.cpp": AVX512,
    "instance_norm_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "conv_portable.cpp": [],
    "conv_avx2.cpp": AVX2,
    "conv_avx512.cpp": AVX512,
}
CPU_SOURCES = ["bindings_cpu.cpp", "bindings_conv.cpp", "instance_norm_cpu.cpp", "conv_cpu.cpp", "crop_flip_cpu.cpp"]
CUDA_SOURCES = ["bindings_cuda.cpp", "instance_norm_cuda.cu"]


def say(text: str) -> None:
    print(f"cyclegan_fast: {text}", file=sys.stderr, flush=True)


def torch_folder() -> Path | None:
    """Where torch is installed, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def compiler() -> str | None:
    named = os.environ.get("CXX")
    return named or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def cuda_compiler() -> str | None:
    named = os.environ.get("NVCC") or shutil.which("nvcc")
    if named:
        return named
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=str(Path(home) / "bin"))


def missing_for_cpu() -> str | None:
    if sys.platform == "win32":
        return "they are written for GCC and Clang, not for Windows"
    folder = torch_folder()
    if folder is None:
        return "torch is not importable here (pip builds in isolation); install torch, then run `make native`"
    if not (folder / "include/torch/csrc/stable/ops.h").is_file():
        return f"torch in {folder} has no headers of the stable ABI; torch 2.11 or later is needed"
    if compiler() is None:
        return "there is no C++ compiler (c++, g++ or clang++; CXX names another one)"
    return None


def wanted(variable: str, what: str, missing: str | None) -> bool:
    """Whether to build a part; says why not. Exits where it is demanded and cannot be built."""
    choice = os.environ.get(variable, "")
    if choice == "0":
        say(f"{what} left out, as {variable}=0 asks")
        return False
    if missing is None:
        return True
    if choice == "1":
        sys.exit(f"cyclegan_fast: {variable}=1, but {what} cannot be built: {missing}")
    say(f"{what} not built: {missing}. Everything works without, more slowly.")
    return False


def extensions() -> list[Extension]:
    if not wanted("CYCLEGAN_FAST_NATIVE", "native operations", missing_for_cpu()):
        return []
    sources = [*CPU_SOURCES, "instance_norm_portable.cpp", "conv_portable.cpp"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        sources = [*CPU_SOURCES, *INSTRUCTION_SETS]
    result = [Extension(CPU, [str(CSRC / name) for name in sources], optional=True)]
    missing = None if cuda_compiler() else "there is no nvcc (on PATH, below CUDA_HOME, or named by NVCC)"
    if wanted("CYCLEGAN_FAST_CUDA", "CUDA operations", missing):
        result.append(Extension(CUDA, [str(CSRC / name) for name in CUDA_SOURCES], optional=True))
    return result


class BuildNative(build_ext):
    """Compiles several files at a time, each with the flags of its instruction set, into libraries without Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        demanded = os.environ.get("CYCLEGAN_FAST_CUDA" if ext.name.endswith("cuda") else "CYCLEGAN_FAST_NATIVE") == "1"
        try:
            self._build(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if demanded:
                raise
            say(f"{ext.name} not built: {error}. Everything works without, more slowly.")

    def _build(self, ext: Extension) -> None:
        temporary = Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.parallel or os.cpu_count() or 1) as pool:
            objects = list(pool.map(lambda source: compile_one(source, temporary), sorted(ext.sources, key=_slow_last)))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: a process may have the old library mapped.
        fresh = library.with_suffix(".new")
        subprocess.run(link_command(ext, objects, fresh), check=True)
        fresh.replace(library)
        say(f"built {library}")


def _slow_last(source: str) -> bool:
    return not source.endswith(".cu") and "bindings" not in source


def compile_one(source: str, folder: Path) -> str:
    """Compiles a source file unless its object is newer than everything in csrc/ and came of the same command."""
    command = compile_command(source)
    mark = hashlib.sha256(shlex.join(command).encode()).hexdigest()[:8]
    target = folder / f"{Path(source).stem}-{mark}.o"
    inputs = [path for path in (ROOT / CSRC).iterdir() if path.is_file()]
    if not target.is_file() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        subprocess.run([*command, "-c", source, "-o", str(target)], check=True, cwd=ROOT)
    return str(target)


def compile_command(source: str) -> list[str]:
    name = Path(source).name
    include = ["-isystem", str((torch_folder() or ROOT) / "include")]
    if name.endswith(".cu"):
        host = ",".join(flag for flag in COMMON if flag.startswith("-f"))
        return [
            str(cuda_compiler()),
            "-O3",
            "-std=c++17",
            "--expt-relaxed-constexpr",
            *architectures(),
            "-Xcompiler",
            host,
        ]
    command = [*shlex.split(str(compiler())), *COMMON, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    if name in INSTRUCTION_SETS:
        return [*command, "-ffp-contract=fast", *INSTRUCTION_SETS[name]]
    return [*command, TARGET, *(["-DUSE_CUDA"] if "cuda" in name else []), *include]


def architectures() -> list[str]:
    names = os.environ.get("CYCLEGAN_FAST_CUDA_ARCHS", "80;90").replace(".", "").replace(",", ";").split(";")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names if name]
    last = [name for name in names if name][-1]
    if last.isdigit():
        flags.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    return flags


def link_command(ext: Extension, objects: list[str], target: Path) -> list[str]:
    libraries = str((torch_folder() or ROOT) / "lib")
    # torch is loaded before these libraries are, so that its own need no path here.
    torch = ["-L" + libraries, "-ltorch_cpu"]
    if ext.name == CUDA:
        # libtorch is what brings libtorch_cuda, where there is one; nothing else here needs it by name.
        torch = ["-Xlinker", "--no-as-needed", "-L" + libraries, "-ltorch", "-ltorch_cpu"]
        return [str(cuda_compiler()), "-shared", "-cudart", "static", *objects, "-o", str(target), *torch]
    flags = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--no-undefined"]
    return [*shlex.split(str(compiler())), "-shared", *objects, "-o", str(target), *torch, *flags]


class AnyPython(bdist_wheel):
    """The libraries hold no Python: a wheel with them is tied to the machine alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython})
