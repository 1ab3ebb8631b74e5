"""How long a training step should take: from counted arithmetic, bytes and kernels, before anything is measured.

    python bench/model.py [--measured step.json] [--markdown FILE.md] [--size 256] [--identity 0.5]

What is counted comes from `cyclegan_fast.models.cost`, what a device offers stands in DEVICES, and what software makes
of it is assumed, in the four figures below, alike for all devices and contestants. --measured compares with a result of
bench/step.py, at the rates that were measured in the same run.

A convolution takes its arithmetic at the matrix rate, or its bytes if that is longer; all else takes its bytes. The
output of a convolution is made in tiles, one a multiprocessor: at batch 1 they are fewer than a large GPU has. Kernels
start a moment apart; in eager mode a step is no shorter than the host takes to launch them all. Not modelled:
torch.compile, two streams, caches, and clocks that fall under load.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cyclegan_fast.config import ModelConfig

try:
    from cyclegan_fast.models import cost
except ImportError:  # a revision that had none: see `compare`, which needs times only
    cost = None  # type: ignore[assignment]

# A library's convolution reaches this share of the rate of a large matrix product, and a kernel that only moves memory
# this share of that of a large copy.
CONVOLUTION = 0.72
STREAMING = 0.80
# Seconds from the end of one kernel to the start of the next, and for a host to launch one in eager mode.
GAP = 1.0e-6
EAGER_LAUNCH = 7e-6
_TILE = 128 * 128


@dataclass(frozen=True)
class Task:
    """What one training step is."""

    batch: int = 1
    size: int = 256
    identity: float = 0.5
    ngf: int = 64
    ndf: int = 64
    blocks: int = 9
    layers: int = 3

    def model(self) -> ModelConfig:
        """The networks, preset `original`."""
        return ModelConfig(ngf=self.ngf, ndf=self.ndf, blocks=self.blocks, discriminator_layers=self.layers)

    def step(self, level: str = "ii", precision: str = "bf16", *, batched: bool = True) -> cost.Step:
        """The step as `cost` counts it."""
        return cost.Step(
            self.model(), self.batch, self.size, self.size, bool(self.identity), level, precision, batched=batched
        )


@dataclass(frozen=True)
class Device:
    """What a device offers: matrix FLOP/s by precision, bytes/s of its memory, multiprocessors."""

    flops: dict[str, float]
    bandwidth: float
    multiprocessors: int


# bf16 and bandwidth as in the project's list of limits: H200 measured with a matrix product of 8192 and a copy; the
# others from NVIDIA's data sheets, dense, with fp32 accumulation: A100 80 GB SXM, GeForce RTX 4090, and GeForce RTX
# 3060 Laptop at the 1.42 GHz that its 21.8 TFLOP/s mean. fp32 and TF32 from the data sheets throughout.
DEVICES = {
    "H200": Device({"bf16": 790e12, "tf32": 494e12, "fp32": 67e12}, 4.3e12, 132),
    "A100": Device({"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}, 2.0e12, 108),
    "RTX 4090": Device({"bf16": 165e12, "tf32": 82.6e12, "fp32": 82.6e12}, 1.0e12, 128),
    "RTX 3060 Laptop": Device({"bf16": 21.8e12, "tf32": 10.9e12, "fp32": 10.9e12}, 0.336e12, 30),
}


@dataclass(frozen=True)
class Way:
    """A way to execute a step."""

    name: str
    level: str
    precision: str = "bf16"
    graph: bool = False
    batched: bool = False
    convolution: float = CONVOLUTION


WAYS = (
    Way("(a) de-facto fp32 eager", "i+", "fp32"),
    Way("(a) de-facto tf32 eager", "i+", "tf32"),
    Way("(b) de-facto bf16 channels-last eager", "i+"),
    Way("de-facto bf16 channels-last CUDA graph, no pool", "i+", graph=True),
    Way("models/reference bf16 channels-last eager", "i"),
    Way("fused (ii), passes apart, eager", "ii"),
    Way("fused (ii), passes apart, graph", "ii", graph=True),
    Way("ours bf16 eager", "ii", batched=True),
    Way("ours bf16 graph", "ii", graph=True, batched=True),
    Way("fused (ii+), graph", "ii+", graph=True, batched=True),
    Way("fused (iii), graph, convolutions at 0.85", "iii", graph=True, batched=True, convolution=0.85 * CONVOLUTION),
)
# What the project's list of limits predicts for an H200: (way, batch) -> ms of a step.
LIMITS = {
    ("(b) de-facto bf16 channels-last eager", 1): 21.4,
    ("(b) de-facto bf16 channels-last eager", 8): 55.8,
    ("de-facto bf16 channels-last CUDA graph, no pool", 1): 13.1,
    ("de-facto bf16 channels-last CUDA graph, no pool", 8): 55.8,
    ("fused (ii), passes apart, eager", 1): 9.8,
    ("fused (ii), passes apart, eager", 8): 38.8,
    ("fused (ii), passes apart, graph", 1): 8.7,
    ("fused (ii), passes apart, graph", 8): 38.8,
    ("ours bf16 graph", 1): 6.7,
    ("ours bf16 graph", 8): 38.3,
    ("fused (ii+), graph", 1): 6.4,
    ("fused (ii+), graph", 8): 36.2,
    ("fused (iii), graph, convolutions at 0.85", 1): 6.3,
    ("fused (iii), graph, convolutions at 0.85", 8): 35.6,
}


@functools.lru_cache(maxsize=256)
def predicted(task: Task, way: Way, device_name: str) -> float:
    """Seconds of a step on a device of DEVICES."""
    return seconds(task, way, DEVICES[device_name])


def seconds(task: Task, way: Way, device: Device) -> float:
    """Seconds of a step."""
    step = task.step(way.level, way.precision, batched=way.batched)
    extra = cost.weights(step) + cost.optimiser(step)
    busy = extra.bytes / (STREAMING * device.bandwidth)
    outputs = _outputs(step)
    count = extra.kernels
    for kernel in cost.step_kernels(step):
        moving = kernel.bytes / (STREAMING * device.bandwidth)
        rate = way.convolution * device.flops[way.precision]
        if kernel.kind in ("conv", "dgrad"):  # a weight gradient is split until it fills the device
            tiles = math.ceil(next(outputs) / _TILE)
            rate *= tiles / (math.ceil(tiles / device.multiprocessors) * device.multiprocessors)
        busy += max(moving, kernel.flop / rate)
        count += 1
    on_device = busy + count * GAP
    return on_device if way.graph else max(on_device, count * EAGER_LAUNCH)


def _outputs(step: cost.Step) -> Iterator[int]:
    """Elements that each convolution and each input gradient writes, in the order of `cost.step_kernels`."""
    for one in cost.step_passes(step):
        yield from (layer.output * one.pictures for layer in one.layers)
        yield from (layer.input * one.pictures for layer in one.layers[0 if one.input_gradient else 1 :])


def floor(task: Task, precision: str, rates: dict[str, float], level: str = "ii") -> float | None:
    """Seconds that no step of a level of fusion undercuts at the rates measured; None where there is no rate.

    Every kernel takes its arithmetic or its bytes, whichever is longer, all of them at the full rate.
    """
    if precision not in rates or "copy" not in rates:
        return None
    step = task.step(level, precision)
    kernels: list[Any] = [*cost.step_kernels(step), cost.weights(step), cost.optimiser(step)]
    return float(sum(max(kernel.flop / rates[precision], kernel.bytes / rates["copy"]) for kernel in kernels))


def step_flop(task: Task) -> float | None:
    """FLOP of the model's arithmetic in one step; None in a revision that could not count them."""
    return None if cost is None else cost.training_step(task.step()).flop


