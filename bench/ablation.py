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
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from options import finished
from same_learning import Arm, Experiment, Task, interrupted_at, run_training

from cyclegan_fast.config import Config
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
    """An arm of the ablation; `against`: what it is compared with.

    `length`: its steps, of the original's; None for as many as take the original's floating-point operations.
    """

    length: float | None = 1.0
    against: str = "original"


def _variant(name: str, *settings: str, why: str, length: float | None = 1.0, against: str = "original") -> Variant:
    return Variant(name, (*COMMON, *settings), why=why, length=length, against=against)


ARMS = [
    _variant("original", why="the original recipe, smaller"),
    _variant("keras", "model.preset=keras", *KERAS_TRAINING, why="all of the Keras example's differences"),
    _variant("no pool", "training.pool_size=0", why="discriminators see the pictures of this step only"),
    _variant("no decay", *NO_DECAY, why="the full learning rate to the end"),
    _variant("frozen augmentation", "data.frozen_augmentation=true", why="one crop and flip a picture, for all epochs"),
    _variant("half gradient", "loss.generator_gradient=own", why="no cycle gradient for the first of two generators"),
    _variant("affine", "model.affine=true", why="norms with scales that begin near 1"),
    _variant(
        "gamma 0", "model.affine=true", "model.gamma=0", why="norms with scales that begin near 0", against="affine"
    ),
    _variant("resize", "model.upsample=resize", length=None, why="resize-convolutions, and fewer steps for their work"),
    _variant("lr 1e-3", "training.lr=1e-3", why="2.5 times the learning rate"),
    _variant("no identity", "loss.identity=0", length=None, why="no identity loss, and more steps for its work"),
    _variant("spectral norm", "model.spectral_norm=true", why="spectral norms in the discriminators"),
    _variant("no flip", "data.flip=false", why="crops, but no mirror images"),
    _variant("twice as long", length=2.0, why="twice the steps and the compute, decay in the second half"),
    _variant("batch 4", "training.batch=4", why="as many updates of four pairs: four times the compute"),
]
GROUPS = (ARMS[:8], ARMS[8:11], ARMS[11:13], ARMS[13:14], ARMS[14:])
"""What is trained first with all seeds, then second: what a cut leaves can be compared."""


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
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true")
    only.add_argument("--measure-only", action="store_true", help="measure what is trained, train nothing")
    chosen = parser.parse_args(arguments)
    names = [name.strip() for name in chosen.arms.split(";") if name.strip()]
    if unknown := set(names) - {arm.name for arm in ARMS}:
        parser.error(f"--arms: no such arm: {', '.join(sorted(unknown))}")
    chosen.arms = [arm for arm in ARMS if not names or arm.name in names]
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    deadline = monotonic() + chosen.seconds
    task = Task(chosen.size, chosen.steps, train=75, test=60, ngf=12, blocks=2)
    if chosen.small:
        task = Task(32, 2, train=4, test=4, ngf=4, blocks=1)
    experiment = Experiment(task, chosen.work)
    for group in GROUPS:
        for seed, arm in itertools.product(range(chosen.seeds), [arm for arm in group if arm in chosen.arms]):
            if not trained(experiment, arm, seed, deadline):
                return 3
            print(f"{arm.name}, seed {seed}: trained", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
