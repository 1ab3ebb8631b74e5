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

import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cyclegan_fast.models.cost import Work
from cyclegan_fast.roofline import Roofline

logger = logging.getLogger("cyclegan_fast.monitor")

SCALARS = "scalars.jsonl"
# The bar shows few of the scalars: one of each kind.
_BAR = ("G_A", "G_B", "cycle_A", "cycle_B", "D_A", "D_B")
_SPEED = ("pairs_per_s", "data_wait", "memory_gb", "tflops", "mfu", "bandwidth")
_GROUPS = {"lr": "training", **dict.fromkeys(_SPEED, "speed")}


class History:
    """Scalars of the steps since the last reading, kept on the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._shared = 0  # of them, the first ones are means over all processes
        self._last: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, scalars: dict[str, Tensor]) -> None:
        """Keep one step's scalars [] float32. Those that not every step has are read from the last step only."""
        if not self._rows:
            self._names = list(scalars)
        self._rows.append(torch.stack([scalars[name] for name in self._names]))
        self._last = {name: value for name, value in scalars.items() if name not in self._names}

    def share(self, average: Callable[[Tensor], Tensor]) -> None:
        """Replace the scalars of each step by their means over all processes, which all must ask for together."""
        if len(self._rows) > self._shared:
            self._rows[self._shared :] = average(torch.stack(self._rows[self._shared :])).unbind()
            self._shared = len(self._rows)

    def take(self) -> tuple[list[str], Tensor, dict[str, Tensor]]:
        """Names, values [steps, names] on the device and the last step's extra scalars; forgets them."""
        taken = self._names, torch.stack(self._rows), self._last
        self._rows, self._shared, self._last = [], 0, {}
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The steps not read yet, so that a resumed run's records are those of an uninterrupted one; shared first."""
        return {"names": list(self._names), "rows": [row.clone() for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue where ``state_dict`` left off."""
        self._names, self._rows = list(state["names"]), [row.to(device) for row in state["rows"]]
        self._shared = len(self._rows)
        self._last = {}


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
        self._writer: Any = None
        self._lines: TextIO | None = None
        self._bar: tqdm[Any] | None = None
        self._last_time, self._last_step = time.perf_counter(), step
        self._wait = 0.0
        if not active:
            return
        if work is not None and roofline is None:
            logger.info(
                "what share of the device's speed is reached is not shown, as that was never measured: "
                "`cyclegan-fast doctor --measure` does it, once, in some seconds"
            )
        self._lines = _open_scalars(run_dir / SCALARS, step)
        if tensorboard:
            self._writer = _open_tensorboard(run_dir / "tensorboard", step)
        self._bar = tqdm(
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
            record = {"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **scalars}
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(f"{_group(name)}/{name}", value, step)
            self._writer.add_scalar("training/epoch", epoch, step)
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
            record = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **values}
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"test/{name}", value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Keep a picture grid as a file of the run and in TensorBoard."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{name}-step-{step:08d}.jpg", quality=92)
        if self._writer is not None:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def text(self, name: str, text: str) -> None:
        """Show a text in TensorBoard, line by line."""
        if self._writer is not None:
            self._writer.add_text(name, "    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self._bar, self._lines, self._writer):
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


def _open_scalars(path: Path, step: int) -> TextIO:
    """Open the JSON lines for appending, without lines after ``step``: a resumed run writes those again."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: left out a line that is not a record (a write that was cut off?)", path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
    return path.open("a", encoding="utf-8")


def _open_tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None, max_queue=1000, flush_secs=20)
