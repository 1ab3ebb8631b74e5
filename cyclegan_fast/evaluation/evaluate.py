"""Everything that is measured of a trained model on a set of pictures: the work of `cyclegan-fast evaluate`.

Pictures are measured as files of 8 bits hold them, both directions, each figure with a 95 % confidence interval for the
choice of the pictures. One training run is measured; another one differs by more than that. docs/evaluation.md has
every measure.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cyclegan_fast.config import Config, DataConfig, LossConfig, from_dict, upgraded
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.embedding import (
    Embedding,
    EmbeddingError,
    features,
    frechet_distance,
    inception_embedding,
    kernel_distance,
    program_embedding,
    random_embedding,
    resampled,
)
from cyclegan_fast.evaluation.hallucination import hallucination, through_cycle
from cyclegan_fast.evaluation.metrics import (
    Interval,
    bootstrap,
    bounded_psnr,
    checkerboard,
    ms_ssim,
    ms_ssim_scales,
    ssim,
)
from cyclegan_fast.evaluation.photographic import colour_histogram, colour_set_distance, depth_of_field, exposure, noise
from cyclegan_fast.evaluation.result import MEASURES, UNDEFINED, Direction, Evaluation, Metric
from cyclegan_fast.evaluation.sets import EvaluationSet, Side, open_set
from cyclegan_fast.evaluation.wasserstein import PatchSet, linear_bootstrap, set_distance
from cyclegan_fast.inference.translate import DIRECTIONS, Translator, load
from cyclegan_fast.inference.weights import is_weights, read_weights
from cyclegan_fast.progress import Bar
from cyclegan_fast.training.checkpoint import find_checkpoint, read_checkpoint
from cyclegan_fast.version import __version__

__all__ = ["evaluate", "measure"]

Floats = npt.NDArray[np.float64]
UInt8Array = npt.NDArray[np.uint8]
Values = dict[str, Floats]

_PIXELS_AT_ONCE = 1 << 19
_PATCHES = 128  # of a picture, for the sliced Wasserstein distance
_PATCHED_PICTURES = 500  # of a set, at most: patches of more would fill the memory
_DEFACTO_SIZE = DataConfig.crop_size  # its test resizes to the training's crop, and cuts nothing off
_ROUND_TRIP = ("cycle_l1", "cycle_psnr", "cycle_ssim", "hallucination", "hallucination_area")
_FID = ("fid", "kid")
_LINEAR = ("swd", "swd_colour", "colour_distance")  # whose influences are known


def evaluate(
    checkpoint: str | Path,
    data: str | Path | None = None,
    *,
    which: str = "latest",
    directions: Sequence[str] | None = None,
    split: str = "test",
    pairs: bool = False,
    limit: int | None = None,
    weights: str = "auto",
    fid: bool = False,
    inception_weights: str | Path | None = None,
    embedding: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Measure a model on the test pictures below ``data``; None: those of its run.

    ``checkpoint``, ``which``, ``weights``, ``device`` and ``precision`` are as in `load`. ``directions``: AtoB, BtoA or
    both; None: those that the model has. ``split``, ``pairs`` and ``limit``: which pictures, see `sets.open_set`.

    ``fid`` measures FID and KID, with ``inception_weights`` or those that the library downloads; ``embedding`` the
    same distances in other features, ``"random"`` or a file of `torch.export`, see `embedding`. What cannot be measured
    is in ``missing`` of the result, with the reason.

    Raises CheckpointError, WeightsError, DataError and InputError, which all are InputErrors, naming what is wrong.
    """
    begin = time.monotonic()
    if not is_weights(checkpoint):
        checkpoint = find_checkpoint(Path(checkpoint), which)  # once: a training may go on meanwhile
    translator = load(checkpoint, which=which, device=device, precision=precision, weights=weights)
    embeddings = [_given_embedding(embedding)] if embedding is not None else []
    config, origin = _origin(checkpoint, which)
    pictures = open_set(data, config, split=split, pairs=pairs, limit=limit, progress=progress)
    why = "not asked for (--fid)"
    if fid or inception_weights is not None:
        try:
            embeddings.append(inception_embedding(inception_weights, device=translator.device))
        except EmbeddingError as error:
            why = str(error)
    found = measure(translator, pictures, config, directions=directions, embeddings=embeddings, progress=progress)
    if not any(each.key == "inception" for each in embeddings):
        found.missing.extend({"metric": name, "title": MEASURES[name].title, "why": why} for name in _FID)
    provenance = {
        "version": __version__,
        "torch": torch.__version__,
        "device": str(translator.device),
        "precision": translator.precision,
        **origin,
        "weights": weights,
        "embeddings": [embedding.title for embedding in embeddings],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 2),
    }
    return replace(found, provenance=provenance)


