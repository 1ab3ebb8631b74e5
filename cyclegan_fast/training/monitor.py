"""What a run tells while it goes on: progress bar, TensorBoard, JSON lines, picture grids.

Losses arrive as tensors on the device and stay there; the host reads them once every ``monitor.log_every`` steps,
which is the only time it waits for the device.

The speed figures of a reading are those of the whole time since the last one, checkpoints and pictures included:

    pairs_per_s  pairs of pictures a second, over all processes
    data_wait    share of the time in which the loop waited for data
    tflops       1e12 FLOP/s that the model asks for, recomputation not counted, on this process's device
    mfu          that as a share of the device's measured matrix rate in the run's precision
    bandwidth    bytes that must move at the level of fusion in use, a second, as a share of the measured copy rate
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cyclegan_fast.atomic import replacing
from cyclegan_fast.models.cost import Work
from cyclegan_fast.progress import Bar
from cyclegan_fast.roofline import Roofline

logger = logging.getLogger("cyclegan_fast.monitor")

SCALARS = "scalars.jsonl"
# The bar shows few of the scalars: one of each kind.
_BAR = ("G_A", "G_B", "cycle_A", "cycle_B", "L1_A", "L1_B", "D_A", "D_B")
_SPEED = ("pairs_per_s", "data_wait", "memory_gb", "tflops", "mfu", "bandwidth")
_BLOCK = 1000  # rows of a history that become one tensor
_WAITING_BYTES = 64 << 20  # of lines that could not be written yet
_GROUPS = {"lr": "training", **dict.fromkeys(_SPEED, "speed")}


class History:
    """Scalars of the steps since the last reading, kept on the device.

    Rows are joined a thousand at a time: a checkpoint then holds one tensor, and 50,000 steps are not as many.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._blocks: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._shared = 0  # of them, the first ones are means over all processes
        self._last: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return sum(len(block) for block in self._blocks) + len(self._rows)

    def append(self, scalars: dict[str, Tensor]) -> None:
        """Keep one step's scalars [] float32. Those that the first step did not have are read from the last step only.

        Raises KeyError when one is missing that the first step had.
        """
        if not len(self):
            self._names = list(scalars)
        self._rows.append(torch.stack([scalars[name] for name in self._names]))
        if len(self._rows) == _BLOCK:
            self._blocks.append(torch.stack(self._rows))
            self._rows = []
        self._last = {name: value for name, value in scalars.items() if name not in self._names}

    def peek(self) -> tuple[list[str], Tensor]:
        """Names and values [steps, names] on the device, steps >= 0."""
        rows = [torch.stack(self._rows)] if self._rows else []
        blocks = [*self._blocks, *rows]
        return list(self._names), torch.cat(blocks) if blocks else torch.empty(0, len(self._names))

    def share(self, average: Callable[[Tensor], Tensor]) -> None:
        """Replace the scalars of each step by their means over all processes, which all must ask for together."""
        _, values = self.peek()
        if len(values) > self._shared:
            self._blocks = [torch.cat([values[: self._shared], average(values[self._shared :])])]
            self._rows, self._shared = [], len(values)

    def take(self) -> tuple[list[str], Tensor, dict[str, Tensor]]:
        """Names, values [steps, names] on the device and the last step's extra scalars; forgets them."""
        taken = *self.peek(), self._last
        self._blocks, self._rows, self._shared, self._last = [], [], 0, {}
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The steps not read yet, so that a resumed run's records are those of an uninterrupted one; shared first."""
        names, values = self.peek()
        return {"names": names, "values": values}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue where ``state_dict`` left off, in this version or in the first, which had a list of rows."""
        blocks = [torch.stack(state["rows"])] if state.get("rows") else [state["values"]] if "values" in state else []
        self._names, self._rows, self._last = list(state["names"]), [], {}
        self._blocks = [block.to(device) for block in blocks if len(block)]
        self._shared = len(self)


class Monitor:
    """Writer of one run's records; with ``active=False`` (ranks other than 0) it writes nothing.

    ``work`` is that of one optimiser step on this process's device, ``roofline`` the device's ceilings and
    ``precision`` the resolved one of the run. Without ``work`` there is no figure of FLOP/s; without ``roofline`` there
    are no shares of its ceilings, and the log says once how to get them.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        step: int,
        total_steps: int,
        steps_per_epoch: int,
        pairs_per_step: int,
        tensorboard: bool = True,
        progress: bool = True,
        active: bool = True,
        work: Work | None = None,
        roofline: Roofline | None = None,
        precision: str = "fp32",
    ) -> None:
        self.run_dir = run_dir
        self.steps_per_epoch = steps_per_epoch
        self.pairs_per_step = pairs_per_step
        self._work, self._roofline, self._precision = work, roofline, precision
        self._board: _Board | None = None
        self._lines: _Lines | None = None
        self._bar: Bar | None = None
        self._pictures_fail = False
        self._last_time, self._last_step = time.perf_counter(), step
        self._wait = 0.0
        if not active:
            return
        if work is not None and roofline is None:
            logger.info(
                "what share of the device's speed is reached is not shown, as that was never measured: "
                "`cyclegan-fast doctor --measure` does it, once, in some seconds"
            )
        self._lines = _Lines(run_dir / SCALARS, step)
        if tensorboard:
            self._board = _Board(run_dir / "tensorboard", step)
        self._bar = Bar(
            total=total_steps,
            initial=step,
            unit="step",
            disable=not progress,
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=0.1 if sys.stderr.isatty() else 5.0,  # a log file needs fewer lines than a terminal
        )

    def waited(self, seconds: float) -> None:
        """Count time the loop spent waiting for data."""
        self._wait += seconds

    def step_done(self) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, scalars: dict[str, float], lr: float) -> None:
        """Record the window of steps that ends with ``step``: its mean losses, speed, data wait and memory."""
        now = time.perf_counter()
        seconds = max(now - self._last_time, 1e-9)
        scalars = {**scalars, "lr": lr, **self._speed(step - self._last_step, seconds)}
        self._last_time, self._last_step, self._wait = now, step, 0.0
        epoch = step / self.steps_per_epoch
        if self._lines is not None:
            self._lines.write({"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **scalars})
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add("scalar", f"{_group(name)}/{name}", value, step)
            self._board.add("scalar", "training/epoch", epoch, step)
        if self._bar is not None:
            shown = {name: f"{scalars[name]:.3f}" for name in _BAR if name in scalars}
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            self._bar.set_postfix_str(f"{text}, {_speed_words(scalars)}", refresh=sys.stderr.isatty())

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        """The speed figures of ``steps`` steps that took ``seconds``."""
        figures = {
            "pairs_per_s": steps * self.pairs_per_step / seconds,
            "data_wait": self._wait / seconds,
            "memory_gb": peak_memory_gb(),
        }
        if self._work is None:
            return figures
        rate = self._work.flop * steps / seconds
        figures["tflops"] = rate / 1e12
        if self._roofline is not None:
            if self._precision in self._roofline.matrix:
                figures["mfu"] = rate / self._roofline.matrix[self._precision]
            figures["bandwidth"] = self._work.bytes * steps / seconds / self._roofline.copy
        return figures

    def measured(self, step: int, values: dict[str, float]) -> None:
        """Record measures taken on the test samples."""
        if self._lines is not None:
            epoch = round(step / self.steps_per_epoch, 6)
            self._lines.write({"step": step, "epoch": epoch, "time": round(time.time(), 3), **values})
        if self._board is not None:
            for name, value in values.items():
                self._board.add("scalar", f"test/{name}", value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Keep a picture grid as a file of the run and in TensorBoard."""
        folder = self.run_dir / "samples"
        try:
            folder.mkdir(exist_ok=True)
            image.save(folder / f"{name}-step-{step:08d}.jpg", quality=92)
        except OSError as error:
            if not self._pictures_fail:
                logger.warning("%s: picture grids cannot be kept: %s; training goes on", folder, error)
            self._pictures_fail = True
        if self._board is not None:
            self._board.add("image", name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def text(self, name: str, text: str) -> None:
        """Show a text in TensorBoard, line by line."""
        if self._board is not None:
            self._board.add("text", name, "    " + text.replace("\n", "\n    "))

    def flush(self) -> None:
        """Bring to the disk what a checkpoint is about to put behind it: a resumed run does not record it again."""
        if self._lines is not None:
            self._lines.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self._bar, self._lines, self._board):
            if part is not None:
                part.close()


def peak_memory_gb() -> float:
    """Peak memory so far in 1e9 bytes: of the CUDA allocator where there is one, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 1024) / 1e9


def _speed_words(scalars: dict[str, float]) -> str:
    """The speed figures that are known, as the bar shows them."""
    words = [f"{scalars['pairs_per_s']:.1f} pairs/s"]
    if "tflops" in scalars:
        words.append(f"{scalars['tflops']:.3g} TFLOP/s")
    shares = {"mfu": "MFU", "bandwidth": "bandwidth", "data_wait": "data wait"}
    words += [f"{shares[name]} {100 * scalars[name]:.0f} %" for name in shares if name in scalars]
    return ", ".join([*words, f"{scalars['memory_gb']:.1f} GB"])


def _group(name: str) -> str:
    if name in _GROUPS:
        return _GROUPS[name]
    if name.startswith("grad_"):
        return "gradients"
    return "scores" if name.endswith(("_real", "_fake")) else "loss"


class _Lines:
    """Records as JSON lines behind those of a file. Lines that cannot be written wait in memory and are tried again."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step = path, step
        self._file: int | None = None
        self._waiting = b""
        self._failed = False
        self.flush()

    def write(self, record: dict[str, Any]) -> None:
        if len(self._waiting) < _WAITING_BYTES:
            # JSON has no NaN and no infinity: null, which a reader cannot take for a number.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self._waiting += json.dumps(finite, allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        try:
            if self._file is None:
                self._file = _open_scalars(self._path, self._step)
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._failed:
                logger.warning(
                    "%s: the losses cannot be recorded: %s; training goes on, and tries again at every reading",
                    *(self._path, error.strerror or error),
                )
            self._failed = True

    def close(self) -> None:
        self.flush()
        if self._waiting:
            logger.warning("%s: lacks the last %d records", self._path, self._waiting.count(b"\n"))
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _open_scalars(path: Path, step: int) -> int:
    """Open the JSON lines for appending, without lines after ``step``: a resumed run writes those again."""
    kept = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                logger.warning("%s: left out a line that is not a record (a write that was cut off?)", path)
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    return os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))


class _Board:
    """TensorBoard's events. What they are worth is not worth a run: at the first failure they end, with a warning."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer: Any = None
        with self._ending():
            purge = step + 1 if step else None
            self._writer = SummaryWriter(str(folder), purge_step=purge, max_queue=1000, flush_secs=20)

    def add(self, kind: str, *arguments: Any, **options: Any) -> None:
        """Add a scalar, an image or a text."""
        if self._writer is not None:
            with self._ending():
                getattr(self._writer, f"add_{kind}")(*arguments, **options)

    def flush(self) -> None:
        if self._writer is not None:
            with self._ending():
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._ending():
                self._writer.close()
        self._writer = None

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever TensorBoard raises, from its thread too
            logger.warning("%s: TensorBoard's events cannot be kept: %s; training goes on", self._folder, error)
            writer, self._writer = self._writer, None
            with contextlib.suppress(Exception):
                writer.close()