def measured_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product by precision, and `copy`, bytes/s read and written; by a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_rates, device.type).result()


def _measure_rates(device: str) -> dict[str, float]:
    from cyclegan_fast import roofline

    measured = roofline.measure(torch.device(device))
    return {**measured.matrix, "copy": measured.copy}


def rates_as_text(rates: dict[str, float]) -> str:
    """The rates as a phrase."""
    products = [f"{rate / 1e12:.3g} TFLOP/s {name}" for name, rate in rates.items() if name != "copy"]
    return f"matrix products {', '.join(products)}; copy {rates['copy'] / 1e9:.0f} GB/s"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8, 16])
    parser.add_argument("--size", type=int, default=256, help="side of the pictures")
    parser.add_argument("--identity", type=float, default=0.5, help="weight of the identity loss; 0 leaves it out")
    parser.add_argument("--measured", type=Path, help="JSON file of bench/step.py to compare with")
    parser.add_argument("--markdown", type=Path, help="file to write (default: standard output)")
    options = parser.parse_args(arguments)
    tasks = [Task(batch, options.size, options.identity) for batch in options.batch]
    lines = ["# What a training step should take", "", _explanation(tasks[0]), ""]
    for name, device in DEVICES.items():
        lines += [*_device_table(name, device, tasks), ""]
    if (options.size, options.identity) == (256, 0.5):
        lines += [*_limits_table(), ""]
    if options.measured:
        lines += [*_measured_table(json.loads(options.measured.read_text(encoding="utf-8"))), ""]
    text = "\n".join(lines)
    if options.markdown is None:
        print(text)
    else:
        options.markdown.write_text(text, encoding="utf-8")