def _given_embedding(which: str | Path) -> Embedding:
    return random_embedding() if str(which) == "random" else program_embedding(which)


def _origin(checkpoint: str | Path, which: str) -> tuple[Config, dict[str, Any]]:
    """The configuration of a model that has been loaded, and where its weights are from."""
    if is_weights(checkpoint):
        model = read_weights(checkpoint, which, networks=("G_A", "G_B")).model
        data = DataConfig(load_size=_DEFACTO_SIZE, crop_size=_DEFACTO_SIZE)
        identity = LossConfig.identity if model.channels_A == model.channels_B else 0.0
        config = Config(data=data, model=model, loss=LossConfig(identity=identity))
        return config, {"checkpoint": Path(checkpoint).name, "step": None, "epoch": None}
    file = Path(checkpoint)
    content = read_checkpoint(file)
    position = content.get("position", {})
    config = from_dict(upgraded(content["config"]))
    return config, {"checkpoint": file.name, "step": position.get("step"), "epoch": position.get("epoch")}


def measure(
    translator: Translator,
    pictures: EvaluationSet,
    config: Config,
    *,
    directions: Sequence[str] | None = None,
    embeddings: Sequence[Embedding] = (),
    progress: bool = False,
) -> Evaluation:
    """Measure a translator on a set of pictures, without provenance; ``directions``: None for those that it has."""
    work = _Work(translator, pictures, config, embeddings, progress)
    found = {direction: work.direction(direction) for direction in _directions(translator, directions)}
    sides = pictures.sides
    data = {
        "root": str(pictures.root),
        "split": pictures.split,
        "count_A": len(sides["A"]),
        "count_B": len(sides["B"]),
        "pairs": bool(pictures.truth),
        "size": list(pictures.size),
        "preparation": pictures.preparation,
        "left_out": [list(item) for item in pictures.left_out],
    }
    missing = [{"metric": name, "title": MEASURES[name].title, "why": why} for name, why in work.missing]
    return Evaluation({}, data, found, missing)


def _directions(translator: Translator, wanted: Sequence[str] | None) -> list[str]:
    """The directions to measure. Raises InputError for one that the model does not have, and for none."""
    if wanted is None:
        return [direction for direction in DIRECTIONS if _lacks(translator, direction) is None]
    for direction in wanted:
        translator.channels(direction)
    if not wanted:
        raise InputError("directions is empty: AtoB, BtoA, or None for all that the model has")
    return list(dict.fromkeys(wanted))


def _lacks(translator: Translator, direction: str) -> str | None:
    """Why a model does not translate in a direction, or None if it does."""
    try:
        translator.channels(direction)
    except InputError as error:
        return str(error)
    return None


