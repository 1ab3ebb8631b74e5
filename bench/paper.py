"""The paper's experiment by three recipes: trained, evaluated, reported, and set side by side.

    python bench/paper.py [--photos FOLDER] [--reduced] [--small] [--seeds N] [--work FOLDER] [--results FOLDER]

See bench/paper.sh, which is how it is called. The recipes are those of configs/paper. At reduced size they keep what
tells them apart, with smaller networks, pictures and numbers of steps, alike for all three; the schedules keep their
shape, and averages of weights their share of the run; a recipe whose step takes more work has fewer of them.

Every part is a command of its own, so that its time and memory are its own. A part that is done is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options import enlarged
from PIL import Image
from provenance import ROOT, as_text, provenance
from quality import DIRECTIONS, Evaluations, evaluated
from tables import write

import cyclegan_fast
from cyclegan_fast.config import Config, load_config
from cyclegan_fast.data.photo import open_photo
from cyclegan_fast.data.synthetic import ensure_dataset
from cyclegan_fast.evaluation.figures import grid
from cyclegan_fast.models import cost
from cyclegan_fast.training.checkpoint import checkpoint_dir

RECIPES = {name: ROOT / "configs" / "paper" / f"{name}.yaml" for name in ("keras", "original", "ours")}
REFERENCE = {"keras": "original", "ours": "original"}
LEFT_OUT = 1  # status of `evaluate` where there were pictures that it could not use
CUDA = torch.cuda.is_available()
NAME = f"paper-{'gpu' if CUDA else 'cpu'}"
PAPER_PICTURES, PAPER_TESTS, PAPER_SIZE, PAPER_LR = 500, 200, 256, 2e-4


@dataclass(frozen=True)
class Reduction:
    """A smaller size for all recipes. ``lr``: that of networks so small."""

    crop: int
    load: int
    ngf: int
    blocks: int
    epochs: int
    pictures: int
    tests: int
    lr: float = 4e-4

    def settings(self, path: Path, pictures: int) -> Iterator[str]:
        """What to override in a recipe that is trained on so many pictures of a domain.

        Its epochs are as many as take the floating-point operations that the original recipe takes at this size.
        """
        training = load_config(path).training
        whole = training.epochs + training.epochs_decay
        epochs = max(2, round(self.epochs * self.work(RECIPES["original"]) / self.work(path)))
        plain = round(epochs * training.epochs / whole)
        yield from self.networks()
        yield from (f"data.limit_train={pictures}", f"data.limit_test={self.tests}")
        yield from (f"training.epochs={plain}", f"training.epochs_decay={epochs - plain}")
        yield f"training.lr={training.lr / PAPER_LR * self.lr}"
        if training.ema:
            longer = whole * PAPER_PICTURES / (epochs * pictures)
            yield f"training.ema={max(0.0, 1 - (1 - training.ema) * longer):.6f}"
        yield f"checkpoint.milestones={sorted({1, max(1, round(epochs / 5)), epochs})}"

    def networks(self) -> Iterator[str]:
        """Sizes of pictures and networks."""
        yield from (f"data.load_size={self.load}", f"data.crop_size={self.crop}")
        yield from (f"model.ngf={self.ngf}", f"model.ndf={self.ngf}", f"model.blocks={self.blocks}")

    def work(self, path: Path) -> float:
        """Floating-point operations of a step of a recipe."""
        config = load_config(path, list(self.networks()))
        return cost.training_step(cost.configured(config, self.crop, self.crop, precision="fp32", fused=True)).flop


@dataclass(frozen=True)
class Pictures:
    """A set to train on: `reduction` None for the paper's size."""

    name: str
    title: str
    root: Path
    reduction: Reduction | None

    @property
    def synthetic(self) -> bool:
        return self.name == "flowers"

    def render(self) -> None:
        """The flowers, once."""
        if not self.synthetic:
            return
        small = self.reduction
        train, test, size = (
            (small.pictures, small.tests, small.load) if small else (PAPER_PICTURES, PAPER_TESTS, PAPER_SIZE)
        )
        ensure_dataset(self.root, train=train, test=test, size=size, seed=0, progress=True)

    def count(self) -> int:
        """Training pictures of a domain: as many of both, at most the reduction's."""
        found = min(len(list((self.root / f"train{domain}").iterdir())) for domain in "AB")
        return min(found, self.reduction.pictures) if self.reduction else found


