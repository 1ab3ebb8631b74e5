"""One direction of a slow line between two TUN devices: what is read from one is written to the other so much later.

    delay_line.py SOURCE SINK SECONDS        # numbers of inherited file descriptors; ends when standard input closes

It stands in for the `netem` queue, which not every kernel has. It keeps order, loses nothing and does not limit the
rate: that is the business of the queue in front of SOURCE.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque

_LARGEST = 65536


def main() -> None:
    source, sink, delay = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    os.set_blocking(source, False)
    poller = select.epoll()
    poller.register(source, select.EPOLLIN)
    poller.register(sys.stdin.fileno(), select.EPOLLIN | select.EPOLLHUP)
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        due = waiting[0][0] - time.monotonic() if waiting else 60.0
        for descriptor, _ in poller.poll(max(due, 0.0)):
            if descriptor != source:
                return
            _take(source, waiting, delay)
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # EIO: the other end is not up yet, or no longer
                os.write(sink, packet)


def _take(source: int, waiting: deque[tuple[float, bytes]], delay: float) -> None:
    """All packets that are there; a few at a time, so that none that is due waits for those that come in."""
    for _ in range(16):
        try:
            packet = os.read(source, _LARGEST)
        except BlockingIOError:
            return
        waiting.append((time.monotonic() + delay, packet))


if __name__ == "__main__":
    main()