class _Work:
    """Measuring one model on one set: what both directions share is measured once."""

    def __init__(
        self,
        translator: Translator,
        pictures: EvaluationSet,
        config: Config,
        embeddings: Sequence[Embedding],
        progress: bool,
    ) -> None:
        self.translator, self.pictures, self.embeddings, self.progress = translator, pictures, embeddings, progress
        self.method = config.model.method
        self.missing: dict[tuple[str, str], None] = {}
        self.alike = pictures.sides["A"].channels == pictures.sides["B"].channels
        self.at_once = max(1, _PIXELS_AT_ONCE // math.prod(pictures.size))
        counts = [min(len(side), _PATCHED_PICTURES) for side in pictures.sides.values()]
        self.patches = _PATCHES * min(counts)
        self._notes = {"ms_ssim": f"{ms_ssim_scales(*pictures.size)} scales; compare equal numbers only"}
        self._real: dict[str, Values] = {}
        self._sets: dict[str, _Summary] = {}

    def direction(self, direction: str) -> Direction:
        """All measures of a direction."""
        source, target = direction[0], direction[-1]
        side = self.pictures.sides[source]
        made, values = self._translate(direction)
        before = self._singles_of(source) | self._untouched(source) if self.alike else {}
        goal = self._singles_of(target)
        metrics = {
            name: _of_pictures(name, found, before.get(name), goal.get(name), self._notes.get(name, ""))
            for name, found in values.items()
        }
        if self.alike:
            gain = values["separation"] - before["separation"]
            metrics["depth_of_field_gain"] = self._gain(source, gain, before["separation"])
            values["depth_of_field_gain"] = gain
        metrics |= self._identity(direction)
        metrics |= self._of_sets(direction, made)
        self._say_what_is_missing(direction)
        return Direction({name: metrics[name] for name in MEASURES if name in metrics}, side.names, values)

    # Single pictures

    def _translate(self, direction: str) -> tuple[UInt8Array, Values]:
        """The translations of all pictures, uint8 [N, C, h, w] in a temporary file, and what is measured of each."""
        source, target = direction[0], direction[-1]
        side = self.pictures.sides[source]
        made = _scratch((len(side), self.pictures.sides[target].channels, *self.pictures.size))
        parts = []
        for start, images in self._batches(side, f"{source} to {target}"):
            there, values = self._one_batch(images, direction, start)
            made[start : start + len(images)] = there.numpy()
            values |= _singles(there) | self._compared(there, source, start)
            parts.append(values)
        return made, _joined(parts)

    def _one_batch(self, images: Tensor, direction: str, start: int) -> tuple[Tensor, Values]:
        """Translations of uint8 pictures, and the measures of the way back, if there is one."""
        signed = (images.float() / 127.5 - 1).to(self.translator.device)
        if self._no_way_back(direction):
            return _bytes(self.translator.translate(signed, direction)), {}
        exact, back = self.translator.cycle(signed, direction)
        there, again = _bytes(exact), _bytes(back)
        values = {"cycle_l1": _mean_absolute(again, images)}
        values |= {"cycle_psnr": bounded_psnr(again, images).numpy(), "cycle_ssim": ssim(again, images).numpy()}
        if self.alike:
            other = _reverse(direction)
            _, kept = through_cycle(
                lambda _: exact, lambda picture: self.translator.translate(picture, other), signed, seed=start
            )
            found = hallucination(_colours(images), _colours(there), _colours(_bytes(kept)))
            values["hallucination"] = 100 * found.share.numpy()
            values["hallucination_area"] = 100 * found.area.numpy()
        return there, values

    def _compared(self, images: Tensor, source: str, start: int) -> Values:
        """Nearness to the truth of the pictures from ``start`` on: NaN where it is not known, {} if it never is."""
        truth = self.pictures.truth.get(source)
        if truth is None:
            return {}
        known = [i for i in range(len(images)) if start + i in truth.places]
        values = {name: np.full(len(images), np.nan) for name in ("psnr", "ssim", "ms_ssim")}
        if known:
            mine, theirs = images[known], torch.from_numpy(truth.side[[truth.places[start + i] for i in known]])
            scales = ms_ssim_scales(*self.pictures.size)
            found = bounded_psnr(mine, theirs), ssim(mine, theirs), ms_ssim(mine, theirs, scales=scales)
            for each, value in zip(values.values(), found, strict=True):
                each[known] = value.numpy()
        return values

    def _untouched(self, source: str) -> Values:
        """Nearness of the input pictures themselves to the truth."""
        if source not in self.pictures.truth:
            return {}
        side = self.pictures.sides[source]
        return _joined([self._compared(images, source, start) for start, images in self._batches(side)])

    def _singles_of(self, domain: str) -> Values:
        """What is measured of single pictures, of the real ones of a domain."""
        if domain not in self._real:
            side = self.pictures.sides[domain]
            batches = self._batches(side, f"real pictures of {domain}")
            self._real[domain] = _joined([_singles(images) for _, images in batches])
        return self._real[domain]

    def _gain(self, source: str, gain: Floats, before: Floats) -> Metric:
        """How much more the background is separated than in the input; the target is what the truth gains."""
        target = None
        if truth := self.pictures.truth.get(source):
            known = sorted(truth.places)
            separation = _joined([_depth(images) for _, images in self._batches(truth.side)])["separation"]
            target = _mean(separation[[truth.places[i] for i in known]] - before[known])
        note = "" if target is None else "target: what the truth gains"
        return Metric("depth_of_field_gain", _mean(gain), target=target, note=note)

    def _identity(self, direction: str) -> dict[str, Metric]:
        """The change that a generator makes to pictures that are of its target domain already."""
        if not self.alike or self.method != "cyclegan":
            return {}
        side = self.pictures.sides[direction[-1]]
        errors = []
        for _, images in self._batches(side, f"identity of {direction[-1]}"):
            signed = (images.float() / 127.5 - 1).to(self.translator.device)
            errors.append(_mean_absolute(_bytes(self.translator.translate(signed, direction)), images))
        note = f"of the {len(side)} real pictures of {direction[-1]}"
        return {"identity_l1": Metric("identity_l1", _mean(np.concatenate(errors)), note=note)}

    # Sets

    def _of_sets(self, direction: str, made: UInt8Array) -> dict[str, Metric]:
        """How far the set of translations is from the real pictures of the target domain."""
        source, target = direction[0], direction[-1]
        goal = self._summary(target, self.pictures.sides[target])
        found = self._summarised(_Translations(made))
        sets = {"value": found}
        if self.alike:
            sets["untouched"] = self._summary(source, self.pictures.sides[source])
        truth = self.pictures.truth.get(source)
        if truth is not None and not self.pictures.paired and len(truth.side) == len(made):
            sets["target"] = self._summary(f"truth of {source}", truth.side)
        return {
            name: Metric(name, **goal.distances(name, sets), note=note)
            for name, note in self._set_measures(goal, found)
        }

    def _set_measures(self, goal: _Summary, found: _Summary) -> Iterator[tuple[str, str]]:
        """Names and notes of the measures of sets."""
        count = min(goal.patches.count, found.patches.count)
        note = f"{_PATCHES} patches each of {count} pictures; compare equal numbers only"
        if self.pictures.paired:
            note += "; both sets show the same scenes, which makes the interval too wide"
        yield from (("swd", note), ("swd_colour", note), ("colour_distance", ""))
        for embedding in self.embeddings:
            names = _FID if embedding.key == "inception" else (f"frechet_{embedding.key}", f"kernel_{embedding.key}")
            size = found.features[embedding.key].shape[1]
            few = f"{size} features of {len(goal.histograms)} and {len(found.histograms)} pictures: far too large"
            yield names[0], f"{embedding.note}; {few}, as of few pictures always; compare equal numbers only"
            yield names[1], embedding.note

    def _summary(self, name: str, side: Side) -> _Summary:
        if name not in self._sets:
            self._sets[name] = self._summarised(side)
        return self._sets[name]

    def _summarised(self, side: Side | _Translations) -> _Summary:
        histograms = [colour_histogram(_colours(images)).numpy() for _, images in self._batches(side)]
        some = np.linspace(0, len(side) - 1, min(len(side), _PATCHED_PICTURES)).round().astype(int).tolist()
        step = self.at_once
        chosen = (torch.from_numpy(side[some[i : i + step]]) for i in range(0, len(some), step))
        patches = PatchSet(chosen, len(some), self.patches)
        found = {
            embedding.key: features(embedding, (images for _, images in self._batches(side)))
            for embedding in self.embeddings
        }
        return _Summary(patches, np.concatenate(histograms), found)

    # What is left out

    def _no_way_back(self, direction: str) -> str | None:
        """Why there is no way back, or None if there is."""
        if self.method == "augmented":
            return "the way back of Augmented CycleGAN needs its encoders; translations are by the codes of seed 0"
        return _lacks(self.translator, _reverse(direction))

    def _say_what_is_missing(self, direction: str) -> None:
        reasons: dict[str, str] = {}
        if self.method != "cyclegan":
            reasons["identity_l1"] = f"{self.method} is not trained to leave pictures of its target domain as they are"
        if not self.alike:
            why = "the domains differ in channels"
            reasons |= dict.fromkeys(("hallucination", "hallucination_area", "identity_l1", "depth_of_field_gain"), why)
        if why_not := self._no_way_back(direction):
            reasons |= dict.fromkeys(_ROUND_TRIP, why_not)
        if direction[0] not in self.pictures.truth:
            domain = direction[-1]
            why = f"no truth: neither a folder truth{domain} nor pairs ({direction[0]} to {domain})"
            reasons |= dict.fromkeys(("psnr", "ssim", "ms_ssim"), why)
        self.missing |= dict.fromkeys(reasons.items())

    def _batches(self, side: Side | _Translations, label: str | None = None) -> Iterator[tuple[int, Tensor]]:
        """Where each batch begins, and its pictures, uint8 [n, C, h, w]; with a label under a progress bar."""
        disable = label is None or not self.progress
        with Bar(total=len(side), desc=label, unit="picture", disable=disable) as bar:
            for start in range(0, len(side), self.at_once):
                images = torch.from_numpy(side[start : start + self.at_once])
                yield start, images
                bar.update(len(images))


class _Translations:
    """Translations in a file, read like a `Side`."""

    def __init__(self, made: UInt8Array) -> None:
        self._made = made

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, chosen: slice | Sequence[int]) -> UInt8Array:
        return np.array(self._made[chosen])


