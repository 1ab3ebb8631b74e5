"""What each choice of the recipe costs or gains: small whole trainings on synthetic flowers, measured by the truth.

    python bench/ablation.py [--out FILE.json] [--markdown FILE.md] [--figure FILE.jpg] [--work FOLDER]
                             [--seeds 3] [--arms NAME;NAME] [--train-only | --measure-only] [--seconds N] [--small]

Every arm differs from the original recipe in what its settings say: first what the Keras example does otherwise, one
by one and together, then what might do better. A seed decides the starting weights and the order of the pictures, so
runs of one seed are pairs. All arms take as many steps as the original, unless they say otherwise.

Training and measuring are apart: a trained run stays in the work folder, and is measured whenever this is called, with
all measures that there are. What is trained is not trained again, what was cut short goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from options import enlarged, finished
from PIL import Image
from provenance import as_text, provenance
from quality import DIRECTIONS, Evaluations
from same_learning import Arm, Experiment, Pixels, Task, interrupted_at, named, run_training, table, translated
from tables import write

import cyclegan_fast
from cyclegan_fast.config import Config
from cyclegan_fast.evaluation.figures import grid
from cyclegan_fast.evaluation.hallucination import hallucination, through_cycle
from cyclegan_fast.evaluation.metrics import checkerboard
from cyclegan_fast.evaluation.photographic import depth_of_field, noise
from cyclegan_fast.models import cost
from cyclegan_fast.training.trainer import Interrupted

COMMON = (
    "training.threads=1",
    "training.precision=fp32",
    "training.device=cpu",
    "training.lr=4e-4",
    "training.ema=0.99",
    "checkpoint.every_epochs=1",
    "checkpoint.keep=2",
)
NO_DECAY = ("training.epochs=1000", "training.epochs_decay=0")
KERAS_TRAINING = (
    *NO_DECAY,
    "training.pool_size=0",
    "training.adam_eps=1e-7",
    "data.frozen_augmentation=true",
    "data.pairing=zip",
    "loss.generator_gradient=own",
)


@dataclass(frozen=True)
class Variant(Arm):
    """An arm of the ablation; `against`: what it is compared with; `averaged`: also with its averaged weights.

    `length`: its steps, of the original's; None for as many as take the original's floating-point operations.
    """

    length: float | None = 1.0
    against: str = "original"
    averaged: bool = False


def _variant(name: str, *settings: str, why: str, **more: Any) -> Variant:
    return Variant(name, (*COMMON, *settings), why=why, **more)


ARMS = [
    _variant("original", why="the original recipe, smaller", averaged=True),
    _variant("keras", "model.preset=keras", *KERAS_TRAINING, why="all of the Keras example's differences"),
    _variant("no pool", "training.pool_size=0", why="discriminators see the pictures of this step only"),
    _variant("no decay", *NO_DECAY, why="the full learning rate to the end"),
    _variant("frozen augmentation", "data.frozen_augmentation=true", why="one crop and flip a picture, for all epochs"),
    _variant("half gradient", "loss.generator_gradient=own", why="no cycle gradient for the first of two generators"),
    _variant("affine", "model.affine=true", why="norms with scales that begin near 1"),
    _variant(
        "gamma 0", "model.affine=true", "model.gamma=0", why="norms with scales that begin near 0", against="affine"
    ),
    _variant(
        "resize",
        "model.upsample=resize",
        length=None,
        averaged=True,
        why="resize-convolutions, and fewer steps for their work",
    ),
    _variant("lr 1e-3", "training.lr=1e-3", why="2.5 times the learning rate"),
    _variant("no identity", "loss.identity=0", length=None, why="no identity loss, and more steps for its work"),
    _variant("spectral norm", "model.spectral_norm=true", why="spectral norms in the discriminators"),
    _variant("no flip", "data.flip=false", why="crops, but no mirror images"),
    _variant("twice as long", length=2.0, why="twice the steps and the compute, decay in the second half"),
    _variant("batch 4", "training.batch=4", why="as many updates of four pairs: four times the compute"),
]
Beside = dict[str, tuple[dict[str, float], dict[str, float]]]
OTHER_WAY = {"AtoB": "BtoA", "BtoA": "AtoB"}
GROUPS = (ARMS[:9], ARMS[9:11], ARMS[11:13], ARMS[14:], ARMS[13:14])
"""What is trained first with all seeds, then second: what a cut leaves can be compared."""


REFERENCE = {"original, averaged": "original"} | {
    name: less
    for arm in ARMS[1:]
    for name, less in [(arm.name, arm.against), *([(f"{arm.name}, averaged", arm.name)] if arm.averaged else [])]
}
"""What each row of the tables is compared with."""


def config_of(task: Task, arm: Variant, seed: int, work: Path) -> Config:
    """The run of an arm; unless it says otherwise, its learning rate falls in the second half of its own epochs."""
    plain = task.config(arm, seed, work)
    length = flop(ARMS[0], task) / flop(arm, task) if arm.length is None else arm.length
    steps, pairs = round(task.steps * length), plain.training.batch
    epochs = max(2, math.ceil(steps * pairs / task.train))
    settings = (f"training.epochs={epochs - epochs // 2}", f"training.epochs_decay={epochs // 2}", *arm.settings)
    return replace(task, steps=steps).config(replace(arm, settings=settings), seed, work)


def flop(arm: Variant, task: Task) -> float:
    """Floating-point operations of a step of an arm."""
    config = task.config(arm, 0, Path())
    return cost.training_step(cost.configured(config, task.size, task.size, precision="fp32", fused=True)).flop


def trained(experiment: Experiment, arm: Variant, seed: int, deadline: float) -> bool:
    """Train one run, or find it trained; False if there was no time for it."""
    config = config_of(experiment.task, arm, seed, experiment.work)
    if finished(config, config.training.steps or 0):
        return True
    try:
        with interrupted_at(deadline):
            run_training(config, batched=True)
    except Interrupted as stop:
        print(f"{arm.name}, seed {seed}: {stop}", file=sys.stderr)
        return False
    return True


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--markdown", type=Path, help="tables of the results")
    parser.add_argument("--figure", type=Path, help="pictures of the first seed")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of pictures and runs")
    parser.add_argument("--size", type=int, default=48, help="side of the crops, pixels")
    parser.add_argument("--steps", type=int, default=300, help="steps of the original's runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--arms", default="", help=f"some of: {'; '.join(arm.name for arm in ARMS)}; separated by ;")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop training after this time")
    parser.add_argument("--small", action="store_true", help="toy size, to see that it works")
    parser.add_argument("--again", action="store_true", help="measure again what is measured")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true")
    only.add_argument("--measure-only", action="store_true", help="measure what is trained, train nothing")
    chosen = parser.parse_args(arguments)
    chosen.arms = named(parser, chosen.arms, ARMS)
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all runs are trained and, if asked for, measured; 3 when some are left for the next call."""
    chosen = options(arguments)
    deadline, facts = monotonic() + chosen.seconds, provenance()
    task = Task(chosen.size, chosen.steps, train=75, test=60, ngf=12, blocks=2)
    if chosen.small:
        task = Task(32, 2, train=4, test=5, ngf=4, blocks=1)
    experiment = Experiment(task, chosen.work)
    if not chosen.measure_only and not train_all(experiment, chosen.arms, chosen.seeds, deadline):
        return 3
    if chosen.train_only:
        return 0
    torch.set_num_threads(1)
    evaluations = measure_all(experiment, chosen.arms, chosen.seeds, again=chosen.again)
    reference = {arm: less for arm, less in REFERENCE.items() if evaluations.seeds(arm)}
    text = as_markdown(experiment, evaluations, reference, facts)
    content = {"provenance": facts, "task": vars(task), "arms": arms_table(task), **evaluations.as_json(reference)}
    print(text)
    write(chosen.markdown, text)
    write(chosen.out, json.dumps(content, indent=1) + "\n")
    if chosen.figure is not None:
        figure(experiment, chosen.arms).save(chosen.figure, quality=80)
    return 0


