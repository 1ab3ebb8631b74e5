"""How a microbenchmark is timed, and the table its rows become.

Time is the median of many rounds. On CUDA a round replays a CUDA graph that holds several calls, so that the gaps
between launches vanish for every contestant alike, and the calls go round over several sets of inputs, together larger
than the L2 cache, so that each finds its input in device memory. On the CPU a round is one call on the machine's own
number of threads, whose inputs may lie in its caches from the last one, or, `cold`, calls on as many sets as make its
caches useless, each of which keeps its result until it has the next. A bandwidth counts the bytes that the operation
must move, whatever a contestant moves, and stands beside that of a copy of as many bytes, timed in the same way in the
same run; on the CPU just before and just after.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import provenance as origin
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Call = Callable[[], Any]
_COLUMNS = ("shape", "batch", "type", "direction", "contestant", "ms", "± %", "× NCHW", "× NHWC", "GB/s", "of copy",
            "TFLOP/s", "MiB")  # fmt: skip
_EXPLANATION = (
    "Medians. `× NCHW` and `× NHWC` are how many times faster it is than eager PyTorch in that memory order, at one "
    "shape, type and direction; GB/s are the bytes that must be moved over the time, `of copy` is against a copy of as "
    "many bytes in this run; memory is what one call needs beyond its inputs."
)


@dataclass
class Row:
    """One contestant at one shape."""

    op: str
    shape: str
    batch: int
    dtype: str
    direction: str  # "forward" or "forward + backward"
    contestant: str
    ms: float | None = None  # median
    spread: float | None = None  # (third quartile - first) / median
    gbs: float | None = None  # 1e9 bytes that must be moved, per second
    copy_gbs: float | None = None  # a copy that moves as many
    tflops: float | None = None
    peak_mib: float | None = None  # memory beyond the inputs, in one call
    how: str = ""  # "graph", "events" or "host"
    error: str = ""


@dataclass
class Table:
    """Rows, written to disk after each one, so that a run cut short still tells something."""

    name: str
    folder: Path
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=origin.provenance)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"provenance": self.facts, "rows": [asdict(row) for row in self.rows]}
        (self.folder / f"{self.name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (self.folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        lines = [f"# {self.name}", "", origin.as_text(self.facts), "", _EXPLANATION]
        for op in dict.fromkeys(row.op for row in self.rows):
            rows = [row for row in self.rows if row.op == op]
            lines += ["", f"## {op}", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
            for first in rows:  # those that can be compared stand together, in the order in which they came
                group = [row for row in rows if _comparable(row, first)]
                if group[0] is first:
                    lines += [self._line(row) for row in group]
        return "\n".join(lines) + "\n"

    def _line(self, row: Row) -> str:
        cells: list[Any] = [row.shape, row.batch, row.dtype, row.direction, row.contestant]
        if row.ms is None:
            return "| " + " | ".join(str(cell) for cell in [*cells, row.error, *[""] * 7]) + " |"
        cells += [f"{row.ms:.4g}", f"{100 * row.spread:.0f}" if row.spread is not None else ""]
        peers = {other.contestant: other.ms for other in self.rows if _comparable(other, row) and other.ms}
        for base in (peers.get("eager NCHW", peers.get("eager PyTorch")), peers.get("eager channels-last")):
            cells.append(f"{base / row.ms:.2f}" if base else "")
        cells += [f"{row.gbs:.0f}" if row.gbs and row.gbs >= 100 else f"{row.gbs:.1f}" if row.gbs else ""]
        cells.append(f"{100 * row.gbs / row.copy_gbs:.0f} %" if row.gbs and row.copy_gbs else "")
        cells += [f"{row.tflops:.3g}" if row.tflops else "", f"{row.peak_mib:.1f}" if row.peak_mib is not None else ""]
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _comparable(a: Row, b: Row) -> bool:
    return (a.op, a.shape, a.batch, a.dtype, a.direction) == (b.op, b.shape, b.batch, b.dtype, b.direction)


@dataclass(frozen=True)
class Timing:
    ms: float
    spread: float
    how: str


def measure(
    row: Row,
    make: Callable[[], Call],
    *,
    must_move: float,
    flop: float = 0.0,
    seconds: float = 0.4,
    timer: Callable[[Call, int], list[float]] | None = None,
    cold: bool = False,
) -> Row:
    """Fill in a row. make() returns a call on inputs of its own; must_move in bytes and flop count one call.

    timer(call, rounds) -> seconds of each round; pytest-benchmark's, where a test calls this.
    """
    sets = _sets(must_move, cold)
    calls = [make() for _ in range(sets)]
    row.peak_mib = _peak(calls[0])
    before = copy_rate(int(must_move), cold) if must_move else 0.0
    timing = timed(calls, seconds, timer)
    row.ms, row.spread, row.how = timing.ms, timing.spread, timing.how
    if must_move:
        row.gbs = must_move / timing.ms / 1e6
        row.copy_gbs = (before + copy_rate(int(must_move), cold)) / 2
    if flop:
        row.tflops = flop / timing.ms / 1e9
    return row


def timed(calls: Sequence[Call], seconds: float, timer: Callable[[Call, int], list[float]] | None = None) -> Timing:
    """The median time of one of `calls`, which are run round robin for about `seconds`."""
    for call in calls:
        call()  # compiles, allocates, and lets libraries choose
    run, count, how = _on_gpu(calls) if DEVICE.type == "cuda" else (*_on_cpu(calls), "host")
    run()
    start = time.perf_counter()
    run()
    rounds = max(5, min(200, int(seconds / max(time.perf_counter() - start, 1e-7))))
    times = (timer or _host_timer)(run, rounds)
    median = statistics.median(times)
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    return Timing(median * 1e3 / count, (quarters[2] - quarters[0]) / median, how)


def _host_timer(run: Call, rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _on_cpu(calls: Sequence[Call]) -> tuple[Call, int]:
    kept: list[Any] = [None] * len(calls)

    def run() -> None:
        for i, call in enumerate(calls):
            result = call()
            if len(calls) > 1:  # what is kept is not written over at once, so that results are cold as well
                kept[i] = result

    return run, len(calls)


def _on_gpu(calls: Sequence[Call]) -> tuple[Call, int, str]:
    """All calls in a CUDA graph, several times over if they are short, and a wait for its end."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    # At least a millisecond a round: what launching a graph and waiting for it takes is below 2 % of that.
    repeats = max(1, min(50, math.ceil(1e-3 / (time.perf_counter() - start))))
    count = repeats * len(calls)
    try:
        graph = _captured([*calls] * repeats)
    except Exception as error:  # whatever cannot be captured is timed as it is
        torch.cuda.synchronize()
        how = f"stream ({type(error).__name__} in capture)"

        def run() -> None:
            for call in [*calls] * repeats:
                call()
            torch.cuda.synchronize()

        return run, count, how

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, count, "graph"


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _sets(must_move: float, cold: bool) -> int:
    """How many sets of inputs make the caches useless, where that is wanted: on a GPU, and on the CPU if `cold`."""
    if not must_move:
        return 1
    if DEVICE.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 64 << 20)
        return max(1, min(16, math.ceil(2 * cache / must_move)))
    # An operation reads nothing that is smaller than a quarter of what it moves.
    return max(2, min(128, math.ceil(8 * _last_cache() / must_move))) if cold else 1