class _Summary:
    """What is kept of a set to compare it with others: patches, colours and features."""

    def __init__(self, patches: PatchSet, histograms: Floats, found: dict[str, Floats]) -> None:
        self.patches, self.histograms, self.features = patches, histograms, found

    def distances(self, name: str, sets: Mapping[str, _Summary]) -> dict[str, Interval]:
        """One measure of how far other sets are from this one, and how much farther ``value`` is than ``untouched``.

        The ``difference`` is there where influences are known. They subtract as the distances do, picture by picture:
        a translation is drawn together with its source, and both distances see one choice of this set.
        """
        if name not in _LINEAR:
            return {key: self._resampled(name, other) for key, other in sets.items()}
        parts = {key: self._influences(name, other) for key, other in sets.items()}
        found = {key: _not_negative(linear_bootstrap(value, each)) for key, (value, *each) in parts.items()}
        if "untouched" in parts:
            (value, *after), (value_before, *before) = parts["value"], parts["untouched"]
            each = [now - then for now, then in zip(after, before, strict=True)]
            found["difference"] = linear_bootstrap(value - value_before, each)
        return found

    def _resampled(self, name: str, other: _Summary) -> Interval:
        kind, _, key = name.partition("_")
        formula = frechet_distance if kind in ("fid", "frechet") else kernel_distance
        key = key or "inception"
        found = resampled(formula, self.features[key], other.features[key])
        return _not_negative(found) if formula is frechet_distance else found

    def _influences(self, name: str, other: _Summary) -> tuple[float, Floats, Floats]:
        """The distance of another set, and the influence on it of each picture of this one and of the other."""
        if name == "colour_distance":
            return colour_set_distance(self.histograms, other.histograms)
        return set_distance(self.patches, other.patches, statistics="own" if name == "swd" else "reference")


