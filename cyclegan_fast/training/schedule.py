"""The learning-rate rule."""

from __future__ import annotations

import math

__all__ = ["lr_factor", "lr_scale"]


def lr_factor(epoch: int, epochs: int, epochs_decay: int) -> float:
    """What the base learning rate is multiplied by in `epoch`, counted from 1 over the whole run.

    1 for the first `epochs` epochs, then linear decay over `epochs_decay` more:
    1 - max(0, epoch - epochs) / (epochs_decay + 1), so the last epoch still learns, and 0 from then on. With
    `epochs_decay` 0 it is 1 throughout. With 100 + 100 epochs and 2e-4: epoch 100 has 2e-4, 101 has 1.980e-4 and 200
    has 1.98e-6 (the paper's section 7.1; of the rules in use, the de-facto one counted in absolute epochs).

    Raises ValueError for an epoch before 1 or a negative count.
    """
    if epoch < 1:
        raise ValueError(f"epoch = {epoch} is not allowed: epochs count from 1")
    if epochs < 0 or epochs_decay < 0:
        raise ValueError(f"epochs = {epochs} and epochs_decay = {epochs_decay} must not be negative")
    if epochs_decay == 0:
        return 1.0
    return max(0.0, 1.0 - max(0, epoch - epochs) / (epochs_decay + 1))


def lr_scale(rule: str, pairs: int) -> float:
    """What the base learning rate is multiplied by for steps of so many pairs, over all micro-batches and processes.

    `none`: 1; `linear`: their number (Goyal et al. 2017, arXiv:1706.02677); `sqrt`: its square root (for Adam: Malladi
    et al. 2022, arXiv:2205.10287). It depends on the pairs and not on the processes, so a run that goes on with another
    number of these, and the same pairs a step, goes on with its learning rate.

    Raises ValueError for another rule or less than one pair.
    """
    if pairs < 1:
        raise ValueError(f"pairs = {pairs} is not allowed: a step has at least one")
    factors = {"none": 1.0, "linear": float(pairs), "sqrt": math.sqrt(pairs)}
    if rule not in factors:
        raise ValueError(f"learning-rate scaling {rule!r} is not known: one of {', '.join(factors)}")
    return factors[rule]