@dataclass
class Bench:
    """The runs and what is found of them."""

    work: Path
    seeds: dict[str, int]
    failures: list[str] = field(default_factory=list)

    def config(self, pictures: Pictures, recipe: str, seed: int) -> tuple[Config, list[str]]:
        """A run's configuration, and the overrides that make it of the recipe."""
        settings = [
            f"name={recipe}-{seed}",
            f"out={self.work / pictures.name}",
            f"seed={seed}",
            f"data.root={pictures.root}",
            f"data.cache={self.work / 'cache'}",
            "data.unreadable=skip",
            "checkpoint.best=none",
            "checkpoint.keep=1",
            "checkpoint.every_minutes=2",
            "monitor.images_every=0",
            "monitor.tensorboard=false",
        ]
        if CUDA and pictures.reduction is None:  # as the device does it best, all alike
            settings += ["training.precision=auto", "training.mode=graph", "monitor.log_every=250"]
        if pictures.reduction is not None:
            settings += pictures.reduction.settings(RECIPES[recipe], pictures.count())
        return load_config(RECIPES[recipe], settings), settings

    def run(self, pictures: Pictures, recipe: str, seed: int) -> bool:
        """Train, evaluate and, of the first seed, report; what is done stands. False if one of the first two failed."""
        config, settings = self.config(pictures, recipe, seed)
        run, label = config.run_dir, f"{pictures.name}, {recipe}, seed {seed}"
        if not trained(config):
            resumed = checkpoint_dir(run).is_dir()
            arguments = ["train", "--resume", "--config", str(RECIPES[recipe]), *settings]
            if not self.part(f"{label}: train", arguments, run, "train", resumed=resumed):
                return False
        if not newer(run / "evaluation.json", run):
            done = self.part(f"{label}: evaluate", ["evaluate", str(run)], run, "evaluate", accepted=(0, LEFT_OUT))
            if not done:
                return False
        if seed == 0 and not newer(run / "report.html", run):
            self.part(f"{label}: report", ["report", str(run)], run, "report")
        return True

    def part(
        self,
        label: str,
        arguments: Sequence[str],
        run: Path,
        name: str,
        *,
        resumed: bool = False,
        accepted: Sequence[int] = (0,),
    ) -> bool:
        """Run a command of the package; keep its seconds and its peak memory beside the run. False if it failed.

        Its output goes to log.txt in the work folder, its progress and its complaints to the terminal.
        """
        print(f"== {label}", flush=True)
        begin = time.monotonic()
        with (self.work / "log.txt").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "cyclegan_fast", *arguments], stdout=log)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.terminate()  # it saves what it has
                process.wait()
                raise
        process.returncode = code = os.waitstatus_to_exitcode(status)  # which wait4 has taken from it
        seconds = time.monotonic() - begin
        ended = "done" if code in accepted else f"failed with status {code}"
        print(f"== {label}: {ended} after {seconds:.0f} s", flush=True)
        if code not in accepted:
            self.failures.append(f"{label}: status {code}")
            return False
        facts = parts(run)
        unit = 1024 if sys.platform == "linux" else 1  # of ru_maxrss, bytes
        facts[name] = {"seconds": seconds, "memory_gb": usage.ru_maxrss * unit / 1e9, "resumed": resumed}
        write(run / "parts.json", json.dumps(facts))
        return True

    def evaluations(self, pictures: Pictures) -> Evaluations:
        """Of all runs that are evaluated."""
        found = Evaluations()
        for recipe in RECIPES:
            for seed in range(self.seeds[pictures.name]):
                run = self.config(pictures, recipe, seed)[0].run_dir
                if newer(run / "evaluation.json", run):
                    found.found[recipe, seed] = evaluated(run)
        return found

    def costs(self, pictures: Pictures) -> dict[str, dict[str, str]]:
        """Columns of time and memory by recipe: the mean of its trainings, and the largest."""
        columns: dict[str, dict[str, str]] = {"training": {}, "memory": {}}
        for recipe in RECIPES:
            runs = [self.config(pictures, recipe, seed)[0].run_dir for seed in range(self.seeds[pictures.name])]
            facts = {run: found["train"] for run in runs if "train" in (found := parts(run))}
            whole = [each["seconds"] for each in facts.values() if not each["resumed"]]
            if whole:
                columns["training"][recipe] = f"{statistics.mean(whole):.0f} s"
            if facts:
                columns["memory"][recipe] = f"{max(self.memory(run, each) for run, each in facts.items()):.2f} GB"
        return columns

    def memory(self, run: Path, facts: dict[str, Any]) -> float:
        """Peak of the device that trains, GB: what the run recorded on a GPU, the process's on a CPU."""
        if not CUDA:
            return float(facts["memory_gb"])
        lines = (run / "scalars.jsonl").read_text(encoding="utf-8").splitlines()
        return max((record.get("memory_gb", 0.0) for record in map(json.loads, lines)), default=0.0)


