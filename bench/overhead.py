"""What a call of each op costs beside its arithmetic: processor time of the host at toy sizes, in eager mode.

    python bench/overhead.py [--out FILE.json] [--markdown FILE.md]

Three ways to call: as a user does (convolutions with the kernels named, which "auto" leaves to the library at toy
sizes), by way of torch's dispatcher (what a compiled program calls), and the reference of plain PyTorch. One thread;
the best of several runs, since whatever disturbs only adds. Forward and backward includes torch.autograd.grad itself,
which a training step calls once for all its operations: the last row is that of one ReLU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from tables import number, write_both
from torch import Tensor

from cyclegan_fast.ops.conv import conv2d
from cyclegan_fast.ops.crop_flip import crop_flip, crop_flip_ref
from cyclegan_fast.ops.flat_conv import flat_conv3x3, flat_conv3x3_ref
from cyclegan_fast.ops.image_pool import pool_exchange, pool_exchange_ref
from cyclegan_fast.ops.instance_norm import instance_norm
from cyclegan_fast.ops.reflect_conv import reflect_conv2d

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = "triton" if DEVICE.type == "cuda" else "native"
_CALLS, _RUNS = 300, 9
Call = Callable[[], Any]


def microseconds(call: Call, calls: int = _CALLS, runs: int = _RUNS) -> float:
    """Processor time of one call: the best mean of so many `calls`, of so many `runs`."""
    best = float("inf")
    for _ in range(runs):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()  # a full queue would make the host wait
        start = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, time.process_time() - start)
    return 1e6 * best / calls


def rows() -> list[tuple[str, str, list[Call]]]:
    """(op, direction, calls: as users do, by the dispatcher, the reference)."""
    x = _channels_last(1, 8, 4, 4)
    weight = _channels_last(8, 8, 3, 3)
    padded = _channels_last(1, 8, 6, 6)
    grad = torch.randn_like(x)
    registered = torch.ops.cyclegan_fast
    made: list[tuple[str, str, list[Call]]] = []

    def both(op: str, leaves: Sequence[Tensor], gradient: Tensor, functions: list[Callable[..., Tensor]]) -> None:
        made.append((op, "forward", [lambda f=f: _without_gradient(f, *leaves) for f in functions]))
        taking = [leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves]
        made.append(
            (
                op,
                "forward + backward",
                [lambda f=f: torch.autograd.grad(f(*taking), taking, gradient) for f in functions],
            )
        )

    both("instance_norm, ReLU, pad 1", [x], torch.randn_like(padded), [
        lambda x: instance_norm(x, activation="relu", pad=1),
        lambda x: registered.instance_norm(x, None, None, None, 1e-5, 1, 0.2, 1, "auto")[0],
        lambda x: instance_norm(x, activation="relu", pad=1, impl="reference"),
    ])  # fmt: skip
    both("reflect_conv2d 3x3, padding 0", [padded, weight], grad, [
        lambda x, w: reflect_conv2d(x, w, padding=0, impl=KERNELS),
        lambda x, w: registered.reflect_conv2d(x, w, None, 0, 0, KERNELS),
        lambda x, w: reflect_conv2d(x, w, padding=0, impl="reference"),
    ])  # fmt: skip
    if KERNELS == "native":  # on CUDA there are none
        both("conv2d 3x3, padding 1", [x, weight], grad, [
            lambda x, w: conv2d(x, w, None, 1, 1, impl=KERNELS),
            lambda x, w: registered.conv2d(x, w, None, 1, 1, 0, False, KERNELS),
            lambda x, w: conv2d(x, w, None, 1, 1, impl="reference"),
        ])  # fmt: skip
    made.append(("flat_conv3x3, padding 0", "forward", [
        lambda: flat_conv3x3(padded, weight),
        lambda: registered.flat_conv3x3(padded, weight, None, 0, None, None, False, False, 1e-5, "auto"),
        lambda: flat_conv3x3_ref(padded, weight),
    ]))  # fmt: skip
    return [*made, _crop_flip(), _pool_exchange(), ("relu", "forward + backward", _relu(x))]


def _crop_flip() -> tuple[str, str, list[Call]]:
    store = torch.randint(0, 256, (2, 6, 6, 3), dtype=torch.uint8, device=DEVICE)
    zero, flip = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones(1, dtype=torch.bool, device=DEVICE)
    arguments = (store, zero, zero, zero, flip)
    registered: Call = lambda: torch.ops.cyclegan_fast.crop_flip(*arguments, 4, 4, "auto")  # noqa: E731
    calls = [lambda: crop_flip(*arguments, (4, 4)), registered, lambda: crop_flip_ref(*arguments, (4, 4))]
    return "crop_flip, one window of 4 x 4", "forward", calls


def _pool_exchange() -> tuple[str, str, list[Call]]:
    images, buffer = _channels_last(1, 3, 4, 4), _channels_last(5, 3, 4, 4)
    count = torch.tensor([5], device=DEVICE)
    accept, slot = torch.zeros(1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    arguments = (images, buffer, count, accept, slot)
    registered: Call = lambda: torch.ops.cyclegan_fast.pool_exchange(*arguments, "auto")  # noqa: E731
    calls = [lambda: pool_exchange(*arguments), registered, lambda: pool_exchange_ref(*arguments)]
    return "pool_exchange, one picture of 4 x 4", "forward", calls


def _relu(x: Tensor) -> list[Call]:
    leaf, grad = x.clone(memory_format=torch.preserve_format).requires_grad_(), torch.randn_like(x)
    return [lambda: torch.autograd.grad(torch.relu(leaf), [leaf], grad)]


def _without_gradient(function: Callable[..., Any], *inputs: Tensor) -> Any:
    with torch.no_grad():
        return function(*inputs)


def _channels_last(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--markdown", type=Path, help="write the table as Markdown")
    parser.add_argument("--small", action="store_true", help="few calls: a check of this script, no measurement")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    content: dict[str, Any] = {"title": "What a call costs", "provenance": provenance(), "rows": []}
    lines = ["| op | direction | call, us | by the dispatcher, us | reference, us |", "|---|---|---|---|---|"]
    for op, direction, calls in rows():
        times = [microseconds(call, *((5, 2) if options.small else ())) for call in calls]
        content["rows"].append({"op": op, "direction": direction, "microseconds": times})
        cells = [*(number(us) for us in times), *[""] * (3 - len(times))]
        lines.append(f"| {op} | {direction} | {' | '.join(cells)} |")
    write_both(options.out, options.markdown, content, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
