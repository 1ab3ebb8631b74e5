"""Random latent codes, each a function of (seed, position) alone."""

from __future__ import annotations

import functools

import numpy as np

__all__ = ["latent_draws"]

# Separates these draws from others made with the same seed.
_STREAM = int.from_bytes(b"code", "big")


def latent_draws(seed: int, positions: np.ndarray, size: int, domain: int) -> np.ndarray:
    """Standard normal float64 [n, size] for the pictures at the given positions, int64 [n], of one domain's codes.

    Counter-based (Philox), by Box and Muller's transform: a row depends on seed, domain, size and its position only.
    """
    if size == 0:
        return np.empty((len(positions), 0))
    pairs = -(-size // 2)
    codes = np.empty((len(positions), 2 * pairs))
    for row, position in enumerate(positions.tolist()):
        words = np.random.Philox(key=_key(seed, domain), counter=[0, position, 0, 0]).random_raw(2 * pairs)
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
        radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
        codes[row] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return codes[:, :size]


@functools.lru_cache(maxsize=64)
def _key(seed: int, domain: int) -> np.ndarray:
    return np.random.SeedSequence([seed, _STREAM, domain]).generate_state(2, np.uint64)
