"""Contestants that take turns, each in a process of its own.

What one of them compiles, lets a library choose, switches or keeps in memory cannot touch another; one that fails, runs
out of memory or compiles for ever is dropped, with its reason, and the rest goes on. While one works, the others wait
for an order. They go round and round in the same order, so what changes on the machine meanwhile changes all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import gc
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

Call = Callable[[], Any]
# A warm-up ends when a call takes no longer than this times the fastest one before it, and no later than a call of
# so many seconds: on a CPU a step may take half a minute.
_SETTLED = 1.2
_LONG = 2.0
_GIB = 2.0**30
# Memory that a contestant on a GPU may keep cached while others work.
_KEPT = 4 << 30
START_METHOD: Literal["spawn", "forkserver"] = "spawn"  # of the processes, which begin with nothing of this one


class NotHereError(Exception):
    """What a contestant needs is not installed or not possible here; no failure."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    make: builds everything in the contestant's own process and returns the call that is timed; it must survive
    pickling, so a module's function or a `functools.partial` of one. The call may only queue work on a GPU.
    """

    name: str
    make: Callable[[], Call]
    role: str = ""  # which column of ratios it is the measure of
    precision: str = ""
    needs: float = 0.0  # seconds that building it is worth starting with


@dataclass
class Profile:
    """One call under the profiler."""

    kernels: int  # on the GPU; on the CPU, operators that call no other
    copy_share: float  # of the time, in aten::copy_ (CPU)
    top: list[tuple[str, int, float, float]]  # name, calls, ms, share of the time


@dataclass
class Result:
    """What was measured of a contestant; everything None until it was."""

    name: str
    role: str = ""
    precision: str = ""
    seconds: list[float] = field(default_factory=list)  # of one call, one figure a round
    build_seconds: float | None = None
    peak_gib: float | None = None
    profile: Profile | None = None
    error: str = "not run: out of time"

    @property
    def ms(self) -> float | None:
        """Median time of a call."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Half the distance between the quartiles, or with less than four rounds the extremes, over the median."""
        if len(self.seconds) < 2:
            return None
        quarters = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 3 else sorted(self.seconds)
        return (quarters[-1] - quarters[0]) / 2 / statistics.median(self.seconds)


