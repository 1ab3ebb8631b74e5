"""Does the fast training learn what the reference learns? Whole trainings on synthetic flowers, measured by the truth.

    python bench/same_learning.py [--out FILE.json] [--markdown FILE.md] [--figure FILE.png] [--seconds N]
                                  [--size 64] [--steps 1000] [--seeds 3] [--arms NAME,NAME] [--work FOLDER] [--small]

Every arm trains the same networks on the same pictures for the same number of steps, once with each seed, through the
trainer itself. A seed decides the starting weights and the order of the pictures, so that runs of one seed are pairs;
but training is chaotic, and two pairs of runs that differ by one rounding part ways. So there is a control: the
reference once more, in another memory order, hence with other roundings. What the fast arms do differently has to show
beside that and beside the spread over seeds. All weights are measured alike: translated in fp32 to 8 bits a channel.

A run that is finished is kept in the work folder and not repeated; one that was cut short, by --seconds or a signal, is
continued by the next call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from provenance import as_text, provenance

import cyclegan_fast
from cyclegan_fast.config import Config, load_config, to_dict
from cyclegan_fast.data.photo import open_photo
from cyclegan_fast.data.synthetic import ensure_dataset
from cyclegan_fast.device import resolve_device
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.figures import grid
from cyclegan_fast.evaluation.metrics import bootstrap, ms_ssim, ms_ssim_scales, psnr, sliced_wasserstein, ssim
from cyclegan_fast.inference.translate import Translator
from cyclegan_fast.training.checkpoint import checkpoint_dir
from cyclegan_fast.training.process import process_settings
from cyclegan_fast.training.trainer import Interrupted, Trainer, train

CUDA = torch.cuda.is_available()
Measures = dict[str, float]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Two-sided 95 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Arm:
    """One way of training; the others differ from the reference in what `settings` says."""

    name: str
    settings: tuple[str, ...]
    batched: bool = True
    why: str = ""

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")


AnyArm = TypeVar("AnyArm", bound=Arm)
FP32 = "training.precision=fp32"
BF16 = "training.precision=bf16"
FUSED = "training.impl=fused"
ARMS = [
    Arm("reference", (FP32, "training.impl=reference"), False, "plain PyTorch in fp32, a pass for each picture, eager"),
    Arm(
        "reference, NCHW",
        (FP32, "training.impl=reference", "training.channels_last=false"),
        False,
        "the control: the same arithmetic in another memory order, with other roundings",
    ),
    Arm("fused fp32", (FP32, FUSED), why="fused operations, batched passes, fp32, eager"),
    Arm("fused bf16", (BF16, FUSED), why="fused operations, batched passes, bf16 autocast, eager"),
]
if CUDA:
    ARMS += [
        Arm("fused bf16 graph", (BF16, FUSED, "training.mode=graph"), why="the same as one CUDA graph"),
        Arm("fused bf16 compile", (BF16, FUSED, "training.mode=compile"), why="the same under torch.compile"),
        Arm("fused fp32 graph", (FP32, FUSED, "training.mode=graph"), why="fp32 as one CUDA graph"),
    ]
REFERENCE = ARMS[0].name


@dataclass(frozen=True)
class Measure:
    """A figure of the tables: `better` is 1 where more is better, -1 where less is."""

    title: str
    better: int
    digits: int
    factor: float = 1.0


MEASURES = {
    "psnr": Measure("PSNR, dB", 1, 2),
    "ssim": Measure("SSIM", 1, 4),
    "ms_ssim": Measure("MS-SSIM", 1, 4),
    "swd": Measure("SWD × 1000", -1, 1, 1000),
    "swd_colour": Measure("SWD with colour × 1000", -1, 1, 1000),
}
DIRECTIONS = {"AtoB": "Phone to DSLR", "BtoA": "DSLR to phone"}


@dataclass(frozen=True)
class Task:
    """What every arm is given."""

    size: int = 64
    steps: int = 1000
    train: int = 150
    test: int = 100
    ngf: int = 16
    blocks: int = 3

    @property
    def rendered(self) -> int:
        """Pictures are 1/8 larger than the crops, as 286 is to 256, in steps of 4, which the networks need."""
        return max(16, self.size + self.size // 8 // 4 * 4)

    def config(self, arm: Arm, seed: int, work: Path) -> Config:
        """The run of an arm: as in the recipe, the learning rate falls in the second half of the epochs."""
        epochs = max(2, math.ceil(self.steps / self.train))
        common = {
            "name": f"{arm.folder}-{seed}",
            "out": work / "runs",
            "seed": seed,
            "data.source": "synthetic",
            "data.root": self.data(work),
            "data.cache": work / "cache",
            "data.synthetic_train": self.train,
            "data.synthetic_test": self.test,
            "data.synthetic_size": self.rendered,
            "data.preprocess": "crop",
            "data.crop_size": self.size,
            "model.ngf": self.ngf,
            "model.ndf": self.ngf,
            "model.blocks": self.blocks,
            "training.steps": self.steps,
            "training.epochs": epochs - epochs // 2,
            "training.epochs_decay": epochs // 2,
            "checkpoint.every_epochs": 0,
            "checkpoint.keep": 1,
            "checkpoint.best": "none",
            "monitor.log_every": max(1, self.steps // 20),
            "monitor.images_every": 0,
            "monitor.samples": 1,
            "monitor.metrics_samples": 0,
            "monitor.tensorboard": "false",
            "monitor.progress": str(sys.stderr.isatty()).lower(),
        }
        return load_config(None, [*(f"{name}={value}" for name, value in common.items()), *arm.settings])

    def data(self, work: Path) -> Path:
        return work / f"flowers-{self.rendered}-{self.train}-{self.test}"


@dataclass
class Experiment:
    """The task, its pictures, and what has been measured: `records` by (arm, seed)."""

    task: Task
    work: Path
    pictures: dict[str, Pixels] = field(default_factory=dict)
    records: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        task, root = self.task, self.task.data(self.work)
        ensure_dataset(root, train=task.train, test=task.test, size=task.rendered, seed=0, progress=True)
        for name in ("testA", "testB", "truthA", "truthB"):
            self.pictures[name] = read_pictures(root / name)

    def do(self, arm: Arm, seed: int, deadline: float) -> bool:
        """Train and measure one run, or take over what an earlier call measured; False if there was no time for it."""
        config = self.task.config(arm, seed, self.work)
        kept = config.run_dir / "measured.json"
        settings = without_places(config) | {"batched": arm.batched}
        if kept.exists():
            record = json.loads(kept.read_text(encoding="utf-8"))
            if record["settings"] != settings:
                raise InputError(f"{kept} is of a run with other settings: use another --work, or delete its folder")
        else:
            try:
                with interrupted_at(deadline):
                    run_training(config, arm.batched)
            except Interrupted as stop:
                print(f"{arm.name}, seed {seed}: {stop}", file=sys.stderr)
                return False
            facts = provenance()
            record = {"settings": settings, **{name: facts[name] for name in ("date", "commit", "sources")}}
            record |= self.measured(config)
            kept.write_text(json.dumps(record), encoding="utf-8")
        self.records[arm.name, seed] = record
        return True

    def measured(self, config: Config) -> dict[str, Any]:
        """The measures of a trained run in both directions, with the values of each picture where it has one."""
        translator = cyclegan_fast.load(config.run_dir, precision="fp32", device=config.training.device)
        result = {}
        for direction in DIRECTIONS:
            generated = translated(translator, self.pictures[f"test{direction[0]}"], direction)
            result[direction] = self.compared(generated, direction)
        return result

    def compared(self, generated: Pixels, direction: str) -> dict[str, Any]:
        """Generated pictures [N, H, W, C] beside the truth of the same scenes and other real ones of their domain."""
        images, truth, real = (
            np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
            for pixels in (generated, self.pictures[f"truth{direction[-1]}"], self.pictures[f"test{direction[-1]}"])
        )
        scales = ms_ssim_scales(*images.shape[2:])
        each = {"psnr": psnr(images, truth), "ssim": ssim(images, truth)}
        if scales > 1:
            each["ms_ssim"] = ms_ssim(images, truth, scales=scales)
        swd = {
            name: sliced_wasserstein(real, images, statistics=how, patches=64, directions=256).mean
            for name, how in (("swd", "own"), ("swd_colour", "reference"))
        }
        means = {name: float(values.mean()) for name, values in each.items()} | swd
        return {"measures": means, "each": {name: [round(v, 6) for v in x.tolist()] for name, x in each.items()}}

    def baselines(self) -> dict[str, dict[str, Measures]]:
        """What doing nothing gives, and, of the distances, what real pictures of other scenes give."""
        found: dict[str, dict[str, Measures]] = {}
        for direction in DIRECTIONS:
            untouched = self.compared(self.pictures[f"test{direction[0]}"], direction)["measures"]
            real = self.compared(self.pictures[f"truth{direction[-1]}"], direction)["measures"]
            real = {name: value for name, value in real.items() if name.startswith("swd")}
            found[direction] = {"input, untouched": untouched, "truth": real}
        return found


def read_pictures(folder: Path) -> Pixels:
    """uint8 [N, H, W, 3] of all pictures of a folder, in the order of their names."""
    return np.stack([np.asarray(open_photo(path, 3).image) for path in sorted(folder.iterdir())])


def without_places(config: Config) -> dict[str, Any]:
    """What decides a run, as JSON has it."""
    tree = to_dict(config)
    for name in ("name", "out", "monitor", "checkpoint"):
        del tree[name]
    for name in ("root", "cache"):
        del tree["data"][name]
    plain: dict[str, Any] = json.loads(json.dumps(tree))
    return plain


def translated(translator: Translator, pixels: Pixels, direction: str) -> Pixels:
    """uint8 [N, H, W, 3], some at a time, rounded as single pictures are."""
    batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).split(16)
    made = torch.cat([translator.translate(batch, direction) for batch in batches])
    rounded = made.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).numpy())


def run_training(config: Config, batched: bool) -> None:
    """Train, or continue where an earlier call was cut short."""
    there = checkpoint_dir(config.run_dir)
    resume = there.is_dir() and any(there.iterdir())
    if batched:
        train(config, resume=resume)
        return
    # A pass for each picture, for comparison: no configuration asks for that.
    device = resolve_device(config.training.device)
    with process_settings(config, device):
        trainer = Trainer(config, device, resume=resume)
        trainer.state.batched = False
        trainer.fit()


@contextmanager
def interrupted_at(deadline: float) -> Iterator[None]:
    """At the deadline, the signal that makes the trainer save and stop; Interrupted also before and after its loop."""

    def stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
        raise Interrupted(signum, 0)

    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(deadline - monotonic(), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    try:
        if monotonic() >= deadline:
            raise Interrupted(signal.SIGTERM, 0)
        if math.isfinite(deadline):
            timer.start()
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


# What follows from the records


@dataclass(frozen=True)
class Difference:
    """An arm against the reference in one measure: mean over pairs of one seed, its 95 % interval, the values."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high


