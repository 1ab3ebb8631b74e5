"""What the methods of training learned on synthetic flowers, measured by the truth that is known of them.

    python bench/methods.py pix2pix RUN [--out FILE.json] [--markdown FILE.md] [--grid FILE.jpg]
    python bench/methods.py augmented RUN [--baseline RUN] [...]

RUN is what configs/pix2pix_flowers.yaml or configs/augmented_flowers.yaml left; --baseline the same recipe with
model.method=cyclegan. All test pictures are translated whole, in fp32, to 8 bits a channel.

pix2pix: PSNR and SSIM against the DSLR's picture of the same scene, beside those of the untouched phone picture.

augmented: each phone picture is translated with several seeds. Its diversity is the mean L1 distance between two of
them, of 255, beside that of the scene's true pictures in different grades. The grade of a picture is read from its mean
chroma, less that of the scene's ungraded truth: the nearest of the grades' shifts. Quality is the sliced Wasserstein
distance from real pictures of the domain, of as many other scenes, colours included.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from provenance import as_text, provenance

from cyclegan_fast.config import Config, load_config
from cyclegan_fast.data import synthetic
from cyclegan_fast.evaluation.figures import grid
from cyclegan_fast.evaluation.metrics import psnr, sliced_wasserstein, ssim
from cyclegan_fast.inference.translate import Translator, load

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
SEEDS = 8
SHOWN = 4  # rows of a grid


def pictures(config: Config, split: str) -> dict[str, Pixels]:
    """The pictures of a split by name, resized as for training."""
    side = config.data.load_size
    return {
        path.name: np.asarray(Image.open(path).resize((side, side), Image.Resampling.BICUBIC))
        for path in sorted((Path(config.data.root) / split).iterdir())
    }


def batch(some: list[Pixels]) -> torch.Tensor:
    """[N, C, H, W] uint8."""
    return torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2)


def pair_measures(made: list[Pixels], truth: list[Pixels]) -> dict[str, float]:
    x, y = batch(made), batch(truth)
    return {"psnr": float(psnr(x, y).mean()), "ssim": float(ssim(x, y).mean())}


def pix2pix(run: Path) -> tuple[dict[str, Any], Image.Image]:
    config = load_config(run / "config.yaml")
    A, B = pictures(config, "testA"), pictures(config, "testB")
    model = load(run, precision="fp32")
    made = {name: model.translate(picture) for name, picture in A.items()}
    result = {
        "pictures": len(A),
        "translated": pair_measures(list(made.values()), list(B.values())),
        "untouched": pair_measures(list(A.values()), list(B.values())),
        "records": records(run, "test_l1"),
    }
    rows = [[A[name], made[name], B[name]] for name in list(A)[:SHOWN]]
    return result, grid(rows, column_titles=["input", "generated", "truth"], cell=128)


def chroma(picture: Pixels) -> Any:
    """Mean Cb and Cr of ITU-R BT.601, of 255."""
    r, g, b = picture.reshape(-1, 3).astype(np.float64).mean(axis=0)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    return np.array([(b - luma) / 1.772, (r - luma) / 1.402])


def shifts(styles: int) -> Any:
    """The chroma shift of each grade, [styles, 2], as it comes out on middle gray."""
    gray = np.full((1, 1, 3), 128, np.uint8)
    return np.stack([chroma(synthetic.graded(gray, style, styles)) - chroma(gray) for style in range(styles)])


def ungraded(config: Config, name: str) -> Pixels:
    """What the DSLR saw of a scene, before its grade."""
    data = config.data
    what = synthetic.scene(data.synthetic_seed, int(Path(name).stem))
    image = Image.fromarray(synthetic.render_dslr(what, data.synthetic_size))
    return np.asarray(image.resize((data.load_size, data.load_size), Image.Resampling.BICUBIC))


def apart(some: list[Pixels]) -> float:
    """Mean L1 distance between two of the pictures, of 255."""
    return float(np.mean([np.abs(x.astype(float) - y.astype(float)).mean() for x, y in combinations(some, 2)]))


def distance(real: list[Pixels], made: list[Pixels]) -> float:
    return sliced_wasserstein(batch(real), batch(made), statistics="reference").mean


def augmented(run: Path, baseline: Path | None) -> tuple[dict[str, Any], Image.Image]:
    config = load_config(run / "config.yaml")
    styles = config.data.synthetic_styles
    A, B = pictures(config, "testA"), pictures(config, "testB")
    translator = load(run, precision="fp32")
    models = [translator.styled(seed) for seed in range(SEEDS)]
    made = {name: [model.translate(picture) for model in models] for name, picture in A.items()}
    plain = {name: ungraded(config, name) for name in A}
    known = shifts(styles)
    found = {
        name: [int(np.linalg.norm(known - (chroma(p) - chroma(plain[name])), axis=1).argmin()) for p in some]
        for name, some in made.items()
    }
    truths = {name: [synthetic.graded(plain[name], style, styles) for style in range(styles)] for name in A}
    real = list(B.values())
    result = {
        "pictures": len(A),
        "seeds": SEEDS,
        "diversity": float(np.mean([apart(some) for some in made.values()])),
        "diversity_one_seed": apart([model.translate(next(iter(A.values()))) for model in [models[0]] * 2]),
        "diversity_of_the_grades": float(np.mean([apart(some) for some in truths.values()])),
        "grades_found": np.bincount(np.concatenate(list(found.values())), minlength=styles).tolist(),
        "grades_a_picture": float(np.mean([len(set(some)) for some in found.values()])),
        "swd": distance(real, [some[i % SEEDS] for i, some in enumerate(made.values())]),
        "swd_untouched": distance(real, list(A.values())),
        "records": records(run, "test_cycle", "test_diversity_AtoB"),
        "codes": records(run, "latent_A", "latent_B"),
    }
    if baseline is not None:
        other: Translator = load(baseline, precision="fp32")
        result["swd_baseline"] = distance(real, [other.translate(picture) for picture in A.values()])
        result["records_baseline"] = records(baseline, "test_cycle")
    rows = [[A[name], *made[name][:5]] for name in list(A)[:SHOWN]]
    return result, grid(rows, column_titles=["input", *(f"seed {seed}" for seed in range(5))], cell=112)


def records(run: Path, *names: str) -> dict[str, list[float]]:
    """First and last value of some scalars of a run."""
    lines = [json.loads(line) for line in (run / "scalars.jsonl").read_text().splitlines()]
    return {
        name: [found[0], found[-1]]
        for name in names
        if (found := [float(line[name]) for line in lines if name in line])
    }


def markdown(kind: str, result: dict[str, Any], facts: dict[str, Any]) -> str:
    lines = [f"# {kind} on synthetic flowers", "", as_text(facts), "", "| measure | value |", "|---|---|"]
    for name, value in result.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in inner:
            numbers = ", ".join(f"{x:.4g}" for x in (item if isinstance(item, list) else [item]))
            lines.append(f"| {name} {key} | {numbers} |".replace("  ", " "))
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("pix2pix", "augmented"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--grid", type=Path)
    arguments = parser.parse_args()
    if arguments.kind == "pix2pix":
        result, image = pix2pix(arguments.run)
    else:
        result, image = augmented(arguments.run, arguments.baseline)
    facts = provenance()
    if arguments.out:
        arguments.out.write_text(json.dumps({"provenance": facts, **result}, indent=1) + "\n")
    if arguments.grid:
        image.convert("RGB").save(arguments.grid, quality=85)
    text = markdown(arguments.kind, result, facts)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