def _last_cache() -> int:
    """Bytes of the processor's largest cache; 64 MiB where that is not known."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1:], 0))
    return max(sizes, default=64 << 20)


def copy_rate(must_move: int, cold: bool = False) -> float:
    """GB/s, read and written together, of a copy that moves as many bytes; timed as everything else.

    Just now: on a machine that others use too, the rate of memory is another one a minute later.
    """
    if DEVICE.type == "cuda":
        return _lasting_copy_rate(must_move, cold)
    return _copied(_copies(must_move, cold), must_move, 0.1)


@functools.lru_cache(maxsize=64)
def _lasting_copy_rate(must_move: int, cold: bool) -> float:
    return _copied(_copies(must_move, cold), must_move, 0.2)


def _copied(calls: Sequence[Call], must_move: int, seconds: float) -> float:
    return 2 * (must_move // 2) / timed(calls, seconds).ms / 1e6


@functools.lru_cache(maxsize=1)
def _copies(must_move: int, cold: bool) -> list[Call]:
    half = max(must_move // 2, 1)

    def make() -> Call:
        source = torch.randint(0, 255, (half,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [make() for _ in range(_sets(must_move, cold))]


def _peak(call: Call) -> float | None:
    """MiB that one call holds at its peak beyond what was there before; None where that cannot be known."""
    call()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
        call()
        peak = _resident("VmHWM")
        return max(peak - before, 0.0) if peak is not None and before is not None else None
    return None


def _resident(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")), None)


def forward(function: Callable[..., Tensor], *inputs: Tensor | None) -> Call:
    """A call without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def forward_backward(function: Callable[..., Tensor], gradient: Tensor, *inputs: Tensor | None) -> Call:
    """A call that also takes the gradients of all inputs that are floating."""
    leaves = [x for x in inputs if x is not None and x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(function(*inputs), leaves, gradient)


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Compiled functions of one benchmark do not become those of the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(*shape: int, dtype: torch.dtype, nhwc: bool) -> Tensor:
    """Normal numbers on the device in one of the two memory orders."""
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.randn(shape, dtype=dtype, device=DEVICE).contiguous(memory_format=layout)
