"""How fast one picture is translated: ours against plain PyTorch, OpenVINO and ONNX Runtime, in one run, taking turns.

    python bench/translate.py [--out FILE.json] [--markdown FILE.md] [--seconds N] [--large]
                              [--only ours] [--match REGEX] [--small]

One forward pass of the generator over one picture of 256x256, from a float32 tensor on the device to the result there,
each call waited for: latency, not throughput. On CUDA, and on a CPU with --large, also 1024x1024 and 12 megapixels
(4032x3024; a CPU needs 24 GB for it). Each contestant runs in a process of its own, on all cores (see `rounds`).

(a)     the de-facto generator (`peers`) in fp32, eager, NCHW.      (b)  in bf16, channels-last, eager.
(c)     the same under torch.compile with freezing, without gradients, in both memory orders; on CUDA max-autotune.
plain   further eager PyTorch: the other memory order, and `models/reference.py`.
engine  OpenVINO with its precision hint at f32 and bf16, and ONNX Runtime in fp32, where they are installed; CPU only.
ours    what the package runs: eager, compiled, as a CUDA graph, and through `Translator` with all its checks.

What is bf16 among the peers has its weights in bf16 as well, which saves them casting.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import model as cost_model
import peers
import torch
from provenance import provenance
from rounds import Contestant, Field, NotHereError, Result, add_options, cores, say, synchronise, takes_part
from tables import (
    Baseline,
    Column,
    Section,
    common_columns,
    profile_columns,
    rate_columns,
    report,
)
from torch import Tensor

import cyclegan_fast
from cyclegan_fast.device import arithmetic, resolve_precision

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
_BF16 = {"bf16": torch.bfloat16}


@dataclass(frozen=True)
class Task:
    """One picture through one generator."""

    height: int = 256
    width: int = 256
    ngf: int = 64
    blocks: int = 9

    def picture(self, *, channels_last: bool) -> Tensor:
        """The picture, float32 [1, 3, H, W] in [-1, 1] on the device."""
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return (torch.rand(1, 3, self.height, self.width, device=DEVICE) * 2 - 1).contiguous(memory_format=layout)

    def flop(self) -> float | None:
        """FLOP of the network; None in a revision that could not count them."""
        if cost_model.cost is None:
            return None
        networks = cost_model.Task(ngf=self.ngf, blocks=self.blocks).model()
        step = cost_model.cost.Step(networks, height=self.height, width=self.width)
        return float(cost_model.cost.generator_forward(step).flop)


# ---- plain PyTorch


def peer_forward(
    task: Task, precision: str, *, channels_last: bool = False, compiled: bool = False
) -> Callable[[], Any]:
    """The de-facto generator, in evaluation mode."""
    dtype = _BF16.get(precision, torch.float32)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    G = peers.Generator(task.ngf, task.blocks).eval().requires_grad_(False)
    G = G.to(device=DEVICE, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    x = task.picture(channels_last=channels_last)
    run: Callable[[Tensor], Tensor] = G
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True
        run = torch.compile(G, mode="max-autotune" if CUDA else "default", dynamic=False)
    return _waited(lambda: run(x.to(dtype)).float(), precision)


def _waited(forward: Callable[[], Any], precision: str) -> Callable[[], Any]:
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision != "fp32"

    def call() -> Any:
        with torch.no_grad():
            result = forward()
        synchronise()
        return result

    return call


# ---- ours


def our_forward(task: Task, precision: str, *, mode: str = "eager", impl: str = "auto") -> Callable[[], Any]:
    """Our generator; mode: eager, compile, graph, or translator, which is eager with all that users get around it."""
    torch.manual_seed(0)
    G = cyclegan_fast.ResnetGenerator(ngf=task.ngf, blocks=task.blocks)
    if hasattr(G, "impl"):
        G.impl = impl
    x = task.picture(channels_last=True)
    if mode == "translator":
        translator = cyclegan_fast.Translator(G, G, device=DEVICE.type, precision=precision)
        return _waited(lambda: translator.translate(x), precision)
    G = G.eval().requires_grad_(False).to(device=DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    run: Callable[[Tensor], Tensor] = G
    if mode == "compile":
        run = torch.compile(G, dynamic=False)

    def forward() -> Tensor:
        with arithmetic(precision, DEVICE):
            return run(x).float()

    if mode == "graph":
        return _recorded(forward, precision)
    return _waited(forward, precision)


def _recorded(forward: Callable[[], Tensor], precision: str) -> Callable[[], Any]:
    eager = _waited(forward, precision)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager()
    synchronise()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = forward()

    def call() -> Tensor:
        graph.replay()
        synchronise()
        return result

    return call


# ---- other engines


def openvino_forward(task: Task, precision: str) -> Callable[[], Any]:
    """OpenVINO on the CPU, for latency, with its hint at the precision."""
    ov = _imported("openvino")
    x = task.picture(channels_last=False)
    G = peers.Generator(task.ngf, task.blocks).eval()
    with torch.no_grad():
        converted = ov.convert_model(G, example_input=x, input=list(x.shape))
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": cores(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(converted, "CPU", options)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != {"f32": "f32", "bf16": "bf16"}[hint]:
        raise NotHereError(f"not possible here: OpenVINO would compute in {used} on this CPU")
    request, array = compiled.create_infer_request(), x.numpy()
    return lambda: request.infer({0: array})


def onnxruntime_forward(task: Task, precision: str) -> Callable[[], Any]:
    """ONNX Runtime on the CPU, which has fp32 only."""
    if precision != "fp32":
        raise NotHereError(f"ONNX Runtime has no {precision} on a CPU")
    ort = _imported("onnxruntime")
    _imported("onnx")
    _imported("onnxscript")
    x = task.picture(channels_last=False)
    G = peers.Generator(task.ngf, task.blocks).eval()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        file = Path(folder) / "generator.onnx"
        torch.onnx.export(G, (x,), file, input_names=["x"], dynamo=True, external_data=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = cores()
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    array = x.numpy()
    return lambda: session.run(None, {"x": array})


def _imported(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise NotHereError(f"{name} is not installed")
    return importlib.import_module(name)


# ---- who takes part, in the order in which they come


def contestants(task: Task) -> list[Contestant]:
    """Everyone for pictures of one size; those that compile for long come last, and only for small ones."""
    auto = resolve_precision("auto", DEVICE)
    peer, ours = functools.partial(_peer, task), functools.partial(_ours, task)
    small = task.height * task.width <= 256 * 256
    if CUDA:
        chosen = [ours(auto, "graph"), peer("fp32", role="a"), peer("bf16", role="b", channels_last=True), ours(auto)]
        chosen += [ours(auto, "translator"), peer("bf16"), _reference(task, auto)]
        if small:
            chosen += [ours("fp32"), peer("bf16", role="c", channels_last=True, compiled=True)]
            chosen += [ours(auto, "compile"), peer("bf16", role="c", compiled=True)]
        return chosen
    other = "fp32" if auto == "bf16" else "bf16"
    chosen = [peer("fp32", role="a"), ours(auto), _reference(task, auto), ours(auto, "translator")]
    if small:
        chosen += [_engine(task, "OpenVINO", openvino_forward, auto), peer(auto, role="c", compiled=True)]
        chosen += [ours(auto, "compile"), peer(auto, role="c", channels_last=True, compiled=True)]
        chosen += [_engine(task, "ONNX Runtime", onnxruntime_forward, "fp32")]
        chosen += [_engine(task, "OpenVINO", openvino_forward, other)]
    chosen += [peer("fp32", channels_last=True), peer("bf16", role="b", channels_last=True), ours(other)]
    if small:
        chosen += [peer(other, role="c", compiled=True), peer(other, role="c", channels_last=True, compiled=True)]
    # bf16 that no instruction multiplies takes seconds a picture: last of all.
    return sorted(chosen, key=lambda one: one.precision == "bf16" and auto != "bf16")


def _peer(
    task: Task, precision: str, *, role: str = "plain", channels_last: bool = False, compiled: bool = False
) -> Contestant:
    how = "compile, freezing" if compiled else "eager"
    name = f"de-facto {precision}{' channels-last' if channels_last else ''} {how}"
    make = functools.partial(peer_forward, task, precision, channels_last=channels_last, compiled=compiled)
    needs = 20.0 if compiled else 0.0
    return Contestant(f"({role}) {name}" if role != "plain" else name, make, role, precision, needs)


def _ours(task: Task, precision: str, mode: str = "eager") -> Contestant:
    make = functools.partial(our_forward, task, precision, mode=mode)
    return Contestant(f"ours {precision} {mode}", make, "ours", precision, 10.0 if mode == "compile" else 0.0)


def _reference(task: Task, precision: str) -> Contestant:
    make = functools.partial(our_forward, task, precision, impl="reference")
    return Contestant(f"models/reference {precision} channels-last eager", make, "plain", precision)


def _engine(task: Task, name: str, make: Callable[..., Callable[[], Any]], precision: str) -> Contestant:
    return Contestant(f"{name} {precision}", functools.partial(make, task, precision), "engine", precision, 5.0)


# ---- the run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--large", action="store_true", help="large pictures on a CPU too")
    add_options(parser)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was measured is written, see `finally`
    deadline = time.monotonic() + options.seconds
    tasks = [Task(64, 64, ngf=8, blocks=2)] if options.small else [Task()]
    if CUDA or options.large:
        tasks += [replace(tasks[0], height=h, width=w) for h, w in ((1024, 1024), (3024, 4032))]
    content: dict[str, Any] = {"title": "Translation of one picture", "provenance": provenance(), "rates": {}}
    fields: list[tuple[Task, Field]] = []
    try:
        if not options.small and options.only != "ours":
            say("measuring the matrix and copy rates")
            content["rates"] = cost_model.measured_rates(DEVICE)
        for task in tasks:
            with Field(deadline, f"{task.width}x{task.height}: ") as field:  # the next size wants the memory
                fields.append((task, field))
                field.enter([one for one in contestants(task) if takes_part(one, options)])
                field.run(options.round_seconds, rounds=options.rounds, least=0.1 if CUDA else 0.5)
            _write(options, content, fields)
    finally:
        text = _write(options, content, fields)
        if options.markdown is None:
            print(text)


def _write(options: argparse.Namespace, content: dict[str, Any], fields: Sequence[tuple[Task, Field]]) -> str:
    rates = content["rates"]
    sections = [
        Section(
            f"{task.width}x{task.height}",
            {**vars(task), "flop": task.flop()},
            _columns(task, field.results, rates),
            field.results,
            "A translation by",
        )
        for task, field in fields
    ]
    content["sizes"] = [section.as_json() for section in sections]
    spoken = cost_model.rates_as_text(rates) if rates else ""
    return report(_EXPLANATION, spoken, sections, content, options.out, options.markdown)


_EXPLANATION = (
    "Medians over rounds in which the contestants take turns; ± is half the distance between the quartiles. × is how "
    "many times faster than (a) the de-facto generator in fp32, (b) the same in bf16 channels-last, the best of (c), "
    "the same compiled with freezing, the best of all that is plain PyTorch, and the best other engine. GiB at the "
    "peak, weights included; on the CPU what the process holds, compiler and all. Kernels: on the GPU what the "
    "profiler sees run, on the CPU operators that call no other."
)


def _columns(task: Task, results: Sequence[Result], rates: dict[str, float]) -> list[Column]:
    ratios = [
        Baseline("(a)", lambda result: result.role == "a"),
        Baseline("(b)", lambda result: result.role == "b"),
        Baseline("best (c)", lambda result: result.role == "c"),
        Baseline("best plain", lambda result: result.role not in ("ours", "engine")),
        Baseline("best engine", lambda result: result.role == "engine"),
    ]

    return [
        *common_columns(),
        *(baseline.column(results) for baseline in ratios if baseline.ms(results) is not None),
        *rate_columns(task.flop(), rates),
        *profile_columns(CUDA),
    ]


if __name__ == "__main__":
    main()
