"""How well pictures unlike the training pictures are told from pictures like them, without a network.

    python bench/familiarity.py --case TITLE TRAINING TEST [--case ...] [OTHER ...] [--limit N] [--channels N]
                                [--run RUN] [--out FILE.json] [--markdown FILE.md]

Of each case, fits the reference of `inference/familiarity.py` to the pictures of the folder TRAINING, preprocessed as
the original recipe does, calibrates it with those of TEST, and shows it the folders OTHER (but not its own two), of
the test pictures versions with inverted colours, red and blue exchanged, in gray and blurred, noise, and pictures of
one colour. Folders are read once for all cases. --limit: training pictures at most.

auc: the probability that such a picture is further from the training pictures than a test picture is. flagged: share
that is warned of. The first row is what is flagged for nothing: each half of ten random halvings of TEST is shown to a
reference calibrated with the other.

--run compares the first case with what the trained networks of a run have learned, on 50 pictures of each folder at
most: Mahalanobis distance of the means and deviations of all activations of the discriminator that judges domain A
(D_B), and of the encoder of the generator that translates it (G_A).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from provenance import provenance
from tables import write_both
from torch import Tensor, nn

from cyclegan_fast.config import from_dict, upgraded
from cyclegan_fast.data.folder import list_images
from cyclegan_fast.data.photo import PhotoError, open_photo
from cyclegan_fast.data.store import Preprocess
from cyclegan_fast.inference.familiarity import Features, Reference, distances_from, features, whitened
from cyclegan_fast.models import build_discriminators, build_generators
from cyclegan_fast.models.reference import ResnetBlock
from cyclegan_fast.training.checkpoint import find_checkpoint, read_checkpoint

MADE = 40  # pictures of noise and of one colour
LEARNED = 50  # pictures of a folder that networks look at
HALVINGS = 10
Change = Callable[[Image.Image], Image.Image]


@functools.cache
def paths(folder: Path) -> list[Path]:
    return list_images(folder)


def read(folder: Path, channels: int, limit: int | None = None) -> Iterator[Image.Image]:
    """The pictures of a folder that can be read, of the first `limit`."""
    for path in paths(folder)[:limit]:
        try:
            yield open_photo(path, channels).image
        except PhotoError as error:
            print(f"left out: {error}")


def tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)[None]


def described(pictures: Iterable[Image.Image]) -> Features:
    found = [features(tensor(picture)) for picture in pictures]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


@functools.cache
def training_features(folder: Path, channels: int, limit: int | None) -> Features:
    preprocess = Preprocess("resize_and_crop", 286, 256, "bicubic", channels)
    stored = (np.squeeze(preprocess.apply(picture)) for picture in read(folder, channels, limit))
    return described(Image.fromarray(pixels) for pixels in stored)


@functools.cache
def folder_features(folder: Path, channels: int, change: Change | None = None) -> Features:
    pictures = read(folder, channels)
    return described(pictures if change is None else (change(picture) for picture in pictures))


def some(found: Features, chosen: Any) -> Features:
    return {name: values[chosen] for name, values in found.items()}


def scores(reference: Reference, found: Features) -> Any:
    count = len(next(iter(found.values())))
    return np.array([reference.compare(some(found, slice(i, i + 1))).distance for i in range(count)])


def auc(like: Any, unlike: Any) -> float:
    """The probability that one of `unlike` is larger, ties counted half."""
    return float(((unlike[:, None] > like).mean() + (unlike[:, None] >= like).mean()) / 2)


def false_alarms(training: Features, test: Features) -> float:
    count, random = len(next(iter(test.values()))), np.random.default_rng(0)
    flagged = []
    for _ in range(HALVINGS):
        order = random.permutation(count)
        for part, other in ((order[: count // 2], order[count // 2 :]), (order[count // 2 :], order[: count // 2])):
            flagged.append((scores(Reference.fit(training, some(test, part)), some(test, other)) > 1).mean())
    return float(np.mean(flagged))


@functools.cache
def changes(channels: int) -> dict[str, Change]:
    """Ways to make a picture unlike itself, by name."""
    ways: dict[str, Change] = {
        "test, blurred (1/16 of the side)": lambda image: image.filter(ImageFilter.GaussianBlur(min(image.size) / 16))
    }
    if channels == 3:
        ways |= {
            "test, inverted": lambda image: image.point([255 - level for level in range(256)] * 3),
            "test, red and blue exchanged": lambda image: Image.merge("RGB", image.split()[::-1]),
            "test, gray": lambda image: image.convert("L").convert("RGB"),
        }
    return ways


@functools.cache
def made(channels: int) -> dict[str, Features]:
    """Of noise and constant pictures."""
    random = np.random.default_rng(0)

    def pictures(values: Any) -> Features:
        return features(torch.from_numpy(np.clip(values, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2))

    constant = random.integers(0, 256, (MADE, 1, 1, channels))
    constant[:3] = np.array([0, 128, 255])[:, None, None, None]
    return {
        "white noise": pictures(random.integers(0, 256, (MADE, 128, 128, channels))),
        "gray with faint noise": pictures(128 + 10 * random.standard_normal((MADE, 128, 128, channels))),
        "one colour (black, gray and white among them)": pictures(np.broadcast_to(constant, (MADE, 64, 64, channels))),
    }


class Learned:
    """Distances by the activations of one of a run's networks of domain A."""

    def __init__(self, run: Path, network: str, training: Iterable[Image.Image]) -> None:
        content = read_checkpoint(find_checkpoint(run))
        config = from_dict(upgraded(content["config"]))
        self.size, self.step = config.data.load_size, content["position"]["step"]
        module = {"D_B": build_discriminators(config.model)[1], "G_A": build_generators(config.model)[0]}[network]
        module.load_state_dict(content[network])
        layers = list(module.eval().model)
        blocks = [index for index, layer in enumerate(layers) if isinstance(layer, ResnetBlock)]
        self.layers = layers[: min(blocks, default=len(layers) - 1)]
        self.whitening = whitened(self.activations(training))

    @torch.no_grad()
    def activations(self, pictures: Iterable[Image.Image]) -> Any:
        rows = []
        for picture in pictures:
            x = tensor(picture.resize((self.size, self.size), Image.Resampling.BICUBIC)).float() / 127.5 - 1
            row = []
            for layer in self.layers:
                x = layer(x)
                if isinstance(layer, (nn.LeakyReLU, nn.ReLU)):
                    row += [x.mean((2, 3)), x.std((2, 3))]
            rows.append(torch.cat(row, 1).double().numpy())
        return np.concatenate(rows)

    def scores(self, pictures: Iterable[Image.Image]) -> Any:
        return distances_from(self.activations(pictures), *self.whitening)


