"""The pictures of a report: which ones, what the networks make of them, and how they come into the page.

Pictures are re-encoded: nothing of a file but its pixels, brought to sRGB and upright, reaches the page.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cyclegan_fast.config import Config
from cyclegan_fast.data.folder import DataError, list_images, stem
from cyclegan_fast.data.photo import PhotoError, open_photo
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.figures import to_rgb
from cyclegan_fast.evaluation.hallucination import hallucination, through_cycle
from cyclegan_fast.evaluation.report.run import Checkpoint, Evaluation, Measure, Run, columns
from cyclegan_fast.inference.translate import DIRECTIONS, TranslationError, Translator, load

__all__ = ["Case", "Gallery", "Shot", "Slider", "draw", "fit", "ranking"]

logger = logging.getLogger("cyclegan_fast.report")

_CELL = 320  # longest side of a picture in a grid, pixels
_WORKED = (
    256  # longest side at which pictures for grids are translated, unless the networks were trained on larger ones
)
_LEAST = 64  # longest side, below which no picture is shrunk to keep the page small
_CASES = 4  # worst and best
_LEAST_MAPPED = 32  # shortest side, below which there is no map of what was invented
_STRONG = 64.0  # levels of it that are drawn in full orange
_ORANGE = (255, 120, 0)
_BACK = {"AtoB": "BtoA", "BtoA": "AtoB"}
_STYLES = 4  # translations of one picture by different codes


@dataclass
class Shot:
    """A picture of the page: JPEG, with the size it has there and the size it had."""

    text: str
    content: bytes
    size: tuple[int, int]
    original: tuple[int, int]

    @property
    def source(self) -> str:
        """As an address that holds the picture itself."""
        return "data:image/jpeg;base64," + base64.b64encode(self.content).decode("ascii")

    @property
    def weight(self) -> int:
        """Bytes that the address takes in the page."""
        return (len(self.content) + 2) // 3 * 4


@dataclass(frozen=True)
class Slider:
    """A picture before and after at full size."""

    name: str
    direction: str
    before: Shot
    after: Shot
    seconds: float


@dataclass(frozen=True)
class Case:
    """A picture among the worst or the best by a measure, with what the networks made of it."""

    name: str
    value: float
    shots: tuple[Shot, ...]


@dataclass
class Gallery:
    """All pictures of a report, by direction where there are two. ``notes``: what is not as one would expect."""

    titles: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[list[Shot]]] = field(default_factory=dict)
    sliders: list[Slider] = field(default_factory=list)
    cycles: dict[str, list[list[Shot]]] = field(default_factory=dict)
    styles: dict[str, list[list[Shot]]] = field(default_factory=dict)
    worst: dict[str, list[Case]] = field(default_factory=dict)
    best: dict[str, list[Case]] = field(default_factory=dict)
    ranked_by: dict[str, Measure] = field(default_factory=dict)
    samples: list[Shot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def shots(self) -> Iterator[Shot]:
        """All of them, those in grids first."""
        for grids in (self.rows, self.cycles, self.styles):
            for rows in grids.values():
                for row in rows:
                    yield from row
        for cases in (*self.worst.values(), *self.best.values()):
            for case in cases:
                yield from case.shots
        yield from self.samples
        for slider in self.sliders:
            yield from (slider.before, slider.after)


class _Pictures:
    """The pictures of a data set that a report shows: the test pictures, or the training pictures where there are none.

    Truth is the partner of the same name, where the data set has one: the other domain of aligned pairs, or the true
    pictures that synthetic data keep.
    """

    def __init__(self, config: Config, root: Path) -> None:
        self._config, self._root = config, root
        self._split = next((split for split in ("test", "train") if self._listed(split, "A", "B")), "")
        self.paths = {domain: self._listed(self._split, domain) for domain in "AB"} if self._split else {}

    @property
    def kind(self) -> str:
        """``test`` or ``train``, empty where there are no pictures."""
        return self._split

    def names(self, domain: str) -> dict[str, Path]:
        """The pictures of a domain by their name within its folder, and by the bare name where that tells them."""
        paths = self.paths.get(domain, [])
        folder = self._folder(self._split, domain) if paths else None
        bare = {path.name: path for path in paths}
        return bare | {path.relative_to(folder).as_posix(): path for path in paths} if folder else bare

    def open(self, path: Path, domain: str, channels: int) -> Image.Image:
        """A picture, or the domain's half of one. Raises PhotoError."""
        image = open_photo(path, channels).image
        if self._config.data.source == "side_by_side" and path in self.paths.get(domain, ()):
            width = max(image.width // 2, 1)
            left = 0 if domain == "A" else image.width - width
            image = image.crop((left, 0, left + width, image.height))
        return image

    def truth(self, path: Path, domain: str, channels: int) -> Image.Image | None:
        """What the picture of a domain should become, if that is known."""
        other = "B" if domain == "A" else "A"
        if path not in self.paths.get(domain, ()):
            return None
        try:
            if self._config.data.source == "side_by_side":
                return self.open(path, other, channels)
            name = path.relative_to(self._folder(self._split, domain)).as_posix()
            partners = self.paths[other] if self._config.data.pairing == "aligned" else self._truth(other)
            folder = self._folder(self._split, other) if partners is self.paths[other] else self._root / f"truth{other}"
            by_stem = {stem(partner.relative_to(folder).as_posix()): partner for partner in partners}
            partner = by_stem.get(stem(name))
            return None if partner is None else open_photo(partner, channels).image
        except PhotoError:
            return None

    def _truth(self, domain: str) -> list[Path]:
        return _images(self._root / f"truth{domain}") if self._split == "test" else []

    def _folder(self, split: str, domain: str) -> Path:
        if self._config.data.source != "side_by_side":
            return self._root / f"{split}{domain}"
        names = ("test", "val") if split == "test" else ("train",)
        return next((self._root / name for name in names if (self._root / name).is_dir()), self._root / names[0])

    def _listed(self, split: str, *domains: str) -> list[Path]:
        return [path for domain in domains for path in _images(self._folder(split, domain))]


def _images(folder: Path) -> list[Path]:
    try:
        return list_images(folder) if folder.is_dir() else []
    except DataError as error:
        logger.warning("%s", error)
        return []


@dataclass(frozen=True)
class _Work:
    """What the drawing needs: the chosen networks, the data set, and how to encode."""

    run: Run
    translator: Translator
    pictures: _Pictures
    encode: Callable[[Image.Image, str, int | None], Shot]
    device: str
    precision: str

    @property
    def directions(self) -> list[str]:
        return [direction for direction in DIRECTIONS if _can(self.translator, direction)]

    @property
    def size(self) -> int:
        """Longest side at which pictures for grids are translated."""
        return max(_WORKED, self.translator.training_size or 0)

    def channels(self, direction: str) -> tuple[int, int]:
        return self.translator.channels(direction)


def draw(
    run: Run,
    *,
    root: Path | None = None,
    pictures: Sequence[str | Path] = (),
    number: int = 3,
    quality: int = 88,
    device: str = "auto",
    precision: str = "auto",
) -> Gallery:
    """All pictures of a report on a run that has a checkpoint.

    ``root``: the data set, by default the one of the settings. ``pictures``: the files for the sliders in place of
    test pictures, in the direction A to B, or in the only one there is. ``number``: pictures a direction. Raises
    InputError for a file of ``pictures`` that cannot be used.
    """
    gallery = Gallery()
    if run.chosen is None:
        return gallery
    data = _Pictures(run.config, Path(run.config.data.root) if root is None else root)
    translator = load(run.chosen.path, device=device, precision=precision)
    work = _Work(run, translator, data, _encoder(quality), device, precision)
    if root is not None and not data.kind:
        raise InputError(f"{root} has no pictures of a data set: it needs folders such as testA and testB")
    if not data.kind:
        gallery.notes.append("The data set of the run's settings is not here, so no pictures of it can be shown.")
    if data.kind == "train":
        gallery.notes.append("The data set has no test pictures: these are pictures that the networks were trained on.")
    chosen = {direction: _chosen(data.paths.get(direction[0], []), number) for direction in work.directions}
    _draw_grids(work, gallery, chosen)
    _draw_sliders(work, gallery, chosen, pictures)
    if run.config.model.method == "cyclegan":
        _draw_cycles(work, gallery, chosen)
    elif run.config.model.method == "augmented":
        _draw_styles(work, gallery, chosen)
    for direction in work.directions:
        _draw_cases(work, gallery, direction)
    if len(columns(run)) < 2 or not gallery.rows:
        _draw_samples(work, gallery)
    return gallery


def ranking(evaluation: Evaluation, direction: str) -> Measure | None:
    """The measure to rank single pictures by: distance from the truth if that is known, else hallucination or cycle."""
    measured = {name for _, values in evaluation.pictures.get(direction, ()) for name in values}
    known = [each for each in evaluation.measures.get(direction, ()) if each.name in measured and each.better]
    wanted: Sequence[Callable[[Measure], bool]] = (
        lambda each: each.group == "truth" and "psnr" in each.name and "ssim" not in each.name,
        lambda each: each.group == "truth",
        lambda each: "hallucination" in each.name,
        lambda each: each.group == "cycle",
    )
    return next((each for rule in wanted for each in known if rule(each)), None)


def fit(gallery: Gallery, most: int) -> None:
    """Shrink pictures, the largest first, until all together take at most ``most`` bytes of the page.

    The two of a slider are shrunk alike. Raises InputError where even small pictures do not fit.
    """
    pairs = [(slider.before, slider.after) for slider in gallery.sliders]
    paired = {id(shot) for pair in pairs for shot in pair}
    groups = [*pairs, *((shot,) for shot in gallery.shots() if id(shot) not in paired)]
    while (total := sum(map(_weight, groups))) > most:
        limit = _limit([_weight(group) for group in groups], most)
        large = [group for group in groups if _weight(group) > limit and max(group[0].size) > _LEAST]
        if not large:
            raise InputError(
                f"the pictures take {total / 1e6:.2f} MB, and {max(0, most) / 1e6:.2f} MB are left for them: allow a "
                "larger page, or fewer pictures"
            )
        for group in large:
            _shrink(group, limit)


def _weight(group: Sequence[Shot]) -> int:
    return sum(shot.weight for shot in group)


def _limit(weights: Sequence[int], most: int) -> float:
    """The weight at which all heavier ones must be cut off for the sum to be ``most``."""
    left = float(most)
    for index, weight in enumerate(ordered := sorted(weights)):
        share = left / (len(ordered) - index)
        if weight > share:
            return share
        left -= weight
    return math.inf


def _shrink(group: Sequence[Shot], limit: float) -> None:
    """Fewer pixels; what encoding at one quality takes is about in proportion to them."""
    scale = min(0.95, 0.95 * math.sqrt(max(0.0, limit) / _weight(group)))
    for shot in group:
        with Image.open(io.BytesIO(shot.content)) as image:
            image.load()
        small = _within(image, max(_LEAST, round(scale * max(shot.size))))
        shot.content, shot.size = _jpeg(small, 85), small.size


def _encoder(quality: int) -> Callable[[Image.Image, str, int | None], Shot]:
    def encode(image: Image.Image, text: str, longest: int | None = _CELL) -> Shot:
        image = to_rgb(image)
        shown = image if longest is None else _within(image, longest)
        return Shot(text, _jpeg(shown, quality), shown.size, image.size if longest is None else shown.size)

    return encode


def _jpeg(image: Image.Image, quality: int) -> bytes:
    """Full resolution of colour: small pictures are looked at enlarged."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)  # `optimize` fails where the file outgrows a guess
    return buffer.getvalue()


def _within(image: Image.Image, longest: int) -> Image.Image:
    """A picture whose sides are no longer than that."""
    if max(image.size) <= longest:
        return image
    scale = longest / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _chosen(paths: Sequence[Path], number: int) -> list[Path]:
    """Some pictures, evenly over the data set."""
    places = np.linspace(0, len(paths) - 1, min(number, len(paths))).round().astype(int)
    return [paths[place] for place in places.tolist()]


def _can(translator: Translator, direction: str) -> bool:
    try:
        translator.channels(direction)
    except InputError:
        return False
    return True


def _opened(work: _Work, gallery: Gallery, direction: str, paths: Sequence[Path]) -> list[tuple[Path, Image.Image]]:
    """The pictures that can be opened; the others are named in the notes."""
    opened = []
    for path in paths:
        try:
            opened.append((path, work.pictures.open(path, direction[0], work.channels(direction)[0])))
        except PhotoError as error:
            _note(gallery, f"Left out: {path.name}: {error.reason}")
    return opened


def _note(gallery: Gallery, text: str) -> None:
    if text not in gallery.notes:
        gallery.notes.append(text)


def _draw_grids(work: _Work, gallery: Gallery, chosen: Mapping[str, Sequence[Path]]) -> None:
    """Input, translation after each checkpoint, and truth, a row a picture."""
    inputs = {
        direction: [(path, _within(image, work.size)) for path, image in _opened(work, gallery, direction, paths)]
        for direction, paths in chosen.items()
    }
    for direction in [direction for direction, found in inputs.items() if found]:
        gallery.titles[direction] = ["Input"]
        gallery.rows[direction] = [
            [work.encode(image, f"{path.name}, input", _CELL)] for path, image in inputs[direction]
        ]
    for checkpoint in columns(work.run):
        translator = _translator(work, gallery, checkpoint)
        if translator is None:
            continue
        last = checkpoint is work.run.chosen
        label = f"{'Now, ' if last else 'After '}{checkpoint.label}"
        for direction, rows in gallery.rows.items():
            gallery.titles[direction].append(label)
            for row, (path, image) in zip(rows, inputs[direction], strict=True):
                row.append(work.encode(translator.translate(image, direction), f"{path.name}, {label}", _CELL))
    for direction, rows in gallery.rows.items():
        truths = [work.pictures.truth(path, direction[0], work.channels(direction)[1]) for path, _ in inputs[direction]]
        if truths and all(truth is not None for truth in truths):
            gallery.titles[direction].append("Truth")
            for row, (path, _), truth in zip(rows, inputs[direction], truths, strict=True):
                row += [work.encode(truth, f"{path.name}, truth", _CELL)] if truth is not None else []


def _translator(work: _Work, gallery: Gallery, checkpoint: Checkpoint) -> Translator | None:
    if checkpoint is work.run.chosen:
        return work.translator
    try:
        return load(checkpoint.path, device=work.device, precision=work.precision)
    except InputError as error:
        _note(gallery, f"Left out: {checkpoint.path.name}: {error}")
        return None


def _draw_sliders(
    work: _Work, gallery: Gallery, chosen: Mapping[str, Sequence[Path]], files: Sequence[str | Path]
) -> None:
    """Before and after at full size."""
    wanted = [(direction, path) for direction, paths in chosen.items() for path in paths]
    if files:
        wanted = [(work.directions[0], Path(file)) for file in files]
    for direction, path in wanted:
        try:
            before = work.pictures.open(path, direction[0], work.channels(direction)[0])
            start = time.perf_counter()
            after = work.translator.translate(before, direction)
        except (PhotoError, TranslationError) as error:
            if files:
                raise
            _note(gallery, f"Left out: {path.name}: {error}")
            continue
        seconds = time.perf_counter() - start
        shots = [
            work.encode(image, f"{path.name}, {text}", None) for image, text in ((before, "before"), (after, "after"))
        ]
        gallery.sliders.append(Slider(path.name, direction, shots[0], shots[1], seconds))


def _draw_cycles(work: _Work, gallery: Gallery, chosen: Mapping[str, Sequence[Path]]) -> None:
    """Input, translation, and the way back."""
    if len(work.directions) < 2:
        return
    for direction, paths in chosen.items():
        for path, image in _opened(work, gallery, direction, paths):
            small = _within(image, work.size)
            shots = zip((small, *work.translator.cycle(small, direction)), ("input", "translated", "back"), strict=True)
            gallery.cycles.setdefault(direction, []).append(
                [work.encode(each, f"{path.name}, {text}", _CELL) for each, text in shots]
            )


def _draw_styles(work: _Work, gallery: Gallery, chosen: Mapping[str, Sequence[Path]]) -> None:
    """Input and translations by different codes."""
    translators = [work.translator.styled(seed) for seed in range(_STYLES)]
    for direction, paths in chosen.items():
        for path, image in _opened(work, gallery, direction, paths):
            small = _within(image, work.size)
            made = [translator.translate(small, direction) for translator in translators]
            texts = ["input", *(f"code {seed}" for seed in range(_STYLES))]
            gallery.styles.setdefault(direction, []).append(
                [
                    work.encode(each, f"{path.name}, {text}", _CELL)
                    for each, text in zip((small, *made), texts, strict=True)
                ]
            )


def _draw_cases(work: _Work, gallery: Gallery, direction: str) -> None:
    """The worst and the best pictures by a measure of the evaluation."""
    evaluation = work.run.evaluation
    measure = ranking(evaluation, direction) if evaluation else None
    if evaluation is None or measure is None:
        return
    places = work.pictures.names(direction[0])
    ranked = [
        (values[measure.name], name)
        for name, values in evaluation.pictures[direction]
        if measure.name in values and name in places
    ]
    ranked.sort(reverse=measure.better < 0)  # the worst first
    if not ranked:
        _note(gallery, f"The measured pictures of {direction[0]} are not in this data set: no worst and best of them.")
        return
    count = min(_CASES, len(ranked) // 2) or 1
    gallery.ranked_by[direction] = measure
    for kept, cases in ((gallery.worst, ranked[:count]), (gallery.best, ranked[::-1][:count])):
        for value, name in cases:
            for path, image in _opened(work, gallery, direction, [places[name]]):
                kept.setdefault(direction, []).append(_case(work, direction, (path, name, value), image))


def _case(work: _Work, direction: str, what: tuple[Path, str, float], image: Image.Image) -> Case:
    path, name, value = what
    small = _within(image, work.size)
    shown = [("input", small), ("translated", work.translator.translate(small, direction))]
    truth = work.pictures.truth(path, direction[0], work.channels(direction)[1])
    if truth is not None:
        shown.append(("truth", truth))
    if _can_be_mapped(work, small):
        shown.append(("invented", _invented(work, direction, small)))
    return Case(name, value, tuple(work.encode(each, f"{name}, {text}", _CELL) for text, each in shown))


def _can_be_mapped(work: _Work, image: Image.Image) -> bool:
    """Whether there is a way back, to pictures of the same kind, and the picture is large enough."""
    model = work.run.config.model
    alike = model.method == "cyclegan" and model.channels_A == model.channels_B
    return alike and len(work.directions) == 2 and min(image.size) >= _LEAST_MAPPED


def _invented(work: _Work, direction: str, image: Image.Image) -> Image.Image:
    """Where the translation has put in what the way back keeps, orange on the picture in gray."""

    def translate(x: torch.Tensor, direction: str) -> torch.Tensor:
        return work.translator.translate(x, direction)

    there, back = (partial(translate, direction=each) for each in (direction, _BACK[direction]))
    pixels = np.atleast_3d(np.array(image))
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    made = through_cycle(there, back, source.float() / 127.5 - 1)
    translated, kept = (((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) for picture in made)
    found = hallucination(source, translated, kept).map[0].clamp_max(_STRONG).div(_STRONG).numpy()
    share = Image.fromarray((255 * found).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    gray = to_rgb(image).convert("L").convert("RGB")
    return Image.composite(Image.new("RGB", image.size, _ORANGE), gray, share)


def _draw_samples(work: _Work, gallery: Gallery) -> None:
    """Grids that the training kept: the first, one of the middle and the last of each direction."""
    for direction in work.directions:
        grids = sorted((work.run.folder / "samples").glob(f"{direction.replace('to', '-to-')}-step-*.jpg"))
        for path in _chosen(grids, 3):
            try:
                image = open_photo(path).image
            except PhotoError as error:
                _note(gallery, f"Left out: {path.name}: {error.reason}")
                continue
            step = path.stem.rpartition("-")[2].lstrip("0")
            text = f"Samples of the training, {direction[0]} → {direction[-1]}, step {step}"
            gallery.samples.append(work.encode(image, text, 1000))