def _explanation(task: Task) -> str:
    pair = replace(task, batch=1)
    levels = ", ".join(f"{cost.training_step(pair.step(level)).bytes / 1e9:.1f} at ({level})" for level in cost.LEVELS)
    gflop = (step_flop(pair) or 0.0) / 1e9
    return (
        f"{gflop:,.1f} GFLOP a pair; GB moved a pair in bf16: {levels}. Assumed: convolutions at "
        f"{CONVOLUTION:.0%} of the matrix rate, other kernels at {STREAMING:.0%} of the copy rate, "
        f"{1e6 * GAP:.1f} µs between two kernels, {1e6 * EAGER_LAUNCH:.0f} µs for a host to launch one in eager mode."
    )


def _device_table(name: str, device: Device, tasks: Sequence[Task]) -> list[str]:
    title = f"## {name}: {device.flops['bf16'] / 1e12:.4g} TFLOP/s bf16, {device.bandwidth / 1e12:.3g} TB/s"
    batches = [f"batch {task.batch}: ms | pairs/s" for task in tasks]
    lines = [title, "", f"| | {' | '.join(batches)} |", "|---" * (1 + 2 * len(tasks)) + "|"]
    rows = [(way.name, [predicted(task, way, name) for task in tasks]) for way in WAYS]
    rates = {**device.flops, "copy": device.bandwidth}
    rows.append(("floor at (ii)", [floor(task, "bf16", rates) or math.inf for task in tasks]))
    for label, times in rows:
        cells = [f"{1e3 * t:.1f} | {task.batch / t:.0f}" for task, t in zip(tasks, times, strict=True)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _limits_table() -> list[str]:
    lines = ["## Beside the project's list of limits (H200)", ""]
    lines += ["| | batch | limits, ms | here, ms | off |", "|---|---|---|---|---|"]
    ways = {way.name: way for way in WAYS}
    for (name, batch), ms in LIMITS.items():
        here = 1e3 * predicted(Task(batch), ways[name], "H200")
        lines.append(f"| {name} | {batch} | {ms:.1f} | {here:.1f} | {here / ms - 1:+.0%} |")
    return lines


def _measured_table(content: dict[str, Any]) -> list[str]:
    """What was measured beside what the same rates let expect."""
    facts, rates = content["provenance"], content["rates"]
    gpu = facts["gpu"] or ""
    known = next((device for name, device in DEVICES.items() if name in gpu), None)
    if not rates:
        return ["## Measured", "", "The result holds no rates: it is one of --small."]
    flops = {name: rate for name, rate in rates.items() if name != "copy"}
    device = Device(flops, rates["copy"], known.multiprocessors if known else 1)
    lines = [f"## Measured on {gpu or facts['cpu']}: {rates_as_text(rates)}", ""]
    lines += ["| | batch | measured, ms | model, ms | measured / model |", "|---|---|---|---|---|"]
    for group in content["batches"]:
        task = Task(**{**content["task"], "batch": group["batch"]})
        for row in group["rows"]:
            way = _way_of(row)
            if row["ms"] is None or way is None or way.precision not in flops:
                continue
            expected = 1e3 * seconds(task, way, device)
            ratio = row["ms"] / expected
            lines.append(f"| {row['name']} | {task.batch} | {row['ms']:.1f} | {expected:.1f} | {ratio:.2f} |")
    return lines


def _way_of(row: dict[str, Any]) -> Way | None:
    """The way that a row of bench/step.py went, if it is one that is modelled."""
    if "compile" in row["name"] or "streams" in row["name"]:
        return None
    level = "ii" if row["role"] == "ours" else "i" if row["name"].startswith("models/reference") else "i+"
    return Way(row["name"], level, row["precision"], "graph" in row["name"], batched=row["role"] == "ours")


if __name__ == "__main__":
    main()
