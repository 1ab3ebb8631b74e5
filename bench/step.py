"""How fast a training step is: ours against plain PyTorch, in one run, taking turns.

    python bench/step.py [--batch 1,4,8,16] [--out FILE.json] [--markdown FILE.md] [--seconds N]
                         [--size 256] [--identity 0.5] [--only ours] [--match REGEX] [--small]

The contestants, each in a process of its own (see `rounds`), all with random pictures that are on the device already:

(a)   the de-facto implementation (`peers`) in fp32, eager, NCHW: as it comes. On CUDA also with TF32 convolutions,
      which is what torch's defaults make of it on an A100 and later.
(b)   the same in bf16 autocast, channels-last, eager.
(c)   the same under torch.compile, network by network, in both memory orders: the default mode, on CUDA max-autotune
      as well. A CPU has nothing else to offer for training: freezing is for weights that stay as they are.
plain further plain PyTorch that somebody might write: (b) recorded as a CUDA graph, and `models/reference.py`, whose
      instance norm keeps channels-last order.
ours  what the trainer runs: eager, compile and, on CUDA, graph, in the precision that `auto` chooses and in others.

The most telling come first; what no time is left for is listed as not run. Without CUDA only batch 1 by default.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import model as cost_model
import peers
import torch
from model import Task
from provenance import provenance
from rounds import Contestant, Field, NotHereError, Result, add_options, say, takes_part
from tables import (
    Baseline,
    Column,
    Section,
    common_columns,
    number,
    percent,
    profile_columns,
    rate_columns,
    report,
)
from torch import Tensor, nn

from cyclegan_fast.config import from_dict
from cyclegan_fast.device import AUTOCAST, resolve_precision
from cyclegan_fast.models import build_discriminators, build_generators
from cyclegan_fast.training.image_pool import ImagePool
from cyclegan_fast.training.step import StepBatch, train_step

try:
    from cyclegan_fast.training.cyclegan import CycleGANState, Objective
except ImportError:  # an earlier revision, see `compare`
    from cyclegan_fast.training.step import Objective  # type: ignore[attr-defined,no-redef]
    from cyclegan_fast.training.step import TrainState as CycleGANState  # type: ignore[assignment]

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
_BATCHES = 4  # different batches that a contestant goes round over


def pictures(task: Task, channels_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of batches on the device, float32 in [-1, 1], without end."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (task.batch, 3, task.size, task.size)
    made = [torch.rand(shape, device=DEVICE).mul_(2).sub_(1).contiguous(memory_format=layout) for _ in range(8)]
    return itertools.cycle([(made[i], made[i + 1]) for i in range(0, len(made), 2)][:_BATCHES])


# ---- the peers


def peer_step(
    task: Task, precision: str, *, channels_last: bool = False, compiled: str = "", graph: bool = False
) -> Callable[[], None]:
    """One step of the de-facto implementation; compiled: a mode of torch.compile; graph: recorded as a CUDA graph."""
    _process_settings(precision)
    made: list[nn.Module] = [peers.Generator(task.ngf, task.blocks) for _ in range(2)]
    made += [peers.Discriminator(task.ndf, task.layers) for _ in range(2)]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = [network.to(device=DEVICE, memory_format=layout) for network in made]  # type: ignore[call-overload]
    if compiled:
        made = [_compiled(network, compiled) for network in made]
    netG_A, netG_B, netD_A, netD_B = made
    model = peers.CycleGANModel(
        netG_A,
        netG_B,
        netD_A,
        netD_B,
        identity=task.identity,
        autocast=AUTOCAST.get(precision),
        capturable=graph,
        # The pool draws on the host, which a graph cannot repeat.
        pool_size=0 if graph else 50,
    )
    data = pictures(task, channels_last)
    if graph:
        real_A, real_B = (picture.clone() for picture in next(data))
        return _recorded(lambda: model.optimize_parameters(real_A, real_B))

    def step() -> None:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        model.optimize_parameters(*next(data))

    return step


def _compiled(network: nn.Module, mode: str) -> nn.Module:
    compiled: Any = torch.compile(network, mode=mode, dynamic=False)
    return compiled  # type: ignore[no-any-return]


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _process_settings(precision: str) -> None:
    """What the training sets for its process; fp32 means fp32, where torch would let cuDNN round to TF32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


