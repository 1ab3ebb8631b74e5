"""Soak: a training on two processes, with kills at random, must end with the weights of an undisturbed one.

    python bench/soak.py                      # 2,000 steps, 24 faults
    python bench/soak.py --steps 100 --faults 3 --seed 1

Two ranks (gloo, CPU) train tiny networks under ``torchrun --max-restarts``, once undisturbed and once with a seeded
plan of faults: kill -9 of one rank, of one rank while it writes a checkpoint, of everything, of the launcher only;
SIGTERM to one rank, to the launcher, to all at once; a rank that loops without end, and one that is stopped. What
torchrun does not start again itself is started again here, as a job scheduler would. Fails unless both runs end with
the same state, the same records and the same samples to the bit, nothing is left behind (processes, files in /dev/shm,
unfinished files), and memory, open files and threads have not grown. Linux only. Prints its figures; --out writes them
as JSON too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's package, whatever is installed

from cyclegan_fast.config import Config, load_config, to_yaml  # noqa: E402
from cyclegan_fast.training import checkpoint as ckpt  # noqa: E402

WORKER = ROOT / "tests" / "training" / "faulty_train.py"
RANKS = 2
TIMEOUT = 5.0  # training.timeout, seconds
# What each fault does, and how often it is drawn; those without a weight come once, in long runs.
FAULTS = {
    "kill": 5,
    "kill saving": 3,
    "terminate all": 2,
    "kill all": 2,
    "terminate": 2,
    "terminate all twice": 1,
    "kill launcher": 1,
    "loop": 0,
    "stop": 0,
}
# After these torchrun itself is gone, or told to go.
RELAUNCHED = ("kill all", "kill launcher", "terminate all", "terminate all twice")
# Scalars that tell the time, not the training.
TIMING = ("time", "pairs_per_s", "data_wait", "memory_gb", "tflops", "mfu", "bandwidth")


class SoakError(Exception):
    """The soak failed; the message says in what."""


def make_config(folder: Path, name: str, steps: int) -> Config:
    """A run of tiny networks on tiny pictures, with a checkpoint every 20 steps."""
    return load_config(
        None,
        [
            *(
                f"name={name}",
                f"out={folder / 'runs'}",
                f"data.root={folder / 'data'}",
                f"data.cache={folder / 'cache'}",
            ),
            *("data.load_size=20", "data.crop_size=16", "data.workers=1", "model.ngf=2", "model.ndf=2"),
            *("model.blocks=1", "model.discriminator=pixel", "training.epochs=1000000", "training.epochs_decay=0"),
            *(f"training.steps={steps}", "training.pool_size=5", "training.precision=fp32", "training.device=cpu"),
            *("training.threads=1", f"training.timeout={TIMEOUT}", "training.impl=reference", "loss.identity=0"),
            *("checkpoint.every_epochs=5", "monitor.log_every=10", "monitor.images_every=0", "monitor.samples=1"),
            *("monitor.tensorboard=false", "monitor.progress=false"),
        ],
    )


def make_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in {"trainA": 8, "trainB": 7, "testA": 1, "testB": 1}.items():
        (folder / split).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{index}.png")


def make_plan(steps: int, count: int, seed: int) -> list[dict[str, Any]]:
    """So many faults over the run, every kind at least once where there are enough of them."""
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    kinds = list(FAULTS) if count >= len(FAULTS) else ["terminate", "kill saving", "kill launcher"][:count]
    kinds += rng.choices(list(FAULTS), list(FAULTS.values()), k=count - len(kinds))
    if count >= len(FAULTS):
        rng.shuffle(kinds)
    stretch = (steps - 30) / count  # each fault has one to itself, and the rest of it to see what came of the fault
    early = 0.6 if count >= len(FAULTS) else 0.45  # in a short run the next checkpoint must fall into it too
    when = [5 + int(stretch * (number + early * rng.random())) for number in range(count)]
    plan = []
    for step, kind in zip(when, kinds, strict=True):
        act = kind.removesuffix(" saving")
        rank = 0 if kind == "kill saving" else rng.randrange(RANKS)  # rank 0 writes the checkpoints
        fault: dict[str, Any] = {"act": act, "step": step, "rank": rank}
        if kind == "kill saving":
            fault["saving"] = True
        elif kind != "loop":
            fault["delay"] = round(rng.uniform(0.0, 0.1), 4)  # any instant of a step
        plan.append(fault)
    return plan


def processes(folder: Path) -> list[int]:
    """All processes whose environment names the folder: what a run started, wherever it hangs now."""
    wanted, found = f"FAULTY={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def launch(config: Config, folder: Path, *arguments: str, restarts: int) -> subprocess.Popen[bytes]:
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*torchrun, f"--max-restarts={restarts}", str(WORKER), "--config", str(file), *arguments],
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULTY": str(folder)},
            start_new_session=True,
        )


def run(config: Config, folder: Path, plan: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Train to the end, whatever happens on the way. Raises SoakError when something else happens than was planned."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    began, launches, looks, arguments = time.monotonic(), 0, [], []
    try:
        while True:
            process = launch(config, folder, *arguments, restarts=len(plan))
            launches += 1
            while process.poll() is None:
                looks.append(resources_of(process.pid))
                if time.monotonic() - began > limit:
                    raise SoakError(f"it has not ended after {limit:.0f} s; see {folder / 'output.txt'}")
                time.sleep(0.2)
            await_none(folder)
            if process.returncode == 0:
                break
            happened = sum(plan[int(path.name.split("-")[1])]["act"] in RELAUNCHED for path in folder.glob("fault-*"))
            if happened < launches:
                raise SoakError(f"torchrun ended with status {process.returncode}, unplanned: {folder / 'output.txt'}")
            arguments = ["--resume"]
    finally:
        for pid in processes(folder):  # whatever is left when something went wrong
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    missed = [fault for number, fault in enumerate(plan) if not (folder / f"fault-{number}").exists()]
    if missed:
        raise SoakError(f"{len(missed)} planned faults never happened: {missed}")
    memory, files = (max(figures) for figures in zip(*looks, strict=True))
    return {
        "seconds": round(time.monotonic() - began, 1),
        "launches": launches,
        "launcher_memory_mb": round(memory / 1e6, 1),
        "launcher_files": files,
    }


def await_none(folder: Path, seconds: float = 60.0) -> None:
    """Wait until no process of a run is left: those whose launcher was killed save first."""
    end = time.monotonic() + seconds
    while left := processes(folder):
        if time.monotonic() > end:
            raise SoakError(f"{len(left)} processes are left behind: {left}")
        time.sleep(0.1)


def resources_of(pid: int) -> tuple[int, int]:
    """Resident bytes and open files of a process; zeros when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    except (OSError, IndexError):
        return 0, 0