def train_all(experiment: Experiment, arms: Sequence[Variant], seeds: int, deadline: float) -> bool:
    """All arms of a group with one seed, then with the next, so that what a cut leaves can be compared."""
    for group in GROUPS:
        for seed, arm in itertools.product(range(seeds), [arm for arm in group if arm in arms]):
            if not trained(experiment, arm, seed, deadline):
                return False
            print(f"{arm.name}, seed {seed}: trained", file=sys.stderr, flush=True)
    return True


def measure_all(experiment: Experiment, arms: Sequence[Variant], seeds: int, *, again: bool) -> Evaluations:
    """What is found of all runs that are trained to their end."""
    evaluations, beside = Evaluations(), baselines(experiment)
    for arm, seed in itertools.product(arms, range(seeds)):
        config = config_of(experiment.task, arm, seed, experiment.work)
        if not finished(config, config.training.steps or 0):
            print(f"{arm.name}, seed {seed}: not trained to its end, left out", file=sys.stderr)
            continue
        for weights in ("raw", "ema") if arm.averaged else ("raw",):
            name = arm.name if weights == "raw" else f"{arm.name}, averaged"
            kept = config.run_dir / f"measured-{weights}.json"
            if again or not kept.exists():
                write(kept, json.dumps(measured(experiment, config, weights, beside)))
            evaluations.found[name, seed] = json.loads(kept.read_text(encoding="utf-8"))
    return evaluations


def baselines(experiment: Experiment) -> Beside:
    """The measures of the input pictures and of the target's real ones, by direction."""
    found = {}
    for direction in DIRECTIONS:
        source, target = (experiment.pictures[f"test{domain}"] for domain in (direction[0], direction[-1]))
        found[direction] = (
            experiment.compared(source, direction)["measures"] | of_themselves(source),
            of_themselves(target),
        )
    return found


