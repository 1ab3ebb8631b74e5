"""Whether all that a run computes and holds is a number; where it is not, what is kept to look at and what is said.

Losses and gradients' norms are looked at where the host reads them anyway, weights and moments before they are saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from cyclegan_fast import distributed
from cyclegan_fast.data.loader import PairLoader
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training.experiment import listed
from cyclegan_fast.training.monitor import History
from cyclegan_fast.training.state import RunState

__all__ = ["Health", "NonFiniteLossError", "is_norm"]

_LEAST_SCALE = 2.0**-10  # fp16: below it every gradient overflows, and no scale will help


class NonFiniteLossError(RuntimeError):
    """A loss, a gradient or a weight is no longer a number; the message names these, the step and its pictures."""


class Health:
    """The checks of one run.

    content: gives all that a checkpoint holds, for what is kept to look at.
    """

    def __init__(
        self,
        run_dir: Path,
        state: RunState,
        history: History,
        loader: PairLoader,
        content: Callable[[], dict[str, Any]],
    ) -> None:
        self._run_dir, self._state, self._history = run_dir, state, history
        self._loader, self._content = loader, content
        self._healthy_step = -1

    def check_scalars(self, step: int) -> None:
        """Raise NonFiniteLossError, on all ranks together, if a scalar not read yet is no number; every rank must call.

        step: the last one done, from 1. The host waits for the device.
        """
        bad = self._first_bad(step)
        if distributed.any_rank(bad is not None):  # all ranks stop together
            self._report(step, *(bad or (step, [])), together=True)
        scaler = self._state.step.scaler
        if scaler.is_enabled() and scaler.get_scale() < _LEAST_SCALE:
            what = f"every gradient at every loss scale down to {scaler.get_scale():.2g}"
            self._report(step, step, [what], together=True)

    def check_state(self, step: int) -> None:
        """Raise NonFiniteLossError if a checkpoint of this moment would hold anything that is no number."""
        if self._healthy_step == step:
            return
        if (bad := self._first_bad(step)) is not None:
            self._report(step, *bad, together=False)
        # A finite sum of squares has finite terms, and on a CPU it is ten times as fast as looking at each.
        norm = torch.nn.utils.get_total_norm([tensor for _, tensor in self._state.trained()])
        if not math.isfinite(float(norm)) and self._broken():
            self._report(step, step, [], together=False)
        self._healthy_step = step

    def _first_bad(self, step: int) -> tuple[int, list[str]] | None:
        """The first step not read yet with scalars that are no numbers, and their names; waits for the device.

        A loss scaler lets gradients overflow and leaves such steps out.
        """
        names, values = self._history.peek()
        scaled = self._state.step.scaler.is_enabled()
        checked = [i for i, name in enumerate(names) if not (is_norm(name) and scaled)]
        finite = values[:, checked].isfinite()
        if bool(finite.all()):
            return None
        row = int((~finite).any(dim=1).nonzero()[0])
        bad = [names[i] for i, good in zip(checked, finite[row].tolist(), strict=True) if not good]
        return step - len(values) + row + 1, bad

    def _broken(self) -> list[str]:
        """Names of the weights and moments that are not all numbers."""
        return [name for name, tensor in self._state.trained() if not bool(tensor.isfinite().all())]

    def _report(self, done: int, step: int, names: list[str], *, together: bool) -> NoReturn:
        """Keep the state after the step `done` to look at, and raise NonFiniteLossError.

        step: where it began, from 1; names: of its scalars that are no numbers.
        """
        batch = self._loader.batch(step - 1)
        names_A, names_B = self._loader.names_of(batch.index_A, batch.index_B)
        broken = self._broken()
        kept = ""
        if distributed.is_main():
            path = ckpt.checkpoint_dir(self._run_dir) / f"nonfinite-{done:08d}.ckpt"
            try:
                ckpt.write_checkpoint(path, self._content())
                kept = f" The state after step {done} is in {path}."
            except ckpt.CheckpointError as error:  # what is wrong with the training says more than a full disk
                kept = f" The state could not be kept: {error}."
        if together:
            distributed.any_rank(True)  # no rank leaves before the file is whole: torchrun ends them all with the first
        what = ", ".join(names) or (listed(broken) if broken else "a loss of another rank")
        where = f" No numbers after step {done}: {listed(broken)}." if names and broken else ""
        raise NonFiniteLossError(
            f"{what} became infinite or NaN in step {step} (epoch {batch.epoch}); the pictures of that step: "
            f"A {', '.join(names_A)}; B {', '.join(names_B)}.{where}{kept} The checkpoints before it are untouched. A "
            "lower training.lr, or precision fp32, often helps"
        )


def is_norm(name: str) -> bool:
    """Whether a scalar is the norm of a gradient."""
    return name.startswith("grad_")
