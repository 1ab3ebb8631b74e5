"""What test_two_ranks.py has several gloo processes do: torchrun runs this file on a folder of jobs.

Each job is a function of below and a name; what a rank has to say of it goes to NAME-RANK.pt. All jobs run in one
process group, because starting processes takes longer than any of them.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_graph import TapeRecorder
from torch import Tensor, nn

from cyclegan_fast import distributed
from cyclegan_fast.config import load_config
from cyclegan_fast.training import trainer
from cyclegan_fast.training.reduction import BucketReduction
from cyclegan_fast.training.replicas import ReplicaError, Replicas
from cyclegan_fast.training.trainer import train

CPU = torch.device("cpu")


def gathered(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank."""
    everyone = [torch.empty_like(tensor) for _ in range(distributed.world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    return everyone


def layers(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(40, 40) for _ in range(count)))


def own_input() -> Tensor:
    return torch.randn(3, 40, generator=torch.Generator().manual_seed(10 + distributed.rank()))


def averages_job(name: str, folder: Path, *, wire: torch.dtype | None = None) -> dict[str, Any]:
    """Gradients after a reduction, and those of all ranks without one."""
    net = layers(6)
    net(own_input()).square().sum().backward()
    alone = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    reduction = BucketReduction([list(net.parameters())], bucket_bytes=10_000, wire=wire)
    for _ in range(3):
        net.zero_grad()
        with reduction.during():
            net(own_input()).square().sum().backward()
        reduction.finish()
    reduced = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return {"reduced": reduced, "all": [gathered(gradient) for gradient in alone], "buckets": len(reduction.buckets)}


def order_job(name: str, folder: Path) -> dict[str, Any]:
    """Rank 1 makes the gradients of its networks in the opposite order; the means are right all the same."""
    one, two = layers(2), layers(3)
    reduction = BucketReduction([list(one.parameters()), list(two.parameters())], bucket_bytes=7000)
    sizes: list[int] = []
    begin = distributed.begin_mean
    distributed.begin_mean = lambda tensor, wire=None: (sizes.append(tensor.numel()), begin(tensor, wire))[1]
    arrivals: list[str] = []
    for label, net in (("one", one), ("two", two)):
        net[0].weight.register_post_accumulate_grad_hook(lambda _, label=label: arrivals.append(label))
    try:
        for _ in range(3):
            for net in (one, two):
                net.zero_grad()
            order = (one, two) if distributed.rank() == 0 else (two, one)
            first, second = (net(own_input()).square().sum() for net in order)
            with reduction.during():
                (first + second).backward()
            reduction.finish()
    finally:
        distributed.begin_mean = begin
    gradient = one[0].weight.grad
    assert gradient is not None
    one.zero_grad()
    one(own_input()).square().sum().backward()
    assert one[0].weight.grad is not None
    return {"sizes": sizes, "arrivals": arrivals, "reduced": gradient, "all": gathered(one[0].weight.grad)}


def disagreement_job(name: str, folder: Path) -> dict[str, Any]:
    rank = distributed.rank()
    low = -(2**63)
    return {
        "same": distributed.disagreement(torch.tensor([3, low, 2**63 - 1, -1])),
        "other": distributed.disagreement(torch.tensor([3, low + rank, -rank, 0])),
    }


def steps_differ_job(name: str, folder: Path) -> str:
    """A rank that found another checkpoint in its folder."""
    try:
        Replicas(lambda: {"G_A": [torch.ones(3)]}, every=1).check(100 * distributed.rank())
    except ReplicaError as error:
        return str(error)
    return "nothing noticed"


def run(name: str, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """The training NAME.yaml, and the collectives of its gradients, by size in bytes."""
    sent: list[int] = []
    begin = distributed.begin_mean

    def counted(tensor: Tensor, wire: Tensor | None = None) -> Callable[[], None]:
        sent.append(tensor.nbytes if wire is None else wire.nbytes)
        return begin(tensor, wire)

    distributed.begin_mean = counted
    try:
        train(load_config(folder / f"{name}.yaml"), resume=resume)
    finally:
        distributed.begin_mean = begin
    return {"sent": sent}


def graph_job(name: str, folder: Path) -> dict[str, Any]:
    recorder = TapeRecorder()
    real, trainer._recorder = trainer._recorder, lambda _: recorder
    try:
        result = run(name, folder)
    finally:
        trainer._recorder = real
    return {**result, "warmed": recorder.warmed, "replayed": recorder.replayed}


def compile_job(name: str, folder: Path) -> dict[str, Any]:
    """Counts dynamo's graphs after each step; with the compiler that test_two_ranks.py chose."""
    from torch._dynamo.utils import counters

    step, compiled = trainer.train_step, []

    def counted(*arguments: Any, **options: Any) -> Any:
        scalars = step(*arguments, **options)
        compiled.append(counters["stats"]["unique_graphs"])
        return scalars

    trainer.train_step = counted
    try:
        result = run(name, folder)
    finally:
        trainer.train_step = step
    return {**result, "compiled": compiled, "breaks": dict(counters["graph_break"])}


def planted_job(name: str, folder: Path, *, plant: Callable[[dict[str, nn.Module]], None], at_step: int) -> str:
    """What training says when on rank 1 the networks are changed after so many steps, 0 for before the first."""
    steps, make = 0, trainer.build_networks
    step, broadcast = trainer.train_step, distributed.broadcast_parameters
    modules: dict[str, nn.Module] = {}

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        scalars = step(*arguments, **options)
        steps += 1
        if steps == at_step and distributed.rank() == 1:
            plant(modules)
        return scalars

    def broadcast_and_plant(parts: Any) -> None:
        broadcast(parts)
        if at_step == 0 and distributed.rank() == 1:
            plant(modules)

    def build_networks(*arguments: Any) -> Any:
        modules.update(make(*arguments))
        return modules

    trainer.train_step, trainer.build_networks = counted, build_networks
    distributed.broadcast_parameters = broadcast_and_plant
    try:
        train(load_config(folder / f"{name}.yaml"))
    except ReplicaError as error:
        return f"after {steps} steps: {error}"
    finally:
        trainer.train_step, trainer.build_networks, distributed.broadcast_parameters = step, make, broadcast
    return "nothing noticed"


@torch.no_grad()
def last_bit(modules: dict[str, nn.Module]) -> None:
    next(modules["D_B"].parameters()).view(torch.int32)[1, 0, 1, 0] ^= 1


@torch.no_grad()
def other_start(modules: dict[str, nn.Module]) -> None:
    next(modules["G_A"].parameters()).view(torch.int32)[0, 0, 0, 0] ^= 1


JOBS: dict[str, Callable[[str, Path], Any]] = {
    "averages": averages_job,
    "averages-bf16": functools.partial(averages_job, wire=torch.bfloat16),
    "order": order_job,
    "disagreement": disagreement_job,
    "steps-differ": steps_differ_job,
    "exact": run,
    **dict.fromkeys(("pix2pix", "augmented", "pix2pix-large"), run),
    **dict.fromkeys(("eager", "wgangp", "static-memory"), run),
    "patience": run,
    "accumulate": run,
    "compressed": run,
    "compile": compile_job,
    "graph": graph_job,
    "resumed": functools.partial(run, resume=True),
    "diverged": functools.partial(planted_job, plant=last_bit, at_step=3),
    "other-start": functools.partial(planted_job, plant=other_start, at_step=0),
}


def main(folder: Path) -> None:
    """Do the jobs of jobs.json, in order, on every rank."""
    torch.set_num_threads(1)
    distributed.init(CPU)
    leave, distributed.shutdown = distributed.shutdown, lambda: None  # runs would leave the group that all jobs share
    for name in json.loads((folder / "jobs.json").read_text()):
        try:
            said = JOBS[name](name, folder)
        except Exception:
            said = traceback.format_exc()
        torch.save(said, folder / f"{name}-{distributed.rank()}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