def lines(folder: Path, kind: str) -> list[list[list[Any]]]:
    """What the workers wrote, a list a process, in the order in which they began. The last line may be cut off."""
    files = sorted(folder.glob(f"{kind}-*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    found = []
    for file in files:
        whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if whole:
            found.append([json.loads(line) for line in whole])
    return found


def check_samples(straight: Path, disturbed: Path, steps: int) -> dict[str, int]:
    """Every step of every attempt took the samples of the undisturbed run. Returns how many steps were taken again."""
    expected = {(step, rank): (A, B) for part in lines(straight, "samples") for step, rank, A, B in part}
    if len(expected) != steps * RANKS:
        raise SoakError(f"the undisturbed run recorded {len(expected)} samples of {steps * RANKS}")
    taken: Counter[tuple[int, int]] = Counter()
    for part in lines(disturbed, "samples"):
        for (step, rank, A, B), following in zip(part, [*part[1:], None], strict=True):
            if expected[step, rank] != (A, B):
                raise SoakError(f"step {step} of rank {rank} took pictures {A}, {B} and not {expected[step, rank]}")
            if following is not None and following[0] != step + 1:
                raise SoakError(f"step {step} of rank {rank} was followed by step {following[0]}")
            taken[step, rank] += 1
    if taken.keys() != expected.keys():
        raise SoakError(f"{len(expected.keys() - taken.keys())} samples were never taken")
    return {"steps_repeated": (sum(taken.values()) - len(taken)) // RANKS}


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        yield prefix, tree
    else:
        for key, value in items:
            yield from flat(value, f"{prefix}/{key}")


def check_same(straight: Path, disturbed: Path) -> int:
    """Both runs' last checkpoints and records, to the bit. Returns the number of values compared."""
    first, second = (dict(flat(ckpt.read_checkpoint(ckpt.find_checkpoint(run)))) for run in (straight, disturbed))
    names = {name for name in first if not name.startswith(("/config/", "/provenance/"))}
    if names != {name for name in second if not name.startswith(("/config/", "/provenance/"))}:
        raise SoakError("the two last checkpoints do not hold the same things")
    for name in sorted(names):
        one, two = first[name], second[name]
        if not (torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two):
            raise SoakError(f"{name} differs between the undisturbed and the disturbed run")
    if scalars(straight) != scalars(disturbed):
        raise SoakError("the records of the losses differ")
    return sum(v.numel() if isinstance(v, torch.Tensor) else 1 for name, v in first.items() if name in names)


def scalars(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "scalars.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def check_growth(straight: Path, disturbed: Path) -> dict[str, Any]:
    """Memory, open files and threads of the workers: over one long life, and over many short ones."""
    lives = lines(straight, "resources")
    figures: dict[str, Any] = {}
    for life in lives:
        rank = life[0][1]
        early, late = life[len(life) // 4 : len(life) // 2], life[-len(life) // 4 :]
        before, after = (statistics.median(look[2] for look in part) for part in (early, late))
        figures[f"rank_{rank}"] = {
            "memory_mb": [round(before / 1e6, 1), round(after / 1e6, 1)],
            "files": [max(look[3] for look in early), max(look[3] for look in late)],
            "threads": [max(look[4] for look in early), max(look[4] for look in late)],
        }
        if after > 1.02 * before:
            raise SoakError(f"rank {rank}: memory grew from {before / 1e6:.1f} to {after / 1e6:.1f} MB")
        for what, column in (("open files", 3), ("threads", 4)):
            if max(look[column] for look in late) > max(look[column] for look in early):
                raise SoakError(f"rank {rank}: {what} grew")
    most = [max(look[column] for life in lives for look in life) for column in (2, 3, 4)]
    ends = [life[-1] for life in lines(disturbed, "resources")]
    worst = [max(end[column] for end in ends) for column in (2, 3, 4)]
    figures["disturbed"] = {"lives": len(ends), "memory_mb": round(worst[0] / 1e6, 1), "files": worst[1]}
    # A life that begins by reading a checkpoint holds more than one that does not, but no more than twice the file.
    if worst[0] > 1.1 * most[0] or worst[1] > most[1] or worst[2] > most[2]:
        raise SoakError(f"after restarts, workers hold {worst} (bytes, files, threads); undisturbed ones {most}")
    return figures


def check_left_behind(runs: list[Path], shared_before: set[str]) -> None:
    left = {path.name for path in Path("/dev/shm").iterdir()} - shared_before  # noqa: S108
    if left:
        raise SoakError(f"left in /dev/shm: {sorted(left)}")
    for run_dir in runs:
        unfinished = [str(path) for path in run_dir.rglob("*.tmp")]
        if unfinished:
            raise SoakError(f"unfinished files are left: {unfinished}")


def soak(folder: Path, steps: int, faults: int, seed: int, limit: float) -> dict[str, Any]:
    """Both runs and all checks; returns the figures. Raises SoakError."""
    shared = {path.name for path in Path("/dev/shm").iterdir()}  # noqa: S108
    make_pictures(folder / "data")
    plan = make_plan(steps, faults, seed)
    straight, disturbed = (make_config(folder, name, steps) for name in ("straight", "disturbed"))
    result: dict[str, Any] = {"steps": steps, "seed": seed}
    result["faults"] = dict(Counter(f"{fault['act']}{' saving' if 'saving' in fault else ''}" for fault in plan))
    result["undisturbed"] = run(straight, folder / "one", [], limit)
    print(f"undisturbed: {result['undisturbed']}", flush=True)
    result["disturbed"] = run(disturbed, folder / "two", plan, limit)
    print(f"disturbed: {result['disturbed']}", flush=True)
    result["values_equal"] = check_same(straight.run_dir, disturbed.run_dir)
    result |= check_samples(folder / "one", folder / "two", steps)
    result["workers"] = check_growth(folder / "one", folder / "two")
    check_left_behind([straight.run_dir, disturbed.run_dir], shared)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds that either run may take")
    parser.add_argument("--folder", help="where to work, kept; default: a temporary one")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = soak(folder, arguments.steps, arguments.faults, arguments.seed, arguments.limit)
        except SoakError as error:
            for output in sorted(folder.glob("*/output.txt")):
                print(f"--- end of {output}\n{output.read_text(errors='replace')[-4000:]}", file=sys.stderr)
            print(f"soak: {error}", file=sys.stderr)
            return 1
    print(json.dumps(result, indent=1))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