def parts(run: Path) -> dict[str, Any]:
    """Seconds and memory of what has been done for a run, by part."""
    kept = run / "parts.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    return found


def trained(config: Config) -> bool:
    """Whether a run has come to its end."""
    return "train" in parts(config.run_dir) and any(checkpoint_dir(config.run_dir).glob("step-*.ckpt"))


def newer(file: Path, run: Path) -> bool:
    """Whether a file is there, and younger than the run's checkpoints."""
    steps = list(checkpoint_dir(run).glob("step-*.ckpt"))
    return file.exists() and all(file.stat().st_mtime >= step.stat().st_mtime for step in steps)


def sets(chosen: argparse.Namespace) -> list[Pictures]:
    """What to train on."""
    flowers, photos = None, None
    if chosen.small:
        flowers = photos = Reduction(32, 36, ngf=4, blocks=1, epochs=2, pictures=6, tests=5)
    elif chosen.reduced:
        flowers = Reduction(72, 96, ngf=16, blocks=3, epochs=10, pictures=120, tests=60)
        photos = Reduction(96, 108, ngf=16, blocks=4, epochs=5, pictures=250, tests=100)
    side = f"{flowers.load}-{flowers.pictures}" if flowers else f"{PAPER_SIZE}-{PAPER_PICTURES}"
    found = [Pictures("flowers", "Synthetic flowers", chosen.work / f"flowers-{side}", flowers)]
    if chosen.photos is not None:
        found.append(Pictures("photos", "Photographs", chosen.photos, photos))
    return found