def difference(ours: Sequence[float], reference: Sequence[float]) -> Difference | None:
    """Student's interval of the mean difference of runs of equal seeds; None for fewer than two pairs."""
    values = [a - b for a, b in zip(ours, reference, strict=True)]
    if len(values) < 2:
        return None
    mean = statistics.mean(values)
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(mean, mean - half, mean + half)


def pooled_spread(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation over seeds, from all arms together; None where no arm has two runs."""
    usable = [group for group in groups if len(group) > 1]
    if not usable:
        return None
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in usable)
    return math.sqrt(squares / sum(len(group) - 1 for group in usable))


@dataclass
class Findings:
    """The records, arm by arm and measure by measure."""

    experiment: Experiment

    def seeds(self, arm: str) -> list[int]:
        return [seed for name, seed in self.experiment.records if name == arm]

    @property
    def arms(self) -> list[Arm]:
        return [arm for arm in ARMS if self.seeds(arm.name)]

    def values(self, arm: str, direction: str, measure: str, seeds: Sequence[int] | None = None) -> list[float]:
        records = self.experiment.records
        chosen = self.seeds(arm) if seeds is None else seeds
        return [records[arm, seed][direction]["measures"][measure] for seed in chosen]

    def names(self, direction: str) -> list[str]:
        record = next(iter(self.experiment.records.values()))
        return [name for name in MEASURES if name in record[direction]["measures"]]

    def spread(self, direction: str, measure: str) -> float | None:
        return pooled_spread([self.values(arm.name, direction, measure) for arm in self.arms])

    def against_reference(self, arm: str, direction: str, measure: str) -> Difference | None:
        shared = [seed for seed in self.seeds(arm) if seed in self.seeds(REFERENCE)]
        ours, reference = (self.values(name, direction, measure, shared) for name in (arm, REFERENCE))
        return difference(ours, reference)

    def over_pictures(self, arm: str, direction: str, measure: str) -> Difference | None:
        """The same difference with the interval for the choice of the test pictures, these runs being given."""
        shared = [seed for seed in self.seeds(arm) if seed in self.seeds(REFERENCE)]
        records = self.experiment.records
        if not shared or measure not in records[arm, shared[0]][direction]["each"]:
            return None
        ours, reference = (
            np.mean([records[name, seed][direction]["each"][measure] for seed in shared], axis=0)
            for name in (arm, REFERENCE)
        )
        interval = bootstrap(ours - reference)
        return Difference(interval.value, interval.low, interval.high)

    def losses(self) -> list[str]:
        """Where an arm is worse than the reference by more than the spread over seeds, and clearly so."""
        found = []
        for arm in self.arms[1:]:
            for direction, words in DIRECTIONS.items():
                for name in self.names(direction):
                    spread, change = self.spread(direction, name), self.against_reference(arm.name, direction, name)
                    if spread is None or change is None:
                        continue
                    if -MEASURES[name].better * change.mean > spread and change.clear:
                        found.append(f"{arm.name}, {words}, {MEASURES[name].title}")
        return found


def as_json(findings: Findings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the values of single pictures."""
    experiment = findings.experiment
    runs = [
        {"arm": arm, "seed": seed, **{key: record[key] for key in ("date", "commit", "sources")}}
        | {direction: record[direction]["measures"] for direction in DIRECTIONS}
        for (arm, seed), record in experiment.records.items()
    ]
    differences = [
        {"arm": arm.name, "direction": direction, "measure": name, "spread": findings.spread(direction, name)}
        | {"over_seeds": change and vars(change), "over_pictures": pictures and vars(pictures)}
        for arm in findings.arms[1:]
        for direction in DIRECTIONS
        for name in findings.names(direction)
        for change in [findings.against_reference(arm.name, direction, name)]
        for pictures in [findings.over_pictures(arm.name, direction, name)]
    ]
    return {
        "provenance": facts,
        "task": vars(experiment.task) | {"rendered": experiment.task.rendered},
        "baselines": experiment.baselines(),
        "runs": runs,
        "differences": differences,
        "losses": findings.losses(),
    }


def as_markdown(findings: Findings, content: Mapping[str, Any]) -> str:
    experiment, facts = findings.experiment, content["provenance"]
    task = experiment.task
    sources = sorted({run["sources"] for run in content["runs"]})
    lines = [
        "# Same learning",
        "",
        as_text(dict(facts)),
        "",
        f"{task.train} + {task.train} synthetic flowers of {task.rendered} pixels, crops of {task.size}; ngf = ndf = "
        f"{task.ngf}, {task.blocks} blocks; batch 1, {task.steps} steps, half of the epochs with a falling learning "
        f"rate; {task.test} + {task.test} test pictures, measured with the weights of the last step, in fp32.",
    ]
    if sources != [facts["sources"]]:
        lines += ["", f"The runs were made with other sources: {', '.join(sources)}."]
    lines += ["", *(f"* {arm.name}: {arm.why}" for arm in findings.arms)]
    for direction, words in DIRECTIONS.items():
        lines += ["", f"## {words}", "", *levels_table(findings, content, direction)]
        lines += ["", *differences_table(findings, direction)]
    losses = findings.losses()
    verdict = "; ".join(losses) if losses else "none"
    lines += [
        "",
        "Levels are means ± standard deviations over seeds. Differences are means over pairs of runs of one seed, with "
        "Student's 95 % interval; the spread over seeds is the standard deviation within an arm, all arms together.",
        "",
        "Worse than the reference by more than the spread over seeds, with an interval that leaves out 0: "
        + verdict
        + ".",
    ]
    return "\n".join(lines) + "\n"


def levels_table(findings: Findings, content: Mapping[str, Any], direction: str) -> list[str]:
    """Mean ± standard deviation over seeds of each arm, below what doing nothing gives."""
    names = findings.names(direction)
    rows = [["", "seeds", *(MEASURES[name].title for name in names)]]
    for label, values in content["baselines"][direction].items():
        rows.append([label, "", *(shown(values.get(name), name) for name in names)])
    for arm in findings.arms:
        cells = []
        for name in names:
            values = findings.values(arm.name, direction, name)
            spread = f" ± {shown(statistics.stdev(values), name)}" if len(values) > 1 else ""
            cells.append(shown(statistics.mean(values), name) + spread)
        rows.append([arm.name, str(len(findings.seeds(arm.name))), *cells])
    return table(rows)


def differences_table(findings: Findings, direction: str) -> list[str]:
    """Each arm less the reference: mean over pairs of one seed, and its interval."""
    names = findings.names(direction)
    spreads = [findings.spread(direction, name) for name in names]
    rows = [
        ["less the reference", *(MEASURES[name].title for name in names)],
        ["(spread over seeds)", *(shown(spread, name) for spread, name in zip(spreads, names, strict=True))],
    ]
    for arm in findings.arms[1:]:
        cells = []
        for name in names:
            change = findings.against_reference(arm.name, direction, name)
            ends = [shown(value, name, sign=True) for value in (change.mean, change.low, change.high)] if change else []
            cells.append(f"{ends[0]} ({ends[1]} to {ends[2]})" if ends else "")
        rows.append([arm.name, *cells])
    return table(rows)


def shown(value: float | None, measure: str, *, sign: bool = False) -> str:
    what = MEASURES[measure]
    rounded = None if value is None else round(value * what.factor, what.digits) + 0.0  # no minus before a zero
    return "" if rounded is None else f"{rounded:{'+' if sign else ''}.{what.digits}f}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def figure(experiment: Experiment, arms: Sequence[Arm], direction: str, scenes: int = 4) -> Image.Image:
    """Input | what each arm makes of it, with the first seed | truth; a row a scene."""
    source, truth = experiment.pictures[f"test{direction[0]}"], experiment.pictures[f"truth{direction[-1]}"]
    columns: list[tuple[str, Sequence[Pixels]]] = [("Input", list(source[:scenes]))]
    for arm in arms:
        run = experiment.task.config(arm, 0, experiment.work).run_dir
        translator = cyclegan_fast.load(run, precision="fp32")
        columns.append((arm.name, list(translated(translator, source[:scenes], direction))))
    columns.append(("Truth", list(truth[:scenes])))
    rows = [[pictures[scene] for _, pictures in columns] for scene in range(scenes)]
    return grid(rows, column_titles=[title for title, _ in columns], title=DIRECTIONS[direction], cell=144)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--markdown", type=Path, help="tables of the results")
    parser.add_argument("--figure", type=Path, help="pictures of the first seed of all arms")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop training after this time; call again to go on"
    )
    parser.add_argument("--size", type=int, default=Task.size, help="side of the crops, pixels")
    parser.add_argument("--steps", type=int, default=Task.steps, help="steps of each run")
    parser.add_argument("--ngf", type=int, default=Task.ngf, help="filters of the first convolutions")
    parser.add_argument("--blocks", type=int, default=Task.blocks, help="residual blocks")
    parser.add_argument("--train", type=int, default=Task.train, help="training pictures a domain")
    parser.add_argument("--test", type=int, default=Task.test, help="test pictures a domain")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, 1 to 10")
    parser.add_argument("--arms", default="", help=f"some of: {'; '.join(arm.name for arm in ARMS)}; separated by ;")
    parser.add_argument("--work", type=Path, default=Path("runs/same-learning"), help="folder of pictures and runs")
    parser.add_argument("--small", action="store_true", help="toy size, to see that it works")
    chosen = parser.parse_args(arguments)
    if chosen.small:
        chosen.size, chosen.steps, chosen.ngf, chosen.blocks, chosen.train, chosen.test = 32, 4, 4, 1, 6, 4
    if not 1 <= chosen.seeds <= len(STUDENT) + 1:
        parser.error(f"--seeds {chosen.seeds}: 1 to {len(STUDENT) + 1}")
    chosen.arms = named(parser, chosen.arms, ARMS)
    return chosen