def _not_negative(interval: Interval) -> Interval:
    """The interval of what cannot be below 0."""
    return replace(interval, low=max(0.0, interval.low))


def _singles(images: Tensor) -> Values:
    """What is measured of pictures alone, uint8 [N, C, h, w]; [N] each."""
    colours = _colours(images)
    light = exposure(colours)
    contrast = checkerboard(colours).contrast.numpy()
    return {
        **_depth(images),
        "noise": noise(colours).numpy(),
        "lightness": light.mean.numpy(),
        "shadows": 100 * light.shadows.numpy(),
        "highlights": 100 * light.highlights.numpy(),
        "checkerboard_2": contrast[:, 0],
        "checkerboard_4": contrast[:, 1],
    }


def _depth(images: Tensor) -> Values:
    field = depth_of_field(_colours(images))
    sharpness = {"subject_sharpness": field.subject.numpy(), "background_sharpness": field.background.numpy()}
    return {**sharpness, "separation": field.separation.numpy()}


def _colours(images: Tensor) -> Tensor:
    """Gray or RGB, without alpha."""
    return images[:, :1] if images.shape[1] < 3 else images[:, :3]


def _of_pictures(name: str, found: Floats, before: Floats | None, goal: Floats | None, note: str) -> Metric:
    """A measure of single pictures: means over them."""
    difference = None if before is None else _mean(found - before)
    if lost := int(np.isnan(found).sum()):
        note = "; ".join(filter(None, [f"of {len(found) - lost} pictures; for {lost} it is not known", note]))
    untouched, target = (None if values is None else _mean(values) for values in (before, goal))
    return Metric(name, _mean(found), untouched, target, difference, note)


def _mean(values: Floats) -> Interval:
    """The mean of those that are known. Where one is infinite, or fewer than two are known, it is undefined."""
    known = values[~np.isnan(values)]
    return bootstrap(known) if len(known) > 1 and np.isfinite(known).all() else UNDEFINED


def _reverse(direction: str) -> str:
    return DIRECTIONS[1 - DIRECTIONS.index(direction)]


def _joined(parts: Sequence[Values]) -> Values:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _mean_absolute(first: Tensor, second: Tensor) -> Floats:
    """Mean absolute difference of uint8 pictures, levels of 255, [N]."""
    error: Floats = (first.double() - second.double()).abs().mean(dim=(1, 2, 3)).numpy()
    return error


def _bytes(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as a file holds them, uint8 on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().contiguous()


def _scratch(shape: tuple[int, ...]) -> UInt8Array:
    """Room for pictures in a temporary file, which ends with the array. Raises InputError."""
    try:
        with tempfile.TemporaryFile() as file:
            return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    except OSError as error:
        raise InputError(
            f"{math.prod(shape) / 1e6:.0f} MB of translations cannot be kept in {tempfile.gettempdir()}: "
            f"{error.strerror or error}; name another folder by TMPDIR"
        ) from error
