"""Whether a checkpoint belongs to the run that is to continue from it: the same settings, the same pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cyclegan_fast.config import Config, ConfigError, to_dict
from cyclegan_fast.data.loader import PairLoader
from cyclegan_fast.training.checkpoint import CheckpointError

__all__ = ["check_same_pictures", "check_same_settings", "digest", "listed"]

# A resumed run may differ from its checkpoint in these; anything else would make it another experiment.
_FREE: tuple[str, ...] = (
    "name",
    "out",
    "data.root",
    "data.cache",
    "data.resident",
    "data.workers",
    "checkpoint.",
    "distributed.",
    "monitor.",
    "model.init_from",
    *(f"training.{name}" for name in ("epochs", "steps", "batch", "accumulate", "precision", "channels_last")),
    *(f"training.{name}" for name in ("global_batch", "timeout", "ema", "patience")),
    *(f"training.{name}" for name in ("mode", "impl", "recompute", "streams", "deterministic", "device", "threads")),
    "training.compile",  # of checkpoints before there was training.mode
)
_LISTED = 5  # names in one message


def check_same_settings(config: Config, saved: dict[str, Any], path: Path) -> None:
    """Raise ConfigError naming what differs from the settings of the checkpoint at `path` and may not."""
    now, then = _flat(to_dict(config)), _flat(to_dict(Config())) | _flat(saved)  # newer settings had their defaults
    changed = [
        f"{name} was {then.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name) and not name.startswith(_FREE)
    ]
    if changed:
        raise ConfigError(f"cannot resume {path} with another configuration: {'; '.join(changed)}")


def digest(loader: PairLoader) -> dict[str, Any]:
    """What tells whether the pictures are the same: their number, their names in order, and 64 bits of each file."""
    names_A, names_B = loader.names
    text = "\0".join([*names_A, "", *names_B])
    return {
        "count_A": len(names_A),
        "count_B": len(names_B),
        "names": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(),
        "files": torch.from_numpy(np.concatenate(loader.digests)),
    }


def check_same_pictures(then: dict[str, Any], now: dict[str, Any], loader: PairLoader, path: Path) -> None:
    """Raise CheckpointError when the digest `now` of the loader's pictures is not that of the checkpoint at `path`."""
    if difference := _difference(then, now, loader):
        raise CheckpointError(
            f"the pictures are not those that {path} was trained on ({difference}): restore them, or start a new run"
        )


def listed(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _difference(then: dict[str, Any], now: dict[str, Any], loader: PairLoader) -> str | None:
    """How the pictures differ from those of a checkpoint, in words; None if they do not.

    Checkpoints of the first version know the names alone.
    """
    if any(then[key] != now[key] for key in ("count_A", "count_B", "names")):
        return f"{_digest_words(then)} then, {_digest_words(now)} now"
    changed = (then.get("files", now["files"]) != now["files"]).nonzero().flatten().tolist()
    names = [f"train{domain}/{name}" for domain, part in zip("AB", loader.names, strict=True) for name in part]
    return f"other content: {listed([names[i] for i in changed])}" if changed else None


def _digest_words(digest: dict[str, Any]) -> str:
    return f"{digest['count_A']} of A and {digest['count_B']} of B, list {digest['names'][:8]}"