# ---- ours


def our_step(
    task: Task, precision: str, *, mode: str = "eager", impl: str = "auto", batched: bool = True, streams: int = 1
) -> Callable[[], Any]:
    """One step as the trainer runs it."""
    _process_settings(precision)
    if DEVICE.type == "cpu":
        with contextlib.suppress(ImportError):  # a revision before there was such a thing; see `compare`
            from cyclegan_fast.machine import keep_freed_memory

            keep_freed_memory()
    torch.manual_seed(0)
    try:
        from cyclegan_fast.training import build
    except ImportError:
        state = _earlier_state(task, precision, mode)
    else:
        tree = {"mode": mode, "impl": impl, "streams": streams, "precision": precision, "batch": task.batch}
        tree = {"training": tree, "model": vars(task.model()), "loss": {"identity": task.identity}}
        config = from_dict(tree)
        modules = build.build_networks(config, build.resolved_impl(config, precision, DEVICE), DEVICE)
        run = build.executed(config, modules, one_shape=True)
        pools = {name: ImagePool(config.training.pool_size) for name in ("A", "B")}
        state = build.build_state(config, modules, run, pools, precision, DEVICE)
        state.batched = batched
    if mode == "graph":
        return _graph_step(task, state)
    batches = _step_batches(task)
    return lambda: train_step(state, next(batches), measure=True)  # as the trainer does


def _earlier_state(task: Task, precision: str, mode: str) -> CycleGANState:
    """The state of a step in a revision that kept its making to itself; see `compare`."""
    if mode == "graph":
        raise NotHereError("this revision has no graph mode")
    model = task.model()
    made: list[nn.Module] = [*build_generators(model), *build_discriminators(model)]
    made = [network.to(device=DEVICE, memory_format=torch.channels_last) for network in made]  # type: ignore[call-overload]
    optimisers = [
        torch.optim.Adam([p for network in pair for p in network.parameters()], 2e-4, (0.5, 0.999), fused=True)
        for pair in (made[:2], made[2:])
    ]
    if mode == "compile":
        made = [_compiled(network, "default") for network in made]
    pools = ImagePool(50), ImagePool(50)
    G_A, G_B, D_A, D_B = made
    optimizer_G, optimizer_D = optimisers
    return CycleGANState(
        G_A=G_A,
        G_B=G_B,
        D_A=D_A,
        D_B=D_B,
        optimizer_G=optimizer_G,
        optimizer_D=optimizer_D,
        exchange_A=pools[0].exchange,
        exchange_B=pools[1].exchange,
        objective=Objective(identity=task.identity),
        autocast=AUTOCAST.get(precision),
        scaler=torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16"),
    )


def _graph_step(task: Task, state: CycleGANState) -> Callable[[], Any]:
    """The step as the trainer records it, from stores on the device: crop, flip and draws are part of it."""
    import numpy as np

    from cyclegan_fast.training.graph import WARMUP, CudaRecorder, Draws, GraphStep

    n, margin, count = task.batch, 30, 8
    side = task.size + margin
    A, B = (torch.randint(256, (count, side, side, 3), dtype=torch.uint8, device=DEVICE) for _ in range(2))
    shape = (task.size, task.size, 3)
    step = GraphStep(
        state, (shape, shape), (A, B), accumulate=1, batch=n, pooled=n, device=DEVICE, recorder=CudaRecorder(DEVICE)
    )
    random = np.random.default_rng(0)
    bounds = np.array([[count], [margin], [margin], [2]])

    def call() -> None:
        at_A, at_B = (torch.from_numpy(random.integers(0, bounds, (4, n))).pin_memory() for _ in range(2))
        accept, slot, alpha = random.random((1, n)), random.integers(0, 50, (1, n)), random.random((1, n))
        step((at_A, at_B), (None, None), Draws(accept, slot, accept, slot, alpha, alpha), 2e-4)

    for _ in range(WARMUP + 1):
        call()
    if not step.graph.recorded:
        raise RuntimeError("the step could not be recorded, see the warning")
    return call


