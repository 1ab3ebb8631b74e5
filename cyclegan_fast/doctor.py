"""What this machine and this installation can do, and what is missing for what: ``cyclegan-fast doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from cyclegan_fast import roofline
from cyclegan_fast.data.store import default_cache
from cyclegan_fast.device import resolve_device, resolve_precision
from cyclegan_fast.machine import cpu_name, usable_cores
from cyclegan_fast.ops import _launch, _native, _verify
from cyclegan_fast.version import __version__

_PACKAGES = ("numpy", "pillow", "pillow-heif", "pyyaml", "tensorboard", "matplotlib", "tqdm", "triton")


def report() -> str:
    """Versions, devices, available parts and what is missing for what, as lines of text."""
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Measured ceilings": _ceilings(),
        "Training": _training(),
        "Operations": _operations(),
        "Pictures": _pictures(),
        "Folders": _folders(),
    }
    lines: list[str] = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<20} {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


def _versions() -> Iterator[tuple[str, str]]:
    yield "cyclegan_fast", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "torch", f"{torch.__version__}, {cuda}"
    for package in _PACKAGES:
        yield package, _version(package) or "not installed"
    yield "C++ compiler", _tool("c++", "g++", "clang++") or "none: torch.compile on the CPU needs one"
    yield "nvcc", _tool("nvcc") or "none: only needed to build CUDA sources"


def _devices() -> Iterator[tuple[str, str]]:
    yield "CPU", f"{cpu_name()}, {usable_cores()} cores usable, {torch.backends.cpu.get_cpu_capability()}"
    yield (
        "CPU bf16",
        (
            "multiplied in hardware"
            if resolve_precision("auto", torch.device("cpu")) == "bf16"
            else "emulated, slower than fp32: `auto` uses fp32"
        ),
    )
    if not torch.cuda.is_available():
        yield "CUDA", "none: " + _why_no_cuda()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 1e9:.0f} GB"
        precision = resolve_precision("auto", torch.device("cuda", index))
        yield f"cuda:{index}", f"{gpu.name}, {gpu.major}.{gpu.minor}, {memory}, `auto` precision is {precision}"


def measure(device: str) -> str:
    """Measure the ceilings of ``device`` (`auto`, `cpu`, `cuda`, `cuda:N`), keep them, and tell them in one line.

    Raises InputError for a device that is not there.
    """
    resolved = resolve_device(device)
    found = roofline.measure(resolved)
    kept = "" if roofline.measured(resolved) is not None else " (not kept: the cache folder cannot be written to)"
    return f"{resolved}, {found.device}: {found}{kept}"


def _ceilings() -> Iterator[tuple[str, str]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in (torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))):
        found = roofline.measured(device)
        if found is None:
            yield str(device), f"not measured: `cyclegan-fast doctor --measure {device}`"
        else:
            yield str(device), f"{found}, measured {time.strftime('%Y-%m-%d', time.localtime(found.time))}"


def _training() -> Iterator[tuple[str, str]]:
    device = resolve_device("auto")
    yield "device", f"`auto` is {device}, precision `auto` is {resolve_precision('auto', device)}"
    available = dist.is_available()
    backends = [
        name for name, there in (("gloo", available and dist.is_gloo_available()), ("nccl", _has_nccl())) if there
    ]
    yield "several processes", f"torchrun with {' and '.join(backends)}" if backends else "no backend in this torch"
    yield "torch.compile", _compile_state(device)


def _operations() -> Iterator[tuple[str, str]]:
    yield "native, CPU", "built" if _native.available() else f"not built: {_native.why_not()}"
    yield "native, CUDA", "built" if _native.has_cuda() else f"not built: {_native.why_not(cuda=True)}"
    yield "triton kernels", "installed" if _launch.HAS_TRITON else "need triton: pip install triton"
    for row in _verify.report():
        state = {True: "verified", False: "NOT USED", None: "not run"}[row.ok]
        yield f"{row.op}", f"{row.impl} on {row.device}: {state}, {row.detail}"


def _pictures() -> Iterator[tuple[str, str]]:
    from PIL import features

    always = "JPEG, PNG, TIFF, BMP"
    webp = "WebP" if features.check("webp") else ""
    avif = "AVIF" if features.check("avif") else ""
    heic = "HEIC" if _version("pillow-heif") else ""
    yield "formats", ", ".join(part for part in (always, webp, avif, heic) if part)
    for name, there, remedy in (
        ("WebP", webp, "a Pillow with libwebp"),
        ("AVIF", avif, "a Pillow with libavif (11.3 and later have it), or pillow-heif"),
        ("HEIC", heic, "pip install pillow-heif"),
    ):
        if not there:
            yield f"no {name}", f"needs {remedy}"
    yield "colour management", "yes (LittleCMS)" if features.check("littlecms2") else "no: profiles are ignored"


def _folders() -> Iterator[tuple[str, str]]:
    cache = default_cache()
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = f"{shutil.disk_usage(place).free / 1e9:.0f} GB free"
    yield "decoded pictures", f"{cache}, {free}" if os.access(place, os.W_OK) else f"{cache} is not writable"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(*names: str) -> str | None:
    """The first of the programs that is there, with the version line it prints."""
    for name in names:
        if path := shutil.which(name):
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            version = [line for line in text.splitlines() if any(c.isdigit() for c in line)]
            release = next((line for line in version if "release" in line), version[0] if version else "")
            return f"{path}: {release.strip()}"
    return None


def _why_no_cuda() -> str:
    if not torch.version.cuda:
        gpu = "; this machine has an NVIDIA driver: README.md says how to install the CUDA build"
        return "this torch is a build for CPUs" + (gpu if shutil.which("nvidia-smi") else "")
    return "no NVIDIA driver or device found"


def _has_nccl() -> bool:
    return dist.is_available() and dist.is_nccl_available()


def _compile_state(device: torch.device) -> str:
    if device.type == "cuda":
        return "available" if _version("triton") else "needs triton"
    return "available" if _tool("c++", "g++", "clang++") else "needs a C++ compiler"
