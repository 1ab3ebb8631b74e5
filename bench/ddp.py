"""How gradients are best averaged over processes: one flat sum, buckets that overlap, DistributedDataParallel.

    python bench/ddp.py [--size 64] [--batch 1] [--filters 64] [--seconds 150] [--rounds 20] [--small]
                        [--out FILE.json] [--markdown FILE.md]

Starts two processes by torchrun (on a machine with several GPUs one on each, by NCCL; otherwise on the CPU, by gloo,
with the cores shared out), which take training steps together. Everybody takes a step in turn, again and again, in the
same processes; a step's time is that from one barrier to the next. With 64 filters the networks have their full size
and so do the gradients, 113 MB; pictures are small, so that the work beside them does not drown them.

no reduction        every process for itself: what the step takes without
one flat sum        after the backward pass: gradients copied together, summed, divided, copied back
buckets, N MB       `training.reduction`: they leave as the backward pass fills them; both are made to wait at its end
                    (`waiting`), or only when the optimiser needs them, as training does
bf16                the same, travelling in half the bytes
DDP                 DistributedDataParallel around one module for each optimiser, whose forward pass computes the loss
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from provenance import provenance
from rounds import Result, cores, say
from tables import Baseline, Column, as_json, common_columns, markdown_table, number, write_both
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cyclegan_fast import distributed
from cyclegan_fast.config import Config, from_dict
from cyclegan_fast.training.build import NETWORKS, build_networks, build_state, resolved_impl
from cyclegan_fast.training.cyclegan import CycleGANState, Fakes, discriminator_pass, generator_pass
from cyclegan_fast.training.image_pool import ImagePool
from cyclegan_fast.training.reduction import BucketReduction
from cyclegan_fast.training.step import StepBatch, train_step

_PROCESSES = 2


class Flat:
    """One sum of one buffer, made for each step: what the package did before it had buckets."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        yield
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= distributed.world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def finish(self) -> None:
        """Nothing is under way."""


class Waiting(BucketReduction):
    """Buckets that leave during the backward pass, which ends when they have arrived."""

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        with super().during():
            yield
        super().finish()


class GeneratorLoss(nn.Module):
    """The generators' loss as one forward pass, which is what DistributedDataParallel can wrap."""

    def __init__(self, state: CycleGANState) -> None:
        super().__init__()
        self.G_A, self.G_B = state.G_A, state.G_B
        self._state = [state]  # in a list: its other networks are no part of this module

    def forward(self, real_A: Tensor, real_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, _, fakes = generator_pass(self._state[0], real_A, real_B)
        return loss, *fakes


class DiscriminatorLoss(nn.Module):
    """The discriminators' loss as one forward pass."""

    def __init__(self, state: CycleGANState, batch: StepBatch) -> None:
        super().__init__()
        self.D_A, self.D_B = state.D_A, state.D_B
        self._others = state, batch

    def forward(self, fake_A: Tensor, fake_B: Tensor) -> Tensor:
        state, batch = self._others
        return discriminator_pass(state, batch, Fakes(fake_A, fake_B), 0)[0]


def wrapped_step(state: CycleGANState, batch: StepBatch) -> Callable[[], Any]:
    """A step by DistributedDataParallel, in the order that it allows."""
    # Some parameters have no gradient (biases before a norm); that these stay the same is what static_graph says.
    # There are no buffers that could be broadcast.
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "static_graph": True}
    generators = DistributedDataParallel(GeneratorLoss(state), **options)
    discriminators = DistributedDataParallel(DiscriminatorLoss(state, batch), **options)
    frozen = [*state.D_A.parameters(), *state.D_B.parameters()]

    def step() -> None:
        for parameter in frozen:
            parameter.requires_grad_(False)
        state.optimizer_G.zero_grad(set_to_none=True)
        loss, fake_A, fake_B = generators(batch.real_A[0], batch.real_B[0])
        loss.backward()
        state.optimizer_G.step()
        for parameter in frozen:
            parameter.requires_grad_(True)
        state.optimizer_D.zero_grad(set_to_none=True)
        discriminators(fake_A.detach(), fake_B.detach()).backward()
        state.optimizer_D.step()

    return step


def contestants(config: Config, device: torch.device, batch: StepBatch) -> dict[str, Callable[[], Any]]:
    """A step of each, by name."""
    modules, state = _state(config, device)
    groups = [[list(modules[name].parameters()) for name in names] for names in (("G_A", "G_B"), ("D_A", "D_B"))]

    def buckets(kind: type[BucketReduction], megabytes: float, wire: torch.dtype | None = None) -> list[Any]:
        return [kind(group, bucket_bytes=round(1e6 * megabytes), wire=wire) for group in groups]

    def step(reductions: Sequence[Any]) -> Callable[[], Any]:
        def call() -> None:
            state.reduction_G, state.reduction_D = reductions
            train_step(state, batch)

        return call

    calls = {
        "no reduction": step((None, None)),
        "one flat sum": step([Flat([p for part in group for p in part]) for group in groups]),
        "buckets, 25 MB, waiting": step(buckets(Waiting, 25)),
        "buckets, 25 MB": step(buckets(BucketReduction, 25)),
        "buckets, 5 MB": step(buckets(BucketReduction, 5)),
        "buckets, 25 MB, bf16": step(buckets(BucketReduction, 25, torch.bfloat16)),
    }
    return {**calls, "DDP": wrapped_step(_state(config, device)[1], batch)}


