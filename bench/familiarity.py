"""How well pictures unlike the training pictures are told from pictures like them, without a network.

    python bench/familiarity.py TRAINING TEST [OTHER ...] [--title TEXT] [--limit N] [--channels N] [--run RUN]
                                [--out FILE.json] [--markdown FILE.md] [--add]

Fits the reference of `inference/familiarity.py` to the pictures of the folder TRAINING, preprocessed as the original
recipe does, calibrates it with those of TEST, and shows it the folders OTHER, and of the test pictures versions with
inverted colours, red and blue exchanged, in gray and blurred, noise, and pictures of one colour.

auc: the probability that such a picture is further from the training pictures than a test picture is. flagged: share
that is warned of. The first row is what is flagged for nothing: each half of ten random halvings of TEST is shown to a
reference calibrated with the other.

--run compares with what the trained networks of a run have learned: Mahalanobis distance of the means and deviations
of all activations of the discriminator that judges these pictures (domain A), and of the encoder of the generator that
translates them. --add keeps the tables that --out holds of other titles.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
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
HALVINGS = 10
Change = Callable[[Image.Image], Image.Image]


def read(folder: Path, channels: int, limit: int | None) -> list[Image.Image]:
    """The pictures of a folder that can be read, the first `limit`."""
    pictures = []
    for path in list_images(folder)[:limit]:
        try:
            pictures.append(open_photo(path, channels).image)
        except PhotoError as error:
            print(f"left out: {error}")
    return pictures


def tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)[None]


def described(pictures: Sequence[Image.Image]) -> Features:
    found = [features(tensor(picture)) for picture in pictures]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


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


def made(channels: int) -> dict[str, list[Image.Image]]:
    """Noise and constant pictures."""
    random = np.random.default_rng(0)

    def pictures(values: Any) -> list[Image.Image]:
        pixels = np.clip(values, 0, 255).astype(np.uint8)
        return [Image.fromarray(one if channels > 1 else one[:, :, 0]) for one in pixels]

    constant = random.integers(0, 256, (MADE, 1, 1, channels))
    constant[:3] = np.array([0, 128, 255])[:, None, None, None]
    return {
        "white noise": pictures(random.integers(0, 256, (MADE, 256, 256, channels))),
        "gray with faint noise": pictures(128 + 10 * random.standard_normal((MADE, 256, 256, channels))),
        "one colour (black, gray and white among them)": pictures(np.broadcast_to(constant, (MADE, 64, 64, channels))),
    }


class Learned:
    """Distances by the activations of one of a run's networks of domain A."""

    def __init__(self, run: Path, network: str, training: Sequence[Image.Image]) -> None:
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
    def activations(self, pictures: Sequence[Image.Image]) -> Any:
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

    def scores(self, pictures: Sequence[Image.Image]) -> Any:
        return distances_from(self.activations(pictures), *self.whitening)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table of one training set."""
    channels = arguments.channels
    preprocess = Preprocess("resize_and_crop", 286, 256, "bicubic", channels)
    training_pictures = [
        Image.fromarray(np.squeeze(preprocess.apply(picture)))
        for picture in read(arguments.training, channels, arguments.limit)
    ]
    test_pictures = read(arguments.test, channels, None)
    started = time.perf_counter()
    training, test = described(training_pictures), described(test_pictures)
    seconds = (time.perf_counter() - started) / (len(training_pictures) + len(test_pictures))
    reference = Reference.fit(training, test)
    like = scores(reference, test)
    learned = {name: Learned(arguments.run, name, training_pictures) for name in ("D_B", "G_A") if arguments.run}
    like_learned = {name: each.scores(test_pictures) for name, each in learned.items()}

    others = {folder.as_posix(): read(folder, channels, None) for folder in arguments.other}
    others = {"/".join(Path(name).parts[-2:]): pictures for name, pictures in others.items()}
    others |= {name: [change(picture) for picture in test_pictures] for name, change in changes(channels).items()}
    others |= made(channels)
    rows = [{"pictures": "test, calibrated with the other half", "n": len(like), "auc": None}]
    rows[0] |= {"flagged": false_alarms(training, test)}
    for name, pictures in others.items():
        unlike = scores(reference, described(pictures))
        row = {"pictures": name, "n": len(pictures), "auc": auc(like, unlike), "flagged": float((unlike > 1).mean())}
        by = {f"auc {name}": auc(like_learned[name], each.scores(pictures)) for name, each in learned.items()}
        rows.append(row | by)
    return {
        "title": arguments.title or f"{arguments.training.name} of {arguments.training.parent.name}",
        "command": provenance()["command"],
        "training": len(training_pictures),
        "test": len(test_pictures),
        "held_out": reference.held_out,
        "ms_a_picture": 1e3 * seconds,
        "state_bytes": state_bytes(reference),
        "learned": f"{arguments.run.name}, step {learned['D_B'].step}" if learned else None,
        "rows": rows,
    }


def state_bytes(reference: Reference) -> int:
    """Of the numbers that a checkpoint keeps."""

    def size(value: Any) -> int:
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 8

    return size(reference.state_dict())


def as_lines(section: dict[str, Any]) -> list[str]:
    by = [name for name in section["rows"][-1] if name.startswith("auc ")]
    learned = f" `{'`, `'.join(by)}`: by the networks of {section['learned']}." if by else ""
    lines = [
        f"## Trained on {section['title']}",
        "",
        f"{section['training']} training and {section['test']} test pictures; {section['state_bytes']:,} bytes in a "
        f"checkpoint; {section['ms_a_picture']:.2g} ms a picture.{learned}",
        "",
        f"`{section['command']}`",
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
    parser.add_argument("training", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("other", type=Path, nargs="*")
    parser.add_argument("--title")
    parser.add_argument("--limit", type=int, help="training pictures at most")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--add", action="store_true")
    arguments = parser.parse_args()
    section = measured(arguments)
    kept = []
    if arguments.add and arguments.out and arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))["sections"]
        kept = [each for each in before if each["title"] != section["title"]]
    sections = [*kept, section]
    content = {"title": "Pictures unlike the training pictures", "provenance": provenance(), "sections": sections}
    lines = [line for each in sections for line in as_lines(each)]
    explanation = [
        "`auc`: the probability that such a picture is further from the training pictures than a test picture. "
        "`flagged`: the share that is warned of; in the first row for nothing.",
        "",
    ]
    write_both(arguments.out, arguments.markdown, content, [*explanation, *lines])
    print("\n".join(as_lines(section)))


if __name__ == "__main__":
    main()