def named(parser: argparse.ArgumentParser, text: str, arms: Sequence[AnyArm]) -> list[AnyArm]:
    """The arms that --arms names, separated by semicolons; all of them if it names none."""
    names = [name.strip() for name in text.split(";") if name.strip()]
    if unknown := set(names) - {arm.name for arm in arms}:
        parser.error(f"--arms: no such arm: {', '.join(sorted(unknown))}")
    return [arm for arm in arms if not names or arm.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all runs are measured, 3 when some are left for the next call."""
    chosen = options(arguments)
    deadline = monotonic() + chosen.seconds
    facts = provenance()
    task = Task(chosen.size, chosen.steps, chosen.train, chosen.test, chosen.ngf, chosen.blocks)
    experiment = Experiment(task, chosen.work)
    status = 0
    # All arms of a seed before the next seed: what is there after a cut can be compared.
    for seed, arm in [(seed, arm) for seed in range(chosen.seeds) for arm in chosen.arms]:
        if not experiment.do(arm, seed, deadline):
            status = 3
            break
        print(f"{arm.name}, seed {seed}: done", file=sys.stderr)
    if not experiment.records:
        return status
    findings = Findings(experiment)
    content = as_json(findings, facts)
    for path, text in (
        (chosen.out, json.dumps(content, indent=1) + "\n"),
        (chosen.markdown, as_markdown(findings, content)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if chosen.markdown is None:
        print(as_markdown(findings, content))
    if chosen.figure is not None:
        chosen.figure.parent.mkdir(parents=True, exist_ok=True)
        figure(experiment, [arm for arm in findings.arms if 0 in findings.seeds(arm.name)], "AtoB").save(chosen.figure)
    return status


if __name__ == "__main__":
    sys.exit(main())