class Field:
    """All contestants for one task. Use it as a context manager: leaving it ends their processes.

    deadline: `time.monotonic()` after which nothing new begins; label: stands before what is said about them.
    """

    def __init__(self, deadline: float, label: str = "") -> None:
        self.deadline, self.label = deadline, label
        self.parallel = max(1, cores() // 2)  # processes that load at the same time
        self.results: list[Result] = []
        self._turns = tempfile.NamedTemporaryFile(prefix="turns-")  # noqa: SIM115 - closed by __exit__
        self._running: list[tuple[_Worker, Result]] = []

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker, _ in self._running:
            worker.end()
        self._running = []
        self._turns.close()

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def reserve(self) -> float:
        """Seconds that four rounds of those that are ready would take."""
        return 4 * sum(worker.estimate for worker, _ in self._running)

    def enter(self, contestants: Sequence[Contestant], patience: float = float("inf")) -> None:
        """Build contestants, warm them up and measure their memory; at most `patience` seconds each.

        Their processes load at the same time, but work one at a time: libraries choose their algorithms by timing them.
        """
        waiting = list(contestants)
        building: list[tuple[_Worker, Result, float]] = []
        while waiting or building:
            while waiting and len(building) < self.parallel:
                contestant = waiting.pop(0)
                result = Result(contestant.name, contestant.role, contestant.precision)
                self.results.append(result)
                free = self.left() - self.reserve()
                if free < contestant.needs or free <= 0:
                    say(f"{self.label}{contestant.name}: no time left")
                    continue
                say(f"{self.label}{contestant.name}: building")
                worker = _Worker(contestant.make, self._turns.name)
                worker.send("build")
                building.append((worker, result, time.monotonic() + min(patience, free)))
            building = [one for one in building if not self._built(*one)]

    def _built(self, worker: _Worker, result: Result, until: float) -> bool:
        """Wait a moment; whether the worker has come to an end of building, a good or a bad one."""
        if not worker.connection.poll(0.05) and time.monotonic() < until:
            return False
        answer = self._answer(worker, result, 0.0)
        if answer is not None:
            result.build_seconds, result.peak_gib, worker.estimate = answer
            result.error = "not run: built, but no time left to measure"
            self._running.append((worker, result))
            pace = f"{1e3 * worker.estimate:.4g} ms a call"
            say(f"{self.label}{result.name}: ready after {result.build_seconds:.1f} s, {pace}")
        return True

    def run(self, seconds: float, *, rounds: int = 9, least: float = 0.2) -> None:
        """Up to `rounds` rounds within `seconds`, a turn of a contestant being calls for at least `least` seconds.

        A contestant takes its turn only if that fits in the time left, so the slowest get fewer.
        """
        end = time.monotonic() + min(seconds, self.left())
        for _ in range(rounds):
            for worker, result in list(self._running):
                calls = max(1, round(least / max(worker.estimate, 1e-6)))
                # The first turn comes in any case: without it all the building was for nothing.
                if result.seconds and time.monotonic() + 1.1 * calls * worker.estimate > end:
                    continue
                if (taken := self._ask(worker, result, 60 + 20 * calls * worker.estimate, "turn", calls)) is not None:
                    result.seconds.append(taken)
                    worker.estimate = taken
                    result.error = ""
        for worker, result in list(self._running):
            if result.profile is None and result.seconds and self.left() > 3 * worker.estimate:
                result.profile = self._ask(worker, result, 120 + 60 * worker.estimate, "profile")
            if result.ms is not None:
                say(f"{self.label}{result.name}: {result.ms:.4g} ms, {len(result.seconds)} rounds")

    def _ask(self, worker: _Worker, result: Result, patience: float, *order: Any) -> Any:
        with contextlib.suppress(OSError):  # it has died; the answer says how
            worker.send(*order)
        return self._answer(worker, result, patience)

    def _answer(self, worker: _Worker, result: Result, patience: float) -> Any:
        """What the worker says; None if it failed, which is then noted and the end of it."""
        error, answer = worker.receive(patience)
        if not error:
            return answer
        result.error = error
        say(f"{self.label}{result.name}: {error}")
        worker.end()
        self._running = [one for one in self._running if one[0] is not worker]
        return None


class _Worker:
    """The side of this process of a contestant's process."""

    def __init__(self, make: Callable[[], Call], turns: str) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self.connection, theirs = context.Pipe()
        self.estimate = 0.0  # seconds of a call
        self._process = context.Process(target=_serve, args=(theirs, make, turns))
        self._process.start()
        theirs.close()

    def send(self, *order: Any) -> None:
        self.connection.send(order)

    def receive(self, patience: float) -> tuple[str, Any]:
        """(what went wrong or "", the answer), after at most `patience` seconds."""
        if not self.connection.poll(max(patience, 0.0)):
            return "stopped: out of time", None
        try:
            error, answer = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return f"its process ended with status {self._process.exitcode}", None
        return error, answer

    def end(self) -> None:
        self.connection.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, make: Callable[[], Call], turns: str) -> None:
    """A contestant's process: obey orders until there are no more. turns: a file that whoever builds has locked."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(cores())
    state: dict[str, Call] = {}

    def build() -> tuple[float, float | None, float]:
        if torch.cuda.is_available():
            torch.cuda.init()
        with _locked(turns):
            before, start = _resident("VmRSS"), time.perf_counter()
            state["call"] = make()
            estimate, peak = warm_up(state["call"], before)
            return time.perf_counter() - start, peak, estimate

    orders: dict[str, Callable[..., Any]] = {
        "build": build,
        "turn": lambda calls: turn(state["call"], calls),
        "profile": lambda: profile(state["call"]),
    }
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            order, *arguments = connection.recv()
            try:
                answer = ("", orders[order](*arguments))
            except NotHereError as error:
                answer = (str(error), None)
            except Exception as error:
                if not isinstance(error, torch.OutOfMemoryError):
                    traceback.print_exc()
                lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
                answer = (lines[0][:200], None)
            connection.send(answer)


@contextlib.contextmanager
def _locked(file: str) -> Iterator[None]:
    """Wait for the file's lock, which also the death of its holder releases."""
    with open(file, "rb") as handle:  # noqa: PTH123 - a lock belongs to an open file
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _end_with_parent() -> None:
    """Die with the process that gives the orders, also in the middle of a compilation."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def warm_up(call: Call, resident_before: float | None) -> tuple[float, float | None]:
    """Call until the time has settled; (seconds of a call, GiB at its peak: see `peak_gib`)."""
    turn(call, 1)  # compiles, and lets libraries choose
    start = time.perf_counter()
    peak = peak_gib(call, resident_before)
    best = time.perf_counter() - start
    for _ in range(6):
        if best > _LONG:
            break
        taken = turn(call, 1)
        best, settled = min(best, taken), taken < _SETTLED * best
        if settled:
            break
    return best, peak


def turn(call: Call, calls: int) -> float:
    """Seconds of one call, of `calls` in a row without a wait between them."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_gpu:
        call()  # memory that was given back is there again
    synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise()
    taken = (time.perf_counter() - start) / calls
    if on_gpu and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > _KEPT:
        torch.cuda.empty_cache()
    return taken


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that benchmarks with contestants share."""
    long = 20.0 if torch.cuda.is_available() else 300.0
    parser.add_argument("--only", choices=("all", "ours", "peers"), default="all", help="who takes part")
    parser.add_argument("--match", type=re.compile, help="only contestants with this regular expression in their name")
    parser.add_argument("--small", action="store_true", help="toy networks: a check of this script, no measurement")
    parser.add_argument("--seconds", type=float, default=600.0, help="nothing new begins after so many")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant, between those of the others")
    parser.add_argument("--round-seconds", type=float, default=long, help="for all of these turns")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write (default: standard output)")


def takes_part(contestant: Contestant, options: argparse.Namespace) -> bool:
    """Whether the options want it."""
    ours = contestant.role == "ours"
    if options.only != "all" and ours != (options.only == "ours"):
        return False
    return options.match is None or bool(options.match.search(contestant.name))


def synchronise() -> None:
    """Wait for the GPU, if there is one at work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_gib(call: Call, resident_before: float | None) -> float | None:
    """GiB in use at the peak of a call: weights, gradients, optimisers, activations, the pools of CUDA graphs.

    On the CPU it is what the process holds beyond `resident_before`, compiled code and library buffers included; None
    where that cannot be known.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held, before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (held + torch.cuda.max_memory_allocated() - before) / _GIB
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
        call()
        peak = _resident("VmHWM")
        return peak - resident_before if peak is not None and resident_before is not None else None
    return None


def _resident(name: str) -> float | None:
    """GiB of this process's memory, VmRSS now or VmHWM at its highest."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 2**20
    return None


def profile(call: Call, rows: int = 15) -> Profile:
    """One call under torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        synchronise()
    events = profiler.events() or []
    times: dict[str, list[float]] = {}
    kernels = 0
    for event in events:
        if on_gpu:
            if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
                continue
            kernels += 1
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
        else:
            kernels += "::" in event.name and not any("::" in child.name for child in event.cpu_children)
            times.setdefault(event.name, []).append(event.self_cpu_time_total)
    total = sum(sum(values) for values in times.values()) or 1.0
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))[:rows]
    top = [(name, len(values), sum(values) / 1e3, sum(values) / total) for name, values in ranked]
    return Profile(kernels, sum(times.get("aten::copy_", [0.0])) / total, top)
