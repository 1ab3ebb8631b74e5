"""Whether all processes still hold one and the same state: by a hash of its bits, taken on the device.

Every process updates its own copy of the networks by the same gradients, so the copies stay equal to the bit. Where
they do not (a faulty memory, another version of a library on one of the hosts, a process that loaded another file),
averaged gradients hide it from the losses while each process trains a network of its own.

The hash is a sum of integers, modulo 2**64, and so the same in whatever order a device adds. A single value that
differs always changes it; several that differ go unnoticed by a coincidence of one in some 2**64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from cyclegan_fast import distributed

__all__ = ["ReplicaError", "Replicas", "fingerprint"]

_COLUMNS = 1024
# Odd, so that multiplying by it, or by the odd numbers made of it, loses nothing modulo 2**64.
_MIX = 0x9E37_79B9_7F4A_7C15 - 2**64

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(RuntimeError):
    """The processes hold different states; the message names the step, the parts and the ranks."""


class Replicas:
    """The checks of one run.

    parts: gives the state to compare, tensors by the name of what they belong to; the same names on every process.
    every: steps between checks, 0 for none. With a single process nothing is done.
    """

    def __init__(self, parts: Callable[[], Mapping[str, Iterable[Tensor]]], *, every: int) -> None:
        self._parts, self._every = parts, every
        self._equal_at: int | None = None  # the last step at which all were the same

    def due(self, step: int, *, last: bool) -> bool:
        """Whether to check after this step, the same on every rank: also after the last one of a run."""
        return bool(self._every) and distributed.world_size() > 1 and (last or step % self._every == 0)

    def check(self, step: int) -> None:
        """Compare the states of all ranks after `step` steps; every rank must call. The host waits for the device.

        Raises ReplicaError on every rank when they differ.
        """
        if distributed.world_size() == 1:
            return
        names, tensors = zip(*self._parts().items(), strict=True)
        # The step is part of it: a rank that found another checkpoint would else wait for the others for ever.
        values = torch.stack([*(fingerprint(part).cpu() for part in tensors), torch.tensor(step)])
        held = distributed.disagreement(values)
        if held is not None:
            raise ReplicaError(_message([*names, "the number of steps"], held, self._equal_at))
        self._equal_at = step


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """A hash of the bits of tensors of one device, in order, int64 [] on that device; 0 for none of them.

    Equal for tensors of equal bits and memory orders. Takes as much memory again as the largest of them has.
    """
    total = None
    for place, tensor in enumerate(tensors):
        # An odd weight for each place, so that nothing of a difference in one tensor is lost.
        part = _tensor_hash(_words(tensor)) * (_signed(place * _MIX) | 1)
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.int64) if total is None else total


def _tensor_hash(words: Tensor) -> Tensor:
    """A hash of int32 [n] and of n, int64 []."""
    rows, rest = divmod(words.numel(), _COLUMNS)
    grid = words[: rows * _COLUMNS].view(rows, _COLUMNS)
    weights = torch.arange(1, _COLUMNS + rows + 2, device=words.device) * _MIX | 1
    columns = grid.sum(0, dtype=torch.int64)
    columns[:rest] += words[rows * _COLUMNS :]
    sums = torch.cat([grid.sum(1, dtype=torch.int64), words[rows * _COLUMNS :].sum(dtype=torch.int64)[None]])
    # A column's weight says where in its row a value stands, a row's in which row.
    # Together they are odd, so that nothing of a difference in one place is lost.
    return (columns * weights[:_COLUMNS]).sum() * _MIX + (sums * weights[_COLUMNS:]).sum() * 2 + words.numel()


def _signed(number: int) -> int:
    """An integer modulo 2**64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as int32 [n], in the order of its memory."""
    tensor = tensor.detach()
    strides = tensor.stride()
    order = sorted(range(len(strides)), key=lambda d: -strides[d])  # slowest first: contiguous in that order
    bits = tensor.permute(order).contiguous().view(_INTEGERS[tensor.element_size()]).reshape(-1)
    return bits.view(torch.int32) if tensor.element_size() == 8 else bits.to(torch.int32)


def _message(names: list[str], held: Tensor, equal_at: int | None) -> str:
    """What differs on which ranks from what most of them hold (where there is no majority: from the lowest rank's).

    held: int64 [ranks, names], the last column the number of steps. The same on every rank.
    """
    found, step = [], int(held[0, -1])
    for name, values in zip(names, held.T.tolist(), strict=True):
        common = max(Counter(values).items(), key=lambda item: (item[1], -values.index(item[0])))[0]
        others = [rank for rank, value in enumerate(values) if value != common]
        if others:
            found.append(f"{name} on rank{'s' if len(others) > 1 else ''} {_listed(others)}")
    when = f"after step {step}" if equal_at is not None else f"at the start, with {step} steps done"
    since = f"They were the same after step {equal_at}" if equal_at is not None else "No step was taken"
    return (
        f"the {len(held)} processes do not hold the same state {when}; different from the others: {'; '.join(found)}. "
        f"{since}. Usual causes: faulty memory, another version of a library on one host, another checkpoint in its "
        "run folder. Resume from a checkpoint that was written while they were the same"
    )


def _listed(ranks: list[int], most: int = 16) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:most])
    return shown if len(ranks) <= most else f"{shown} and {len(ranks) - most} more"
