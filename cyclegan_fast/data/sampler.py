"""Which pictures, which crops, in which order: pure functions of (seed, epoch), the same for any number of processes.

Every random value is a hash of (seed, epoch, stream, position), so a run can be resumed at any step and split over any
number of processes without a generator's state to keep, and without depending on the stream of a numpy version. The
hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Draws", "batch_positions", "crop_draws", "epoch_length", "epoch_order", "steps_per_epoch"]

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

# Independent streams of random values. The numbers are part of every seeded result: never reuse or change one.
_ORDER_A, _ORDER_B, _CROP = 1, 2, 3

_PAIRINGS = ("unpaired", "ordered", "zip", "aligned")


@dataclass(frozen=True)
class Draws:
    """Crop position and mirroring of n samples: y, x float64 [n] in [0, 1), flip bool [n]."""

    y: Float64Array
    x: Float64Array
    flip: npt.NDArray[np.bool_]


def epoch_length(n_A: int, n_B: int, pairing: str) -> int:
    """Pairs in an epoch: max(n_A, n_B), or min(n_A, n_B) for pairing `zip`. ValueError for an empty set."""
    if pairing not in _PAIRINGS:
        raise ValueError(f"pairing = {pairing!r} is not allowed: one of {', '.join(_PAIRINGS)}")
    if n_A < 1 or n_B < 1:
        raise ValueError(f"both domains need at least one picture, but A has {n_A} and B has {n_B}")
    if pairing == "aligned" and n_A != n_B:
        raise ValueError(f"aligned pairs need as many pictures of A as of B, but there are {n_A} and {n_B}")
    return min(n_A, n_B) if pairing == "zip" else max(n_A, n_B)


def epoch_order(n_A: int, n_B: int, *, pairing: str, seed: int, epoch: int) -> tuple[Int64Array, Int64Array]:
    """Picture indices of A and of B, int64 [L] each, for every position of an epoch of L = epoch_length pairs.

    unpaired (the de-facto behaviour): a shuffle of [0, L), A taken modulo its size, B drawn with replacement;
    ordered, and aligned, whose sets are equally large: the same shuffle modulo both sizes, so the i-th of A always
    meets the i-th of B;
    zip (the Keras example): a shuffle of each set side by side, cut to the smaller one.
    """
    length = epoch_length(n_A, n_B, pairing)
    if pairing == "zip":
        index_A = _permutation(n_A, _key(seed, epoch, _ORDER_A))
        index_B = _permutation(n_B, _key(seed, epoch, _ORDER_B))
        return index_A[:length], index_B[:length]
    order = _permutation(length, _key(seed, epoch, _ORDER_A))
    if pairing in ("ordered", "aligned"):
        return order % n_A, order % n_B
    uniform = _uniform(np.arange(length, dtype=np.int64), _key(seed, epoch, _ORDER_B))
    return order % n_A, np.floor(uniform * n_B).astype(np.int64)


def crop_draws(seed: int, epoch: int, positions: Int64Array, domain: int) -> Draws:
    """Draws for the given positions (int64 [n]) of an epoch; domain 0 is A, 1 is B, and the two are independent.

    The value at a position does not depend on what else is asked for. Frozen augmentation asks with epoch 0 and the
    pictures' indices as positions.
    """
    if domain not in (0, 1):
        raise ValueError(f"domain = {domain!r} is not allowed: 0 for A or 1 for B")
    base = np.asarray(positions, dtype=np.int64) * 3
    key = _key(seed, epoch, _CROP + domain)
    return Draws(y=_uniform(base, key), x=_uniform(base + 1, key), flip=_uniform(base + 2, key) < 0.5)


def steps_per_epoch(length: int, global_batch: int) -> int:
    """Optimiser steps that visit `length` pairs once, the last one filled up from the epoch's beginning."""
    if length < 1 or global_batch < 1:
        raise ValueError(f"an epoch of {length} pairs in batches of {global_batch}: both must be at least 1")
    return -(-length // global_batch)


def batch_positions(
    step: int, *, batch: int, accumulate: int, world_size: int, rank: int, length: int
) -> tuple[int, Int64Array]:
    """Epoch (from 1) and positions int64 [accumulate, batch] of one process for a step counted from 0 over the run.

    With G = batch * accumulate * world_size, step s of an epoch takes the positions [s G, (s + 1) G) modulo length, so
    the last step of an epoch wraps around to its beginning. Micro-batch a of rank r is the stretch of `batch`
    positions from s G + (a * world_size + r) * batch: the union over ranks and micro-batches depends on G alone.
    """
    if step < 0 or not 0 <= rank < world_size or min(batch, accumulate) < 1:
        raise ValueError(
            f"step {step} of rank {rank} in {world_size} with batch {batch} and accumulate {accumulate}: needs "
            "step >= 0, 0 <= rank < world_size, batch >= 1 and accumulate >= 1"
        )
    global_batch = batch * accumulate * world_size
    epoch, within = divmod(step, steps_per_epoch(length, global_batch))
    starts = within * global_batch + (np.arange(accumulate, dtype=np.int64) * world_size + rank) * batch
    return epoch + 1, (starts[:, None] + np.arange(batch, dtype=np.int64)) % length


def _key(seed: int, epoch: int, stream: int) -> int:
    """64-bit key of one stream of one epoch: the words are absorbed one after the other."""
    key = 0
    for word in (seed, epoch, stream):
        key = _mix_int(key + _GOLDEN + (word & _MASK))
    return key


def _mix_int(value: int) -> int:
    """SplitMix64's finaliser of one Python integer."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _hash(counters: Int64Array, key: int) -> npt.NDArray[np.uint64]:
    """Element `counters` of the SplitMix64 sequence that starts at `key`."""
    # Arrays of at least one dimension: numpy wraps them around silently, where it warns for scalars.
    value: npt.NDArray[np.uint64]
    value = (np.atleast_1d(counters).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value = value ^ (value >> np.uint64(31))
    return value


def _uniform(counters: Int64Array, key: int) -> Float64Array:
    """Uniform float64 in [0, 1), 53 bits."""
    bits: Float64Array = (_hash(counters, key) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53


def _permutation(n: int, key: int) -> Int64Array:
    """Uniform random order of [0, n): the order of n hashed keys."""
    return np.argsort(_hash(np.arange(n, dtype=np.int64), key), kind="stable").astype(np.int64)
