"""Who keeps whom waiting: the processes of a run tell one another that they live, and what they are doing.

A collective operation waits for every process, so one that was killed, stopped or caught in a loop stops them all.
gloo gives up when the process group's time is over, and sees at once when a connection closes, but neither says which
process is to blame, or why. So each process has a thread that writes a line to the store of the process group about
once a second. When an operation fails, what the others last wrote, and whether they go on writing, tells: who has
stopped writing is dead, stopped or cut off; who writes that it waits too is innocent; who writes that it is doing
something else keeps the others waiting, and there.

The same thread ends its own process when that does one thing for longer than the others would wait (a loop without end,
a device that never answers), with a listing of where each thread is; and it asks for an orderly stop when the launcher
that started the process is gone, so that no process is left behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch.distributed as dist

__all__ = ["LOST_STATUS", "Heartbeat", "LostRankError"]

logger = logging.getLogger("cyclegan_fast.heartbeat")
_T = TypeVar("_T")

LOST_STATUS = 4  # exit status of a process that another one left waiting, or that hung itself
_LISTED = 8  # processes named in one message
_LOOK = 1.5  # seconds at least between two looks at who writes: a busy machine may hold up a thread for one
_PATIENCE = 2.0  # times the time-out: a process ends itself only after those that wait for it have said so


class LostRankError(RuntimeError):
    """Another process of the run ended, stopped or hangs; the message names it and the operation that waited for it."""


class Beat(NamedTuple):
    """What a process writes: a number that grows, what it is doing, whether that is waiting for others, who it is."""

    number: int
    doing: str
    waits: bool
    ended: bool
    host: str
    pid: int

    @property
    def who(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class _Activity:
    """What the main thread is doing, from the making of this object on, and whether that may take any time."""

    what: str
    waits: bool = False
    unbounded: bool = False


class Heartbeat:
    """The signs of life of this process, and what the others' signs say.

    store: a connection of its own to the store that all processes share, with a prefix that is new for each start;
    timeout: seconds that a process may keep the others waiting; launcher: id of the process whose end is the end of
    this one, or None.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, timeout: float, launcher: int | None = None
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout, self._launcher = timeout, launcher
        self._interval = min(1.0, timeout / 10)
        self._activity = _Activity("starting", unbounded=True)
        self._ended: str | None = None
        self._number = 0
        self._turns = 0
        self._lock = threading.Lock()  # one writer at a time: the number only grows
        self._stop = threading.Event()
        self._beat()
        # Two threads: a store whose owner is stopped keeps the one that writes to it for ever.
        self._threads = [
            threading.Thread(target=target, name=f"cyclegan_fast-{name}", daemon=True)
            for target, name in ((self._write, "heartbeat"), (self._guard, "guard"))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join(1.0)

    def doing(self, what: str, *, unbounded: bool = False) -> None:
        """Say what this process does from now on; unbounded: that may take longer than the time-out."""
        self._activity = _Activity(what, unbounded=unbounded)

    @contextlib.contextmanager
    def waiting(self, operation: str) -> Iterator[None]:
        """The time in which this process waits for all others; nothing but the operation belongs inside.

        Raises LostRankError, which says who did not come, for the error that the operation ends with.
        """
        outer = self._activity
        began = time.monotonic()
        self._activity = _Activity(f"`{operation}` of {outer.what}", waits=True)
        try:
            yield
        except RuntimeError as error:
            raise self.lost(operation, outer.what, time.monotonic() - began, error) from error
        self._activity = _Activity(outer.what, unbounded=outer.unbounded)

    def ended(self, reason: str) -> None:
        """Tell the others why this process leaves them."""
        self._ended = reason
        with contextlib.suppress(RuntimeError):
            _within(1.0, self._beat)

    def hand_over(self, outcome: str | None) -> str:
        """Rank 0 says how what all wait for came out; the others, with None, wait for that word and return it.

        However long it takes, they wait while rank 0 gives signs of life. Raises LostRankError when it stops to.
        """
        self._turns += 1
        key = f"turn {self._turns}"
        if outcome is not None:
            self._store.set(key, outcome)
            return outcome
        pause, heard, number = 0.02, time.monotonic(), -1
        while True:
            try:
                if _within(self._timeout, lambda: self._store.check([key])):
                    return self._store.get(key).decode()
                beat = _within(self._timeout, lambda: self._read(0))
            except RuntimeError as error:
                raise self._report(f"rank 0 is gone while the others waited for it ({_first_line(error)})") from error
            if beat is not None and beat.number != number:
                heard, number = time.monotonic(), beat.number
            elif beat is not None and time.monotonic() - heard > self._timeout:
                raise self._report(
                    f"rank 0 ({beat.who}) has given no sign of life for {time.monotonic() - heard:.0f} s, while the "
                    f"others waited for it: it was killed, stopped or cut off, last heard of in {beat.doing}"
                )
            time.sleep(pause)
            pause = min(2 * pause, self._interval / 2)

    def lost(self, operation: str, during: str, seconds: float, error: RuntimeError) -> LostRankError:
        """The error that says who failed in a collective operation that ended with ``error`` after so many seconds.

        It takes two looks, some seconds apart, to see who still writes.
        """
        try:
            before = _within(self._timeout, self._read_all)
            time.sleep(max(2.5 * self._interval, _LOOK))
            suspects = self._suspects(before, _within(self._timeout, self._read_all))
        except RuntimeError as gone:
            suspects = [
                f"the store that all processes share ({_first_line(gone)}), so the process that keeps it, the launcher "
                "or rank 0, was killed, stopped or cut off"
            ]
        shown = "; ".join(suspects[:_LISTED]) or "every other process is alive and waits too: look at the network"
        if len(suspects) > _LISTED:
            shown += f"; and {len(suspects) - _LISTED} more"
        return self._report(
            f"rank {self._rank} waited {seconds:.1f} s for the others in `{operation}` of {during} "
            f"(training.timeout is {self._timeout:g} s): {shown}. It ended with: {_first_line(error)}"
        )

    def _report(self, message: str) -> LostRankError:
        """The error, said aloud at once: to leave may take a while where a device hangs, too."""
        logger.error("cyclegan-fast: %s", message)
        self.ended(f"LostRankError: {message}")
        return LostRankError(message)

    def _suspects(self, before: dict[int, Beat | None], after: dict[int, Beat | None]) -> list[str]:
        """Who is to blame, from two looks at all other processes: those who went first come first."""
        silent: list[str] = []
        busy: list[str] = []
        ended: list[str] = []
        victims: list[str] = []
        for rank, now in after.items():
            then = before[rank]
            if now is None:
                silent.append(f"rank {rank} never gave a sign of life")
            elif now.ended:
                left = f"rank {rank} ({now.who}) ended: {now.doing}"
                (victims if now.doing.startswith(LostRankError.__name__) else ended).append(left)
            elif then is not None and then.number == now.number:
                where = f"killed, stopped or cut off, last heard of in {now.doing}"
                silent.append(f"rank {rank} ({now.who}) gives no sign of life: {where}")
            elif not now.waits:
                busy.append(f"rank {rank} ({now.who}) is alive but did not come: it is busy with {now.doing}")
        return ended + silent + busy or victims

    def _read(self, rank: int) -> Beat | None:
        key = f"rank {rank}"
        return Beat(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _read_all(self) -> dict[int, Beat | None]:
        return {rank: self._read(rank) for rank in range(self._world_size) if rank != self._rank}

    def _beat(self) -> None:
        """Write one line; the store may be gone already, as it is where its owner died."""
        with self._lock, contextlib.suppress(RuntimeError):
            self._number += 1
            activity, ended = self._activity, self._ended
            beat = Beat(
                self._number,
                activity.what if ended is None else ended,
                activity.waits,
                ended is not None,
                socket.gethostname(),
                os.getpid(),
            )
            self._store.set(f"rank {self._rank}", json.dumps(beat))

    def _write(self) -> None:
        while not self._stop.wait(self._interval):
            self._beat()

    def _guard(self) -> None:
        activity, spent, woke = self._activity, 0.0, time.monotonic()
        while not self._stop.wait(self._interval):
            self._look_at_launcher()
            slept, woke = time.monotonic() - woke, time.monotonic()
            if activity is not self._activity:
                activity, spent = self._activity, 0.0
                continue
            spent += min(slept, 2 * self._interval)  # the time in which this process was stopped does not count
            if self._world_size > 1 and not activity.unbounded and spent > _PATIENCE * self._timeout:
                self._give_up(activity.what, spent)

    def _look_at_launcher(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            logger.error("cyclegan-fast: rank %d: the launcher is gone; stopping", self._rank)
            self._launcher = None
            os.kill(os.getpid(), signal.SIGTERM)

    def _give_up(self, what: str, seconds: float) -> None:
        """End this process from here: its main thread cannot."""
        try:
            print(
                f"cyclegan-fast: rank {self._rank} has been in {what} for {seconds:.1f} s (training.timeout is "
                f"{self._timeout:g} s) and is given up; this is where it hangs:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            self.ended(f"it hung in {what}")
        finally:
            os._exit(LOST_STATUS)


def _within(seconds: float, ask: Callable[[], _T]) -> _T:
    """What is asked of the store. Raises RuntimeError when it fails, or does not answer in time."""
    answer: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:  # raised again by the thread that asked
            failure.append(error)

    thread = threading.Thread(target=run, name="cyclegan_fast-question", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise RuntimeError(f"it fails: {_first_line(failure[0])}") from failure[0]
    if not answer:
        raise RuntimeError(f"it has not answered for {seconds:g} s")
    return answer[0]


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
