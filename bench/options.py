"""What the options of the networks and of training do: resize-convolutions, averaged weights, spectral norms.

    python bench/options.py [--out FILE.json] [--markdown FILE.md] [--figure FILE.jpg] [--work FOLDER]
                            [--size 64] [--steps 160] [--critic-steps 600] [--seeds 3] [--small]

Small whole trainings on synthetic flowers through the trainer itself, on one thread. Phone pictures of the test set are
translated and compared with the true DSLR pictures of the same scenes. A seed decides the starting weights and the
order of the pictures, so runs of one seed are pairs. A run that is finished is kept in the work folder, not repeated.

    upsample    transposed against resized doublings, before training and after it: checkerboards, PSNR, SSIM
    averages    the same runs' averaged weights against those of the last step, at every checkpoint of the second half
    spectral    a Wasserstein critic without the gradient penalty, so that nothing bounds it, at ten times the usual
                learning rate, plain and under spectral norms: how large its outputs become
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from provenance import as_text, provenance
from same_learning import Arm, Experiment, Pixels, Task, run_training, translated
from tables import write

import cyclegan_fast
from cyclegan_fast.config import Config
from cyclegan_fast.evaluation.figures import grid
from cyclegan_fast.evaluation.metrics import checkerboard, psnr, ssim
from cyclegan_fast.inference.translate import Translator
from cyclegan_fast.models import build_generators
from cyclegan_fast.training.checkpoint import step_checkpoints

PERIODS = (2, 4)
DECAY = 0.98
COMMON = (
    "training.threads=1",
    "training.precision=fp32",
    "training.device=cpu",
    "training.epochs=1000",
    "training.epochs_decay=0",
)
AVERAGED = (*COMMON, f"training.ema={DECAY}", "checkpoint.every_epochs=0.25", "checkpoint.keep=1000")
CRITIC = (*COMMON, "loss.gan=wgangp", "loss.gradient_penalty=0", "training.lr=2e-3", "model.ndf=16")
UPSAMPLE = [Arm("transposed", AVERAGED), Arm("resize", (*AVERAGED, "model.upsample=resize"))]
SPECTRAL = [Arm("critic", CRITIC), Arm("critic spectral", (*CRITIC, "model.spectral_norm=true"))]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/options"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--critic-steps", type=int, default=600, help="steps with Wasserstein critics (default 600)")
    parser.add_argument("--small", action="store_true", help="two steps at 32 pixels, to see that it works")
    return parser.parse_args()


def compared(made: Pixels, truth: Pixels) -> dict[str, Any]:
    """Means over pictures uint8 [N, H, W, 3]; of a checkerboard its RMS in levels of 255, and its contrast."""
    images, true = (np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) for pixels in (made, truth))
    found = checkerboard(images)
    return {
        "psnr": float(psnr(images, true).mean()),
        "ssim": float(ssim(images, true).mean()),
        "levels": [255 * max(0.0, value) ** 0.5 for value in found.energy.mean(dim=0).tolist()],
        "contrast": found.contrast.mean(dim=0).tolist(),
    }


def before_training(config: Config, pictures: dict[str, Pixels]) -> dict[str, Any]:
    """The measures of the generators that training begins with."""
    torch.manual_seed(config.seed)
    untrained = Translator(*build_generators(config.model), device="cpu", precision="fp32")
    return compared(translated(untrained, pictures["testA"], "AtoB"), pictures["truthB"])


def measured(config: Config, pictures: dict[str, Pixels], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """The measures at each checkpoint of the second half of a run, by each kind of weights."""
    rows, files = [], step_checkpoints(config.run_dir)
    for file in files[(len(files) - 1) // 2 :]:
        row: dict[str, Any] = {"step": int(file.stem.rpartition("-")[2])}
        for weights in kinds:
            translator = cyclegan_fast.load(file, device="cpu", precision="fp32", weights=weights)
            row[weights] = compared(translated(translator, pictures["testA"], "AtoB"), pictures["truthB"])
        rows.append(row)
    return rows


def scalars(config: Config) -> list[dict[str, float]]:
    """What was recorded while it trained, a line a reading."""
    lines = (config.run_dir / "scalars.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "D_A" in line]


def finished(config: Config, steps: int) -> bool:
    """Whether an earlier call has trained this run to its end."""
    files = step_checkpoints(config.run_dir)
    return bool(files) and files[-1].stem.endswith(f"-{steps:08d}")


def done(experiment: Experiment, arm: Arm, seed: int) -> dict[str, Any]:
    """Train one run and measure it, or take over what an earlier call measured."""
    config = experiment.task.config(arm, seed, experiment.work)
    kept = config.run_dir / "measured.json"
    if not kept.exists():
        if not finished(config, experiment.task.steps):
            run_training(config, batched=True)
        run: dict[str, Any] = {"seed": seed, "scalars": scalars(config)}
        if arm in UPSAMPLE:
            run["before"] = before_training(config, experiment.pictures)
        run["checkpoints"] = measured(config, experiment.pictures, ("raw", "ema") if arm in UPSAMPLE else ("raw",))
        kept.write_text(json.dumps(run), encoding="utf-8")
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def upsample_lines(runs: dict[str, list[dict[str, Any]]], inputs: dict[str, Any]) -> list[str]:
    """The table of the doublings; a row each for untrained, trained and averaged weights, and for the truth."""
    lines = [
        "| doublings | weights | period 2, levels | contrast | period 4, levels | contrast | PSNR, dB | SSIM |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(name: str, weights: str, found: list[dict[str, Any]]) -> None:
        cells = [
            mean_and_spread([each[key][index] for each in found], 2)
            for index in range(len(PERIODS))
            for key in ("levels", "contrast")
        ]
        cells += [mean_and_spread([each["psnr"] for each in found], 2), mean_and_spread([e["ssim"] for e in found], 3)]
        lines.append(f"| {name} | {weights} | {' | '.join(cells)} |")

    for arm in UPSAMPLE:
        row(arm.name, "untrained", [run["before"] for run in runs[arm.name]])
        row(arm.name, "last step", [run["checkpoints"][-1]["raw"] for run in runs[arm.name]])
        row(arm.name, "averaged", [run["checkpoints"][-1]["ema"] for run in runs[arm.name]])
    row("the phone pictures", "", [inputs["testA"]])
    row("the true DSLR pictures", "", [inputs["truthB"]])
    return lines


def average_lines(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Level and movement from checkpoint to checkpoint in the second half, with last and with averaged weights."""
    lines = ["| weights | PSNR, dB | its change between checkpoints, dB | SSIM | its change |", "|---|---|---|---|---|"]
    every = [run for arm in UPSAMPLE for run in runs[arm.name]]
    for weights, name in (("raw", "last step"), ("ema", "averaged")):
        cells = []
        for key, digits in (("psnr", 2), ("ssim", 3)):
            series = [[row[weights][key] for row in run["checkpoints"]] for run in every]
            moves = [statistics.mean(abs(b - a) for a, b in itertools.pairwise(v)) for v in series if len(v) > 1]
            cells.append(mean_and_spread([statistics.mean(values) for values in series], digits))
            cells.append(mean_and_spread(moves or [0.0], digits))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spectral_lines(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How large the critics' outputs were, early and late, the losses beside them, and what came of the translation."""
    lines = [
        "| critic | size of its outputs, first tenth | last tenth | largest | gradient of D, last tenth "
        "| cycle loss, last tenth | PSNR, dB | SSIM |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def size(line: dict[str, float]) -> float:
        return statistics.mean(abs(line[name]) for name in ("D_A_real", "D_A_fake", "D_B_real", "D_B_fake"))

    for arm in SPECTRAL:
        found = runs[arm.name]
        every = [run["scalars"] for run in found]
        first = [lines_of[: max(1, len(lines_of) // 10)] for lines_of in every]
        last = [lines_of[-max(1, len(lines_of) // 10) :] for lines_of in every]
        cells = [
            mean_and_spread([statistics.mean(map(size, part)) for part in first], 2),
            mean_and_spread([statistics.mean(map(size, part)) for part in last], 2),
            mean_and_spread([max(map(size, lines_of)) for lines_of in every], 2),
            mean_and_spread([statistics.mean(line["grad_D"] for line in part) for part in last], 2),
            mean_and_spread([statistics.mean(line["cycle_A"] + line["cycle_B"] for line in part) for part in last], 2),
            mean_and_spread([run["checkpoints"][-1]["raw"]["psnr"] for run in found], 2),
            mean_and_spread([run["checkpoints"][-1]["raw"]["ssim"] for run in found], 3),
        ]
        lines.append(f"| {'under spectral norms' if 'spectral' in arm.name else 'plain'} | {' | '.join(cells)} |")
    return lines


def figure(experiment: Experiment, count: int = 3) -> Image.Image:
    """Pictures of the first seed's runs: input, both doublings before and after training, truth; enlarged twice."""
    count = min(count, len(experiment.pictures["testA"]))
    columns = {"phone": experiment.pictures["testA"][:count]}
    for arm in UPSAMPLE:
        config = experiment.task.config(arm, 0, experiment.work)
        torch.manual_seed(0)
        untrained = Translator(*build_generators(config.model), device="cpu", precision="fp32")
        trained = cyclegan_fast.load(config.run_dir, device="cpu", precision="fp32", weights="raw")
        for name, translator in (("untrained", untrained), ("trained", trained)):
            columns[f"{arm.name}, {name}"] = translated(translator, columns["phone"], "AtoB")
    columns["truth"] = experiment.pictures["truthB"][:count]
    rows = [[enlarged(pixels[i]) for pixels in columns.values()] for i in range(count)]
    return grid(rows, column_titles=list(columns), row_titles=[""] * count, title="")


def enlarged(pixels: Pixels) -> Image.Image:
    """Each pixel as a square of four."""
    image = Image.fromarray(pixels)
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


def main() -> None:
    arguments = options()
    torch.set_num_threads(1)
    size, steps, seeds = (32, 2, 1) if arguments.small else (arguments.size, arguments.steps, arguments.seeds)
    task = Task(size=size, steps=steps, train=80 if steps > 2 else 4, test=40 if steps > 2 else 2, ngf=8, blocks=1)
    experiment, facts = Experiment(task, arguments.work), provenance()
    critic_steps = 2 if arguments.small else arguments.critic_steps
    critics = replace(experiment, task=replace(task, steps=critic_steps))
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for arm in (*UPSAMPLE, *SPECTRAL):
            run = done(critics if arm in SPECTRAL else experiment, arm, seed)
            runs.setdefault(arm.name, []).append(run)
            last = run["checkpoints"][-1]["raw"]
            print(f"{arm.name}, seed {seed}: PSNR {last['psnr']:.2f} dB, contrast {last['contrast']}", flush=True)
    inputs = {name: compared(experiment.pictures[name], experiment.pictures["truthB"]) for name in ("testA", "truthB")}
    what = f"{steps} steps at {size} pixels, batch 1, ngf 8, 1 block; mean ± standard deviation over"
    lines = [
        "# Options of the networks and of training",
        "",
        as_text(facts),
        "",
        f"Synthetic flowers, {what} {seeds} seeds; with critics {critic_steps} steps.",
        *("", "## Doublings", "", *upsample_lines(runs, inputs)),
        *("", f"## Averaged weights, decay {DECAY}, second half of the runs above", "", *average_lines(runs)),
        *("", "## A Wasserstein critic without gradient penalty", "", *spectral_lines(runs)),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write(arguments.markdown, text)
    write(arguments.out, json.dumps({"provenance": facts, "inputs": inputs, "runs": runs}, indent=1) + "\n")
    if arguments.figure:
        figure(experiment).save(arguments.figure, quality=40)


if __name__ == "__main__":
    main()