def _step_batches(task: Task) -> Iterator[StepBatch]:
    data = pictures(task, channels_last=True)

    def one() -> StepBatch:
        real_A, real_B = next(data)
        draws = [
            draw.to(DEVICE)
            for _ in range(2)
            for draw in (torch.rand(1, task.batch, dtype=torch.float64), torch.randint(50, (1, task.batch)))
        ]
        alphas = [torch.rand(1, task.batch).to(DEVICE) for _ in range(2)]
        return StepBatch(real_A[None], real_B[None], *draws, *alphas)

    return itertools.cycle([one() for _ in range(_BATCHES)])


# ---- who takes part, in the order in which they come


def contestants(task: Task) -> tuple[list[Contestant], ...]:
    """Groups of contestants: who must not be missing, who compiles first, and who is good to know as well."""
    auto = resolve_precision("auto", DEVICE)
    peer, ours = functools.partial(_peer, task), functools.partial(_ours, task)
    if CUDA:
        first = [
            ours(auto, mode="graph"),
            peer("fp32", role="a"),
            peer("bf16", role="b", channels_last=True),
            ours(auto),
            peer("tf32", role="a, TF32"),
        ]
        compiling = [
            peer(auto, role="c", channels_last=True, compiled="default"),
            peer(auto, role="c", compiled="default"),
            ours(auto, mode="compile"),
            peer(auto, role="c", channels_last=True, compiled="max-autotune"),
        ]
        further = [
            ours(auto, mode="graph", streams=2),
            ours(auto, impl="reference", batched=False),
            peer("bf16", channels_last=True, graph=True),
            ours("fp32", mode="graph"),
            ours("fp32"),
            peer("tf32", role="c", compiled="default"),
            peer("fp32", role="c", compiled="default"),
        ]
        return first, compiling, further
    first = [
        peer("fp32", role="a"),
        ours(auto),
        peer(auto, role="c", compiled="default"),
        ours(auto, impl="reference", batched=False),
        ours(auto, mode="compile"),
        peer(auto, role="c", channels_last=True, compiled="default"),
        peer("bf16", role="b", channels_last=True),
        ours("fp32" if auto == "bf16" else "bf16"),
    ]
    if auto == "bf16":
        return ([*first, peer("fp32", role="c", compiled="default")],)
    # bf16 that no instruction multiplies takes many times as long: last of all.
    return (sorted(first, key=lambda one: one.precision == "bf16"),)


def _peer(
    task: Task,
    precision: str,
    *,
    role: str = "plain",
    channels_last: bool = False,
    compiled: str = "",
    graph: bool = False,
) -> Contestant:
    how = f"compile {compiled}" if compiled else "CUDA graph, no pool" if graph else "eager"
    name = f"de-facto {precision}{' channels-last' if channels_last else ''} {how}"
    make = functools.partial(peer_step, task, precision, channels_last=channels_last, compiled=compiled, graph=graph)
    needs = 0.0 if not compiled else 60.0 if compiled == "max-autotune" else 20.0
    return Contestant(f"({role[0]}) {name}" if role != "plain" else name, make, role, precision, needs)


def _ours(
    task: Task, precision: str, *, mode: str = "eager", impl: str = "auto", batched: bool = True, streams: int = 1
) -> Contestant:
    make = functools.partial(our_step, task, precision, mode=mode, impl=impl, batched=batched, streams=streams)
    if impl == "reference":
        return Contestant(f"models/reference {precision} channels-last {mode}", make, "plain", precision)
    name = f"ours {precision} {mode}{f', {streams} streams' if streams > 1 else ''}"
    return Contestant(name, make, "ours", precision, 20.0 if mode == "compile" else 0.0)