def measured(experiment: Experiment, config: Config, weights: str, beside: Beside) -> dict[str, Any]:
    """All measures of one run, in the form of evaluation.json, without intervals: seeds give these."""
    translator = cyclegan_fast.load(config.run_dir, device="cpu", precision="fp32", weights=weights)
    directions = {}
    for direction in DIRECTIONS:
        source, (untouched, real) = experiment.pictures[f"test{direction[0]}"], beside[direction]
        there, back = (partial(translator.translate, direction=way) for way in (direction, OTHER_WAY[direction]))
        signed = torch.from_numpy(source).permute(0, 3, 1, 2).float() / 127.5 - 1
        made, again = through_cycle(there, back, signed)
        pictures = np.ascontiguousarray(made.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        found = experiment.compared(pictures, direction)["measures"] | of_themselves(pictures)
        found["hallucination"] = 100 * float(hallucination(signed, made, again, value_range=(-1, 1)).share.mean())
        directions[direction] = {
            "metrics": {
                name: {"value": value, "untouched": {"value": untouched.get(name)}, "target": {"value": real.get(name)}}
                for name, value in found.items()
            },
            "pictures": [],
        }
    return {"provenance": {"weights": weights, "sources": provenance()["sources"]}, "directions": directions}


def of_themselves(pictures: Pixels) -> dict[str, float]:
    """What is measured of pictures uint8 [N, H, W, 3] alone; means over them."""
    images = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    contrast = checkerboard(images).contrast.mean(dim=0).tolist()
    return {
        "checkerboard_2": contrast[0],
        "checkerboard_4": contrast[1],
        "separation": float(depth_of_field(images).separation.mean()),
        "noise": float(noise(images).nanmean()),
    }


def arms_table(task: Task) -> list[dict[str, Any]]:
    """What each arm is, its steps, and its floating-point operations beside the original's."""
    rows = []
    for arm in ARMS:
        steps = config_of(task, arm, 0, Path()).training.steps or 0
        work = steps * flop(arm, task) / (task.steps * flop(ARMS[0], task))
        settings = [setting for setting in arm.settings if setting not in COMMON]
        rows.append({"arm": arm.name, "why": arm.why, "settings": settings, "steps": steps, "flop": round(work, 3)})
    return rows


ARM_TITLES = ("arm", "what it is", "settings", "steps", "FLOP, of the original's")


def arm_cells(row: Mapping[str, Any]) -> list[str]:
    settings = " ".join(f"`{setting}`" for setting in row["settings"])
    return [row["arm"], row["why"], settings, str(row["steps"]), f"{row['flop']:.2f}"]


def as_markdown(
    experiment: Experiment, evaluations: Evaluations, reference: Mapping[str, str], facts: dict[str, Any]
) -> str:
    task = experiment.task
    shown = [row for row in arms_table(task) if evaluations.seeds(row["arm"])]
    lines = [
        "# Ablation of the recipe",
        "",
        as_text(facts),
        "",
        f"{task.train} + {task.train} synthetic flowers of {task.rendered} pixels, crops of {task.size}; ngf = ndf = "
        f"{task.ngf}, {task.blocks} blocks; batch 1, {task.steps} steps, learning rate 4e-4, falling in the second "
        f"half; fp32; {task.test} + {task.test} test pictures, measured whole with the weights of the last step, or "
        "their averages (decay 0.99) where it says so.",
        "",
        *table([ARM_TITLES, *(arm_cells(row) for row in shown)]),
    ]
    for direction, words in DIRECTIONS.items():
        lines += ["", f"## {words}", "", *evaluations.levels_table(direction)]
        lines += ["", *evaluations.differences_table(direction, reference)]
    lines += [
        "",
        "Levels: means ± standard deviations over seeds. Differences: means over pairs of runs of one seed, with "
        "Student's 95 % interval; bold where it leaves out 0, which chance does to one in twenty.",
    ]
    return "\n".join(lines) + "\n"


def figure(experiment: Experiment, arms: Sequence[Variant], scenes: int = 4) -> Image.Image:
    """Input | what each arm makes of it, with the first seed | truth; a row a scene."""
    source = experiment.pictures["testA"][:scenes]
    columns = {"input": source}
    for arm in arms:
        config = config_of(experiment.task, arm, 0, experiment.work)
        if finished(config, config.training.steps or 0):
            translator = cyclegan_fast.load(config.run_dir, device="cpu", precision="fp32", weights="raw")
            columns[arm.name] = translated(translator, source, "AtoB")
    columns["truth"] = experiment.pictures["truthB"][:scenes]
    rows = [[enlarged(pixels[scene]) for pixels in columns.values()] for scene in range(len(source))]
    return grid(rows, column_titles=list(columns), cell=2 * experiment.task.rendered)


if __name__ == "__main__":
    sys.exit(main())