def figure(bench: Bench, pictures: Pictures, rows: int) -> Image.Image | None:
    """Input | what each recipe's first seed makes of it | truth, if it is known; of scenes at even distances."""
    files = sorted((pictures.root / "testA").iterdir())
    files = [files[i * len(files) // rows] for i in range(min(rows, len(files)))]
    side = pictures.reduction.load if pictures.reduction else PAPER_SIZE
    columns = {"input": [squared(file, side) for file in files]}
    for recipe in RECIPES:
        run = bench.config(pictures, recipe, 0)[0].run_dir
        if newer(run / "evaluation.json", run):
            translator = cyclegan_fast.load(run)
            columns[recipe] = [np.asarray(translator.translate(image)) for image in columns["input"]]
    truth = pictures.root / "truthB"
    if truth.is_dir():
        columns["truth"] = [squared(truth / file.name, side) for file in files]
    if len(columns) < 3:
        return None
    show = enlarged if pictures.reduction else Image.fromarray
    cells = [[show(made[row]) for made in columns.values()] for row in range(len(files))]
    return grid(cells, column_titles=list(columns), cell=2 * side if pictures.reduction else side)


def whole_epochs(config: Config) -> int:
    return config.training.epochs + config.training.epochs_decay


def squared(file: Path, side: int) -> Any:
    """uint8 [side, side, 3], resized as for training."""
    return np.asarray(open_photo(file, 3).image.resize((side, side), Image.Resampling.BICUBIC))


def as_markdown(bench: Bench, chosen: argparse.Namespace, facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The tables, and all figures for the JSON."""
    lines = ["# The paper's experiment by three recipes", "", as_text(facts)]
    content: dict[str, Any] = {"provenance": facts}
    for pictures in chosen.sets:
        evaluations = bench.evaluations(pictures)
        if not evaluations.found:
            continue
        config = bench.config(pictures, "original", 0)[0]
        training, data = config.training, config.data
        epochs = [f"{whole_epochs(bench.config(pictures, recipe, 0)[0])} epochs of {recipe}" for recipe in RECIPES]
        lines += [
            "",
            f"## {pictures.title}",
            "",
            f"At most {data.limit_train} + {data.limit_train} pictures, crops of {data.crop_size} of {data.load_size} "
            f"pixels; ngf {config.model.ngf}, {config.model.blocks} blocks; "
            f"{', '.join(epochs)}, which take about the same floating-point operations; learning rate "
            f"{training.lr:g} (of `original`).",
        ]
        for direction, words in DIRECTIONS.items():
            aside = bench.costs(pictures) if direction == "AtoB" else None
            lines += ["", f"### {words}", "", *evaluations.levels_table(direction, aside)]
            lines += ["", *evaluations.differences_table(direction, REFERENCE)]
        runs = {
            f"{recipe}-{seed}": parts(bench.config(pictures, recipe, seed)[0].run_dir)
            for recipe, seed in evaluations.found
        }
        content[pictures.name] = evaluations.as_json(REFERENCE) | {"parts": runs}
    lines += [
        "",
        "Of several seeds: means ± standard deviations, and differences of runs of one seed with Student's 95 % "
        "interval. Of one seed: intervals for the choice of the test pictures; another training may differ by more. "
        "Bold: the interval leaves out 0. Time is a training's, from its start to its last checkpoint; memory its "
        "peak.",
    ]
    if bench.failures:
        lines += ["", f"Not done: {'; '.join(bench.failures)}."]
    return "\n".join(lines) + "\n", content


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--photos", type=Path, help="also train on photographs: a folder with trainA, trainB, testA, testB"
    )
    parser.add_argument("--reduced", action="store_true", help="the small size on a GPU too; a CPU has no other")
    parser.add_argument("--small", action="store_true", help="toy size, to see that it works")
    parser.add_argument("--seeds", type=int, help="runs of each recipe on flowers (default: 3; full size 1)")
    parser.add_argument("--photo-seeds", type=int, default=1, help="and on photographs (default 1)")
    parser.add_argument("--work", type=Path, default=Path("runs/paper-bench"), help="folder of pictures and runs")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the tables")
    chosen = parser.parse_args(arguments)
    chosen.reduced = chosen.reduced or not CUDA
    chosen.seeds = chosen.seeds or (1 if chosen.small or not chosen.reduced else 3)
    if chosen.photos is not None:
        missing = [name for name in ("trainA", "trainB", "testA", "testB") if not (chosen.photos / name).is_dir()]
        if missing:
            parser.error(f"--photos {chosen.photos}: it has no {', '.join(missing)}")
    chosen.sets = sets(chosen)
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything is done, 1 when a part failed."""
    chosen, facts = options(arguments), provenance()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through `part`, which stops its command
    chosen.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(chosen.work, {"flowers": chosen.seeds, "photos": chosen.photo_seeds})
    for pictures in chosen.sets:
        pictures.render()
    # All recipes of a seed before the next, so that what a cut leaves can be compared.
    for pictures in chosen.sets:
        for seed in range(bench.seeds[pictures.name]):
            for recipe in RECIPES:
                bench.run(pictures, recipe, seed)
            results(bench, chosen, facts)
    print(f"== {chosen.results / NAME}.md")
    return 1 if bench.failures else 0


def results(bench: Bench, chosen: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Write the tables and the pictures of what is there by now."""
    text, content = as_markdown(bench, chosen, facts)
    write(chosen.results / f"{NAME}.md", text)
    write(chosen.results / f"{NAME}.json", json.dumps(content, indent=1) + "\n")
    for pictures in chosen.sets:
        image = figure(bench, pictures, rows=4)
        if image is not None:
            image.save(chosen.results / f"{NAME}-{pictures.name}.jpg", quality=85)


if __name__ == "__main__":
    sys.exit(main())