# ---- the run


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was measured is written, see `finally`
    deadline = time.monotonic() + options.seconds
    small = {"ngf": 8, "ndf": 8, "blocks": 2, "layers": 2} if options.small else {}
    size = options.size or (64 if options.small else 256)
    tasks = [Task(batch, size, options.identity, **small) for batch in options.batch]
    content: dict[str, Any] = {
        "title": "Training step",
        "provenance": provenance(),
        "task": vars(tasks[0]),
        "rates": {},
    }
    fields: dict[int, tuple[Task, Field]] = {}
    with contextlib.ExitStack() as stack:
        try:
            if not options.small and options.only != "ours":
                say("measuring the matrix and copy rates")
                content["rates"] = cost_model.measured_rates(DEVICE)
            for task, chosen in _phases(tasks, lambda one: takes_part(one, options)):
                if task.batch not in fields:
                    field = Field(deadline, f"batch {task.batch}: ")
                    fields[task.batch] = (task, stack.enter_context(field))
                field = fields[task.batch][1]
                field.enter(chosen)
                field.run(options.round_seconds, rounds=options.rounds, least=0.2 if CUDA else 0.0)
                _write(options, content, fields)
        finally:
            text = _write(options, content, fields)
            if options.markdown is None:
                print(text)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    batches = [1, 4, 8, 16] if CUDA else [1]
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=batches)
    parser.add_argument("--size", type=int, help="side of the pictures (default: 256)")
    parser.add_argument("--identity", type=float, default=0.5, help="weight of the identity loss; 0 leaves it out")
    add_options(parser)
    return parser.parse_args(arguments)


def _phases(tasks: Sequence[Task], wanted: Callable[[Contestant], bool]) -> Iterator[tuple[Task, list[Contestant]]]:
    """Tasks and who joins in, the most telling first: the smallest batch with what compiles, then the largest."""
    groups = {task: contestants(task) for task in sorted(tasks, key=lambda task: task.batch)}
    smallest, *between, largest = groups if len(groups) > 1 else [*groups, *groups]
    order = [(smallest, 0), (smallest, 1), (largest, 0), (smallest, 2), *((task, 0) for task in between)]
    order += [(largest, 2), (largest, 1), *((task, part) for part in (2, 1) for task in between)]
    for task, part in dict.fromkeys(order):
        if part < len(groups[task]) and (chosen := [one for one in groups[task][part] if wanted(one)]):
            yield task, chosen


def _write(options: argparse.Namespace, content: dict[str, Any], fields: dict[int, tuple[Task, Field]]) -> str:
    rates = content["rates"]
    sections = [
        Section(
            f"Batch {batch}",
            {"batch": batch, "flop": cost_model.step_flop(task)},
            _columns(task, field.results, rates),
            field.results,
            "A step of",
        )
        for batch, (task, field) in sorted(fields.items())
    ]
    content["batches"] = [section.as_json() for section in sections]
    spoken = cost_model.rates_as_text(rates) if rates else ""
    return report(_EXPLANATION, spoken, sections, content, options.out, options.markdown)


_EXPLANATION = (
    "Medians over rounds in which the contestants take turns; ± is half the distance between the quartiles. × is how "
    "many times faster than (a) the de-facto implementation in fp32, (b) the same in bf16 channels-last, the best of "
    "(c), the same compiled, and the best of all that is plain PyTorch. GiB at the peak, weights and optimisers "
    "included. Kernels: on the GPU what the profiler sees run, on the CPU operators that call no other. TFLOP/s count "
    "the model's arithmetic, whatever is recomputed; the floor takes that and the bytes of fused execution at the "
    "rates measured in this run."
)


def _columns(task: Task, results: Sequence[Result], rates: dict[str, float]) -> list[Column]:
    ratios = [
        Baseline("(a)", lambda result: result.role == "a"),
        Baseline("(a) TF32", lambda result: result.role == "a, TF32"),
        Baseline("(b)", lambda result: result.role == "b"),
        Baseline("best (c)", lambda result: result.role == "c"),
        Baseline("best plain", lambda result: result.role != "ours"),
    ]

    def of_floor(result: Result) -> str:
        floor = cost_model.floor(task, result.precision, rates)
        return percent(1e3 * floor / result.ms) if floor and result.ms else ""

    return [
        *common_columns(),
        ("pairs/s", lambda result: number(1e3 * task.batch / (result.ms or float("inf")))),
        *(baseline.column(results) for baseline in ratios if baseline.ms(results) is not None),
        *rate_columns(cost_model.step_flop(task), rates),
        ("of floor", of_floor),
        *profile_columns(CUDA),
    ]


if __name__ == "__main__":
    main()
