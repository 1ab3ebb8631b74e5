"""Reading ahead and writing behind the work of one thread, in bounded memory and in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["pipelined"]

Job = TypeVar("Job")
Item = TypeVar("Item")
Result = TypeVar("Result")

# What may be wrong with one item, and does not end the others.
_FAILURES = (ValueError, OSError, MemoryError)


def pipelined(
    jobs: Iterable[Job],
    read: Callable[[Job], Item],
    work: Callable[[Job, Item], Result],
    write: Callable[[Job, Item, Result], None],
    *,
    cost: Callable[[Job], int],
    limit: int,
    readers: int = 1,
    writers: int = 1,
) -> Iterator[tuple[Job, Exception | None]]:
    """Each job with None, or the error it failed with, in order.

    ``read`` and ``write`` run in threads of their own, ``work`` here, so that whoever works waits for neither. Between
    the beginning of its reading and the end of its writing a job holds its ``cost`` in bytes, and all of them together
    hold ``limit`` at most, or are one. When this is closed or interrupted, what is being written is finished, and
    nothing else is begun.
    """
    budget = _Budget(limit)
    ahead: deque[tuple[int, Job, Future[Item]]] = deque()
    behind: deque[tuple[Job, Future[None]]] = deque()
    waiting = enumerate(jobs)

    def fetch(ticket: int, job: Job) -> Item:
        budget.acquire(ticket, lambda: cost(job))
        return read(job)

    def put(ticket: int, job: Job, item: Item, result: Result) -> None:
        try:
            write(job, item, result)
        finally:
            budget.release(ticket)

    reader, writer = ThreadPoolExecutor(readers, "read"), ThreadPoolExecutor(writers, "write")
    try:
        while True:
            while len(ahead) <= readers and (following := next(waiting, None)) is not None:
                ahead.append((*following, reader.submit(fetch, *following)))
            if not ahead:
                break
            ticket, job, reading = ahead.popleft()
            try:
                item = reading.result()
                result = work(job, item)
            except _FAILURES as error:
                budget.release(ticket)
                behind.append((job, _failed(error)))
            else:
                behind.append((job, writer.submit(put, ticket, job, item, result)))
                del item, result
            del reading
            while behind and behind[0][1].done():
                yield _outcome(*behind.popleft())
        while behind:
            yield _outcome(*behind.popleft())
    finally:
        budget.close()
        reader.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)
        reader.shutdown(wait=True)


def _failed(error: Exception) -> Future[None]:
    future: Future[None] = Future()
    future.set_exception(error.with_traceback(None))  # which would keep the picture alive
    return future


def _outcome(job: Job, writing: Future[None]) -> tuple[Job, Exception | None]:
    try:
        writing.result()
    except _FAILURES as error:
        return job, error
    return job, None


class _Budget:
    """Bytes for jobs, given out in the order of their tickets: a later one can never keep an earlier one waiting."""

    def __init__(self, limit: int) -> None:
        self._limit, self._next, self._closed = limit, 0, False
        self._held: dict[int, int] = {}
        self._changed = threading.Condition()

    def acquire(self, ticket: int, cost: Callable[[], int]) -> None:
        """Wait for the ticket's turn, and for room. Raises OSError once the budget is closed."""
        try:
            needed = cost()
        except _FAILURES:  # reading will say it better
            needed = 0
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (ticket == self._next and self._room_for(needed)))
            if self._closed:
                raise InterruptedError("the batch was stopped")
            self._next += 1
            self._held[ticket] = needed
            self._changed.notify_all()

    def _room_for(self, needed: int) -> bool:
        held = sum(self._held.values())
        return held == 0 or held + needed <= self._limit

    def release(self, ticket: int) -> None:
        with self._changed:
            self._held.pop(ticket, None)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
