"""What a device can do at most, measured: the rate of large matrix products and the rate of copying memory.

They are the ceilings that `training.monitor` compares a run with. `measure` takes them, within about 10 seconds on a
CPU and 5 on a GPU, and keeps them in the user's cache folder, under the device, driver and torch they were taken with;
`measured` reads them there. ``cyclegan-fast doctor --measure`` does the former, a training run the latter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cyclegan_fast.atomic import replacing
from cyclegan_fast.data.store import default_cache
from cyclegan_fast.machine import cpu_name, usable_cores

__all__ = ["Roofline", "measure", "measured"]

_FORMAT = 1  # part of the key: raise it when the figures change their meaning
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Sides of the matrices tried, until one product takes long enough for its rate not to grow any more.
_SIDES = (512, 1024, 2048, 4096, 8192)
_LONG_ENOUGH = {"cpu": 0.03, "cuda": 0.001}
_SECONDS = {"cpu": 1.0, "cuda": 0.4}  # of repetitions for each figure
_REPEATS = (5, 200)  # at least, at most
_COPY_BYTES = 256 * 2**20  # beyond the last cache of a GPU and of the share of a CPU that one machine gets


@dataclass(frozen=True)
class Roofline:
    """The ceilings of one device, and what they were measured with."""

    device: str
    """Name for people: `NVIDIA H200`."""
    matrix: dict[str, float]
    """FLOP/s (2 x MAC) of a large matrix product, by resolved precision: fp32, tf32 (CUDA), bf16, fp16."""
    copy: float
    """Bytes/s of a copy in the device's memory, read and written bytes both counted."""
    environment: dict[str, Any]
    """Device, driver and torch; the name of a CPU says how many cores were used."""
    time: float
    """When, in seconds since 1970."""

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {_figure(rate / 1e12)}" for name, rate in self.matrix.items())
        return f"{rates} TFLOP/s, copy {_figure(self.copy / 1e9)} GB/s"


def _figure(value: float) -> str:
    """Three digits of a small number, all before the point of a large one."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def measured(device: torch.device) -> Roofline | None:
    """What `measure` found on this device with this driver and torch, or None if it was never run."""
    environment = _environment(device)
    try:
        kept = Roofline(**json.loads(_file(environment).read_text(encoding="utf-8")))
        whole = kept.environment == environment and kept.copy > 0 and all(rate > 0 for rate in kept.matrix.values())
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or damaged: then it is not known
        return None
    return kept if whole else None


def measure(device: torch.device) -> Roofline:
    """Measure `device`, which should have nothing else to do, and keep the result for `measured`.

    A precision that the device or this torch cannot multiply in is left out. A cache folder that cannot be written to
    costs the result only its being kept. Changes no setting of torch for longer than it runs.
    """
    environment = _environment(device)
    matrix: dict[str, float] = {}
    with _all_cores(device), torch.inference_mode():
        for precision in _DTYPES:
            if precision != "tf32" or device.type == "cuda":
                with _fp32_products(precision, device):
                    rate = _matrix_rate(device, _DTYPES[precision])
                matrix |= {} if rate is None else {precision: rate}
        copy = _copy_rate(device)
    found = Roofline(environment["device"], matrix, copy, environment, round(time.time()))
    _keep(found)
    return found


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of square products, as large as time and memory allow; None where there are none of that type."""
    found: tuple[int, Callable[[], None], float] | None = None
    for side in _SIDES:
        try:
            multiply = _product(device, dtype, side)
            multiply()  # loads libraries, chooses kernels
            once = _seconds(device, multiply)
        except (RuntimeError, NotImplementedError):  # not of this type, or too large for the memory
            break
        found = side, multiply, once
        if once > _LONG_ENOUGH[device.type]:
            break
    return None if found is None else 2 * found[0] ** 3 / _median_seconds(device, *found[1:])


def _product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], None]:
    """One product of random matrices, since zeros would take less power, into memory that is there already."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, device=device, generator=generator).to(dtype)
    b, out = a.t().contiguous(), torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    return multiply


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    return 2 * _COPY_BYTES / _median_seconds(device, copy, _seconds(device, copy))


def _median_seconds(device: torch.device, work: Callable[[], None], once: float) -> float:
    """Median time of `work`, repeated for about as long as a figure may take; `once` is a first estimate."""
    least, most = _REPEATS
    count = min(max(int(_SECONDS[device.type] / max(once, 1e-9)), least), most)
    return statistics.median(_seconds(device, work) for _ in range(count))


def _seconds(device: torch.device, work: Callable[[], None]) -> float:
    """Time of one call: on a GPU between two events of its stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@contextlib.contextmanager
def _all_cores(device: torch.device) -> Iterator[None]:
    """All usable cores for the block, if it is about a CPU."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _fp32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Products of fp32 in TF32 for ``tf32``, else in nothing less than fp32; CPU devices never touch the switches."""
    if device.type != "cuda":
        yield
        return
    # torch's older switch writes the newer ones too, and cannot be read where they are at odds with it.
    newer: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in newer]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for switch, value in zip(newer, before, strict=True):
            switch.fp32_precision = value


def _environment(device: torch.device) -> dict[str, Any]:
    """Everything the figures depend on that can change without our noticing."""
    if device.type == "cuda":
        return {
            "format": _FORMAT,
            "device": torch.cuda.get_device_name(device),
            "driver": _driver(),
            "torch": str(torch.__version__),
        }
    return {
        "format": _FORMAT,
        "device": f"{cpu_name()}, {usable_cores()} cores",
        "driver": None,
        "torch": str(torch.__version__),
    }


def _driver() -> str:
    """The NVIDIA driver in full where Linux tells it, else the CUDA version it supports."""
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    getter = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {getter()}" if getter is not None else "unknown"


def _file(environment: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
    return default_cache() / "roofline" / f"{digest}.json"


def _keep(found: Roofline) -> None:
    """Write by one rename, so that nobody reads half a file."""
    file = _file(found.environment)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