def measured(
    title: str, own: tuple[Path, Path], others: Sequence[Path], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The table of one case; own: the folders of training and test pictures."""
    channels = arguments.channels
    training, test = training_features(own[0], channels, arguments.limit), folder_features(own[1], channels)
    reference = Reference.fit(training, test)
    like = scores(reference, test)
    shown = {name_of(folder): folder_features(folder, channels) for folder in others if folder not in own}
    shown |= {name: folder_features(own[1], channels, change) for name, change in changes(channels).items()}
    shown |= made(channels)
    rows: list[dict[str, Any]] = [{"pictures": "test, calibrated with the other half", "n": len(like), "auc": None}]
    rows[0]["flagged"] = false_alarms(training, test)
    for name, found in shown.items():
        unlike = scores(reference, found)
        row = {"pictures": name, "n": len(unlike), "auc": auc(like, unlike)}
        rows.append(row | {"flagged": float((unlike > 1).mean())})
    return {
        "title": title,
        "training": len(training["colours"]),
        "test": len(like),
        "held_out": reference.held_out,
        "state_bytes": state_bytes(reference),
        "rows": rows,
    }


def compare_learned(section: dict[str, Any], own: tuple[Path, Path], others: Sequence[Path], run: Path) -> None:
    """Add to the rows what two networks of the run make of the folders."""
    for network in ("D_B", "G_A"):
        learned = Learned(run, network, read(own[0], 3))
        section["learned"] = f"{run.name}, step {learned.step}"
        like = learned.scores(read(own[1], 3, LEARNED))
        for folder in others:
            row = next((row for row in section["rows"] if row["pictures"] == name_of(folder)), None)
            if row is not None:
                row[f"auc {network}"] = auc(like, learned.scores(read(folder, 3, LEARNED)))


def name_of(folder: Path) -> str:
    return "/".join(folder.parts[-2:])


def cost(channels: int) -> dict[str, float]:
    """Seconds of one core that looking at a picture takes, by its size."""
    found = {}
    for height, width, calls in ((256, 256, 15), (3024, 4032, 5)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
        picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        features(picture)
        seconds = []
        for _ in range(calls):
            started = time.process_time()
            features(picture)
            seconds.append(time.process_time() - started)
        found[f"{width}x{height}"] = statistics.median(seconds)
    return found


def state_bytes(reference: Reference) -> int:
    """Of the numbers that a checkpoint keeps."""

    def size(value: Any) -> int:
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 8

    return size(reference.state_dict())


def as_lines(section: dict[str, Any]) -> list[str]:
    by = sorted({name for row in section["rows"] for name in row if name.startswith("auc ")})
    learned = f" `{'`, `'.join(by)}`: by the networks of {section['learned']}." if by else ""
    lines = [
        f"## Trained on {section['title']}",
        "",
        f"{section['training']} training and {section['test']} test pictures; {section['state_bytes']:,} bytes in a "
        f"checkpoint.{learned}",
        "",
        f"| {' | '.join(['shown', 'pictures', 'flagged', 'auc', *by])} |",
        "|---" * (4 + len(by)) + "|",
    ]
    for row in section["rows"]:
        figures = ["" if row.get(name) is None else f"{row[name]:.2f}" for name in ("auc", *by)]
        lines.append(f"| {row['pictures']} | {row['n']} | {100 * row['flagged']:.1f} % | {' | '.join(figures)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="*")
    parser.add_argument("--case", nargs=3, action="append", required=True, metavar=("TITLE", "TRAINING", "TEST"))
    parser.add_argument("--limit", type=int, help="training pictures at most")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    facts, sections = provenance(), []
    for index, (title, training, test) in enumerate(arguments.case):
        own = Path(training), Path(test)
        sections.append(measured(title, own, arguments.other, arguments))
        if index == 0 and arguments.run:
            compare_learned(sections[0], own, arguments.other, arguments.run)
        print("\n".join(as_lines(sections[-1])), flush=True)
    seconds = cost(arguments.channels)
    content: dict[str, Any] = {"title": "Pictures unlike the training pictures", "provenance": facts}
    content |= {"seconds": seconds, "sections": sections}
    lines = [line for section in sections for line in as_lines(section)]
    explanation = [
        "`flagged`: the share that is warned of, in the first row for nothing. `auc`: the probability that such a "
        "picture is further from the training pictures than a test picture. Looking at a picture takes one core "
        + " and ".join(f"{1e3 * value:.2g} ms ({size})" for size, value in seconds.items())
        + ".",
        "",
    ]
    write_both(arguments.out, arguments.markdown, content, [*explanation, *lines])


if __name__ == "__main__":
    main()
