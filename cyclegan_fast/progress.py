"""The progress bar of long work, which never ends or stops the work itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

__all__ = ["Bar"]

if TYPE_CHECKING:
    _Tqdm = tqdm[Any]
else:
    _Tqdm = tqdm


class Bar(_Tqdm):
    """tqdm by the monotonic clock: set back an hour, the system's would stop the bar for an hour.

    A bar that cannot be drawn, because standard error is a file on a full disk, say, is drawn no more.
    """

    monitor_interval = 0  # its thread goes by the system's clock

    @property
    def _time(self) -> Callable[[], float]:
        return time.monotonic

    @_time.setter
    def _time(self, clock: Callable[[], float]) -> None:
        """Ignore the clock that tqdm sets."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What writes the bar to a file: nothing where even that fails."""
        try:
            printer: Callable[[str], None] = tqdm.status_printer(file)
        except (OSError, ValueError):
            return lambda _: None
        return printer

    def display(self, *arguments: Any, **options: Any) -> Any:
        """Draw the bar. An error raised from here would leave tqdm's lock held, and other bars waiting for it."""
        try:
            return super().display(*arguments, **options)
        except (OSError, ValueError):
            self.disable = True

    def close(self) -> None:
        """End the bar, leaving it where it is."""
        with contextlib.suppress(OSError, ValueError):
            super().close()
