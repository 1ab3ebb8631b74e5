"""What a run's training and test pictures are like, measured once at its start, for warnings at translation."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from cyclegan_fast.data.folder import Entry
from cyclegan_fast.data.loader import TrainingData
from cyclegan_fast.data.photo import PhotoError, open_photo
from cyclegan_fast.data.store import Preprocess, Store
from cyclegan_fast.inference.familiarity import LEAST_PICTURES, Features, Reference, features

__all__ = ["references"]

logger = logging.getLogger("cyclegan_fast.train")

# Pictures that are looked at, at most, evenly spaced; of the test set also no more than decode in some seconds.
_TRAINING, _TEST = 512, 256
_TEST_PIXELS, _TEST_LEAST = 200_000_000, 40


def references(data: TrainingData, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of each domain's `Reference`, A and B, as a checkpoint keeps it; `known` is what one has already.

    A domain of too few training pictures has none. Test pictures that cannot be read are passed over. It draws nothing
    random and changes nothing that training sees.
    """
    found = {}
    for domain, store, (entries, preprocess) in zip("AB", data.stores, data.held_out, strict=True):
        try:
            found[domain] = Reference.from_state((known or {}).get(domain)).state_dict()
        except ValueError as error:
            if known and domain in known:
                logger.warning("what the checkpoint holds of the pictures of %s is measured again: %s", domain, error)
            if len(store) >= LEAST_PICTURES:
                found[domain] = Reference.fit(_stored(store), _decoded(entries, preprocess)).state_dict()
    return found


def _stored(store: Store) -> Features:
    chosen = np.linspace(0, len(store) - 1, min(len(store), _TRAINING)).round().astype(int)
    # A copy: a view of the file is read-only, which torch warns of.
    pictures = (torch.from_numpy(store[int(index)].copy()).permute(2, 0, 1)[None] for index in chosen)
    return _joined([features(picture) for picture in pictures])


def _decoded(entries: tuple[Entry, ...], preprocess: Preprocess) -> Features | None:
    """Features of test pictures as translation sees them, at their own size; None where too few can be read."""
    pixels = sum(entry.width * entry.height for entry in entries) / max(len(entries), 1)
    count = min(len(entries), _TEST, max(_TEST_LEAST, int(_TEST_PIXELS / max(pixels, 1))))
    found = []
    for index in np.linspace(0, len(entries) - 1, count).round().astype(int) if count else ():
        try:
            image = preprocess.part(open_photo(entries[index].path, preprocess.channels).image)
        except PhotoError as error:
            logger.info("a test picture is not measured: %s", error)
            continue
        array = np.array(image)
        picture = torch.from_numpy(array if array.ndim == 3 else array[:, :, None])
        found.append(features(picture.permute(2, 0, 1)[None]))
    return _joined(found) if len(found) >= LEAST_PICTURES else None


def _joined(found: list[Features]) -> Features:
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}