def _state(config: Config, device: torch.device) -> tuple[dict[str, nn.Module], CycleGANState]:
    modules = build_networks(config, resolved_impl(config, "fp32", device), device)
    pools = {name: ImagePool(0) for name in ("A", "B")}
    state = build_state(config, modules, modules, pools, "fp32", device)
    state.exchange_A = state.exchange_B = lambda images, *_: images  # what pools share is not measured here
    return modules, state


def step_batch(config: Config, device: torch.device) -> StepBatch:
    """Pictures of this rank, in [-1, 1]."""
    generator = torch.Generator().manual_seed(distributed.rank())
    shape = (config.training.batch, 3, config.data.crop_size, config.data.crop_size)
    A, B = (torch.rand(shape, generator=generator) * 2 - 1 for _ in "AB")
    A, B = (x.to(device).contiguous(memory_format=torch.channels_last)[None] for x in (A, B))
    draws = torch.zeros(1, config.training.batch, device=device)
    return StepBatch(A, B, draws, draws.long(), draws, draws.long(), draws, draws)


def measure(options: argparse.Namespace, device: torch.device) -> list[Result]:
    """Time everybody's steps in turn; the same rounds on every rank."""
    start = time.monotonic()
    calls = contestants(options.config, device, step_batch(options.config, device))
    results = [Result(name) for name in calls]
    for call in calls.values():
        for _ in range(2):  # allocates, chooses algorithms, learns which parameters have gradients
            call()
    for _ in range(options.rounds):
        for result, call in zip(results, calls.values(), strict=True):
            result.seconds.append(_timed(call, device))
            result.error = ""
        round_seconds = sum(result.seconds[-1] for result in results)
        if distributed.any_rank(time.monotonic() + round_seconds > start + options.seconds):
            break
    return results


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def columns(results: Sequence[Result]) -> list[Column]:
    """Times, what a reduction costs beyond the step without one, and ratios."""
    alone = results[0].ms

    def cost(result: Result) -> str:
        return number(result.ms - alone) if result.ms is not None and alone is not None and result.ms != alone else ""

    flat = Baseline("one flat sum", lambda result: result.name == "one flat sum")
    fastest: Column = ("fastest ms", lambda result: number(1e3 * min(result.seconds), 4))
    return [*common_columns(), fastest, ("ms beyond `no reduction`", cost), flat.column(results)]


def gradient_bytes(config: Config) -> int:
    """What one rank has to average in a step."""
    with torch.device("meta"):
        modules = build_networks(config, "reference", torch.device("meta"))
    return sum(p.numel() * p.element_size() for name in NETWORKS for p in modules[name].parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", type=int, default=64, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=1, help="pairs of each process")
    parser.add_argument("--filters", type=int, default=64, help="of the networks' first layers")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="no round begins that would not end within so many"
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps of each contestant")
    parser.add_argument("--small", action="store_true", help="toy networks: a check of this script, no measurement")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write (default: standard output)")
    options = parser.parse_args(arguments)
    if not distributed.launched():
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_PROCESSES}"]
        given = sys.argv[1:] if arguments is None else list(arguments)
        sys.exit(subprocess.run([sys.executable, *torchrun, __file__, *given], check=False).returncode)
    cuda = torch.cuda.device_count() >= distributed.local_world_size()
    device = torch.device("cuda", distributed.local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, cores() // distributed.local_world_size()))
    networks = {"ngf": options.filters, "ndf": options.filters}
    if options.small:
        networks = {"ngf": 8, "ndf": 8, "blocks": 2}
    training = {"batch": options.batch, "device": device.type}
    options.config = from_dict(
        {"data": {"crop_size": options.size, "load_size": options.size}, "model": networks, "training": training}
    )
    distributed.init(device)
    facts = provenance()
    facts["command"] = f"python {Path(__file__).parent.name}/{Path(__file__).name} {' '.join(sys.argv[1:])}".strip()
    results = measure(options, device)
    if distributed.is_main():
        _write(options, results, facts)
    distributed.shutdown()


def _write(options: argparse.Namespace, results: Sequence[Result], facts: dict[str, Any]) -> None:
    size, processes = gradient_bytes(options.config), distributed.world_size()
    content = {
        "title": "Averaging gradients over processes",
        "provenance": facts,
        "task": {"size": options.size, "batch": options.batch, "processes": processes, "gradient_bytes": size},
        "backend": dist.get_backend(),
        "rows": [as_json(result) for result in results],
    }
    lines = [
        f"{processes} processes on one machine by {dist.get_backend()}, {torch.get_num_threads()} threads each; "
        f"{size / 1e6:.0f} MB of gradients, {options.size}x{options.size}, batch {options.batch}, fp32. "
        + _EXPLANATION,
        "",
        *markdown_table(columns(results), results),
    ]
    write_both(options.out, options.markdown, content, lines)
    if options.markdown is None:
        print("\n".join(lines))
    for result in results:
        say(f"{result.name}: {number(result.ms, 4)} ms")


_EXPLANATION = (
    "Medians over rounds in which the contestants take turns, in the same processes; ± is half the distance between "
    "the quartiles, and the fastest round the one least disturbed; × is how many times faster a whole step is than "
    "with one flat sum after the backward pass. Processes on one machine send through its memory, and with as many "
    "threads as cores whoever sends takes a core from whoever computes: what overlapping hides of a network that works "
    "by itself does not show here."
)


if __name__ == "__main__":
    main()
