"""Two hosts on one machine, joined by a slow link, train together; measured and predicted, step by step.

    sudo python bench/network.py --rate 200mbit --delay 5ms
    sudo python bench/network.py --rate 50mbit,200mbit,1gbit --delay 0ms,5ms,20ms --markdown FILE.md --out FILE.json

The hosts are network namespaces, made by bench/hosts.py: it needs Linux, root, and `ip` and `tc` (iproute2), and says
so where one is missing. They go with the program, also when it is interrupted; after a kill -9 the next run clears
them away.

For each link: two processes time collectives, from which bandwidth and latency follow (least squares over sizes);
bench/communication.py predicts the step from them and from the step that each host makes alone, at the same time but
without the other; then `torchrun train.py` trains on both, one agent in each namespace, and its scalars.jsonl says how
long a step took. The last of these is never an input to the ones before it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from communication import Gloo, Plan, divided, timeline, total_bytes
from hosts import ADDRESSES, PAYLOAD, ROOT, Host, Link, NoLinkError, leaving_in_order, on_both, sent_bytes, two_hosts
from model import Task
from provenance import provenance
from tables import write, write_both

from cyclegan_fast.models import cost

# Seconds that the hosts' software adds to a message, where nothing was timed.
_SOFTWARE = 0.1e-3
# Bytes of the collectives that are timed, and how often.
_SIZES = (8, 2**16, 2**18, 2**20, 2**22)
_REPEATS = 5


def _agent(rank: int, *script: str | Path) -> list[str | Path]:
    """A torchrun agent of two, with one worker."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
    return [*torchrun, "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}", "--master-port=29577", *script]


def calibrate(hosts: Sequence[Host], folder: Path) -> dict[str, Any]:
    """Medians of collectives between the hosts, in seconds, by size in bytes, and the rate of copying in memory."""
    file = folder / "calibration.json"
    places = [f"RANK={rank}" for rank in range(2)]
    common = ("WORLD_SIZE=2", f"MASTER_ADDR={ADDRESSES[0]}", "MASTER_PORT=29577")
    script = (sys.executable, __file__, "--worker", file)
    on_both(hosts, [("env", place, *common, *script) for place in places], timeout=120)
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def worker(file: Path) -> None:
    """One of two processes: time collectives; the first process writes what it saw."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"all_reduce": {}, "all_gather": {}}
    for size in (_SIZES[-1], *_SIZES):  # the largest first, unheeded: it opens the connection's window
        buffer = torch.zeros(max(size // 4, 1))
        found["all_reduce"][size] = _median(functools.partial(dist.all_reduce, buffer))
    for size in _SIZES:
        buffer, both = torch.zeros(max(size // 4, 1)), torch.empty(2 * max(size // 4, 1))
        found["all_gather"][size] = _median(functools.partial(dist.all_gather_into_tensor, both, buffer))
    source = torch.zeros(2**23)
    target = torch.empty_like(source)
    found["copy"] = 2 * 4 * source.numel() / _median(functools.partial(target.copy_, source))
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _median(call: Callable[[], object]) -> float:
    import torch.distributed as dist

    times = []
    for repeat in range(_REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        call()
        if repeat:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def fitted(calibration: dict[str, Any]) -> Gloo:
    """Bandwidth, latency and the rest of a `Gloo` between two hosts, from timed collectives.

    Up to 4 MiB a reduction of two takes overhead + 4 latencies + its bytes, a single element overhead + 2 latencies.
    """
    import numpy as np

    rows, times = [], []
    for text, seconds in calibration["all_reduce"].items():
        size = int(text)
        rows.append((1.0, 2.0 if size <= 8 else 4.0, 0.0 if size <= 8 else size))
        times.append(seconds)
    weights = 1 / np.array(times)  # all sizes with the same relative error
    solution, *_ = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(times)), rcond=None)
    overhead, latency, inverse = (float(value) for value in solution)
    link = Gloo(1 / inverse, max(latency, 0.0), max(overhead, 0.0))
    ratios = [
        (seconds - link.all_gather(2, 0)) / (int(size) / link.bandwidth)
        for size, seconds in calibration["all_gather"].items()
        if 2**16 <= int(size) <= 2**20
    ]
    return replace(link, gather=max(statistics.median(ratios), 1.0))


def train(hosts: Sequence[Host], folder: Path, task: Task, steps: int, *, together: bool) -> tuple[list[float], float]:
    """Train on both hosts, together or each for itself at the same time.

    Returns the seconds of a step, one figure for each of several windows of steps (of the slower host, where they
    train apart), and the bytes that the second host sent for each step.
    """
    name = "together" if together else "apart"
    commands = []
    for rank in range(2):
        run = [ROOT / "train.py", *_settings(folder, task, steps), f"name={name if together else f'{name}{rank}'}"]
        commands.append(_agent(rank, *run) if together else [sys.executable, *run])
    before = sent_bytes(hosts[1])
    on_both(hosts, commands, timeout=300)
    sent = (sent_bytes(hosts[1]) - before) / steps
    runs = (
        [_windows(folder / "runs" / name)] if together else [_windows(folder / "runs" / f"{name}{r}") for r in (0, 1)]
    )
    shutil.rmtree(folder / "runs")
    return [max(windows) for windows in zip(*runs, strict=True)], sent


_WINDOW = 3  # steps between two lines of scalars.jsonl
_WARM_UP = 3  # windows that are left out: caches, allocators, and the connection's window


def _windows(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "scalars.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [line["time"] for line in lines if "pairs_per_s" in line]  # the others hold measures of the test pictures
    return [(later - sooner) / _WINDOW for sooner, later in itertools.pairwise(times)][_WARM_UP:]


def _settings(folder: Path, task: Task, steps: int) -> list[str]:
    model = (f"model.ngf={task.ngf}", f"model.ndf={task.ndf}", f"model.blocks={task.blocks}")
    data = (f"data.root={folder / 'data'}", f"data.load_size={task.size}", f"data.crop_size={task.size}")
    return [
        *(*model, *data, f"out={folder / 'runs'}", "data.workers=1", f"model.discriminator_layers={task.layers}"),
        *(f"training.steps={steps}", f"training.batch={task.batch}", f"loss.identity={task.identity}"),
        *("training.epochs=1000", "training.device=cpu", "training.precision=fp32", "training.threads=1"),
        *("checkpoint.every_epochs=0", f"monitor.log_every={_WINDOW}", "monitor.images_every=0"),
        *("monitor.progress=false", "monitor.tensorboard=false"),
    ]


def write_pictures(folder: Path, size: int) -> None:
    """A data set of noise: 8 pictures for each domain."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("trainA", "trainB", "testA", "testB"):
        (folder / split).mkdir(parents=True)
        for index in range(8):
            noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / split / f"{index}.png")


def measured_link(link: Link, task: Task, plan: Plan, steps: int, folder: Path) -> dict[str, Any]:
    """One row of the table: predictions, in the order and at the times they were made, and the measurement."""
    with two_hosts(link) as hosts:
        nominal = Gloo(link.rate / 8 * PAYLOAD, link.delay + _SOFTWARE)
        row: dict[str, Any] = {"link": str(link), **asdict(link), "plan": asdict(plan)}
        alone = statistics.median(train(hosts, folder, task, steps, together=False)[0])
        calibration = calibrate(hosts, folder)
        network = fitted(calibration)
        compute = divided(_step(task), alone, 0.0, calibration["copy"])
        guesses = {"nominal": timeline(compute, nominal, 2, plan), "predicted": timeline(compute, network, 2, plan)}
        row |= {"calibration": calibration, "fitted": asdict(network), "alone": alone, "predicted_at": time.time()}
        row |= {name: guess.total for name, guess in guesses.items()}
        row |= {"waits": guesses["predicted"].waits, "copies": guesses["predicted"].copies}
        row["bytes"] = (total_bytes(compute.ready_G) + total_bytes(compute.ready_D) + 2 * compute.fake) / PAYLOAD
        say(f"{link}: alone {1e3 * alone:.0f}, predicted {1e3 * row['predicted']:.0f} ms a step")
        windows, sent = train(hosts, folder, task, steps, together=True)
    row |= {"measured_at": time.time(), "windows": windows, "measured": statistics.median(windows), "sent": sent}
    say(f"{link}: measured {1e3 * row['measured']:.0f} ms, {row['predicted'] / row['measured'] - 1:+.1%}")
    return row


def _step(task: Task) -> cost.Step:
    return task.step("i", "fp32")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Predicted and measured, in milliseconds."""
    lines = [
        "| link, each way | fitted: Mbit/s, ms | alone | G | fakes | D | step by name | step predicted | step measured "
        "| off | kB sent: counted | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        waits, fit = row["waits"], row["fitted"]
        parts = " | ".join(f"{1e3 * waits[name]:.0f}" for name in ("generators", "fakes", "discriminators"))
        spread = 1e3 * (max(row["windows"]) - min(row["windows"])) / 2
        lines.append(
            f"| {row['link']} | {8e-6 * fit['bandwidth']:.0f}, {1e3 * fit['latency']:.2f} | "
            f"{1e3 * row['alone']:.0f} | {parts} | "
            f"{1e3 * row['nominal']:.0f} | {1e3 * row['predicted']:.0f} | {1e3 * row['measured']:.0f} ± {spread:.0f} | "
            f"{row['predicted'] / row['measured'] - 1:+.1%} | {row['bytes'] / 1e3:.0f} | {row['sent'] / 1e3:.0f} |"
        )
    return lines


def say(text: str) -> None:
    """A word on how far we are."""
    print(text, file=sys.stderr, flush=True)


def _quantities(units: dict[str, float]) -> Any:
    """A parser of lists such as 50mbit,1gbit."""

    def parse(text: str) -> list[float]:
        found = []
        for part in text.split(","):
            match = re.fullmatch(r"([0-9.]+)([a-z]+)", part.strip().lower())
            if match is None or match[2] not in units:
                raise argparse.ArgumentTypeError(f"{part!r} is not a number with one of {', '.join(units)} behind it")
            found.append(float(match[1]) * units[match[2]])
        return found

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    rates, delays = _quantities({"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}), _quantities({"us": 1e-6, "ms": 1e-3, "s": 1})
    parser.add_argument(
        "--rate", type=rates, default=[200e6], help="of the link each way: 200mbit, or several by comma"
    )
    parser.add_argument("--delay", type=delays, default=[0.0], help="of the link one way: 5ms, or several by comma")
    parser.add_argument("--ngf", type=int, default=16, help="channels of the networks' first layers")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=1, help="pairs of a process")
    parser.add_argument("--blocks", type=int, default=9, help="residual blocks of a generator")
    parser.add_argument(
        "--steps", type=int, default=30, help=f"of each training, the first {_WINDOW * _WARM_UP} unheeded"
    )
    parser.add_argument(
        "--overlap",
        choices=("none", "discriminators"),
        default="discriminators",
        help="what the model takes the trainer to do; none: one reduction after each pass, as in the first versions",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; if it is there already, its rows stay in it")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write (default: standard output)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.worker)
        return 0
    task = Task(options.batch, options.size, 0.5, options.ngf, options.ngf, options.blocks)
    plan = Plan(options.overlap, "late" if options.overlap == "none" else "forward", log_every=_WINDOW)
    links = [Link(rate, delay) for delay in options.delay for rate in options.rate]
    try:
        with leaving_in_order():
            content = _measure_all(links, task, plan, options.steps, options.out)
    except NoLinkError as error:
        say(f"network.py: {error}")
        return 2
    lines = [_explanation(content), "", *table(content["rows"])]
    write_both(options.out, options.markdown, content, lines)
    if options.markdown is None:
        print("\n".join(lines))
    return 0


def _measure_all(links: Sequence[Link], task: Task, plan: Plan, steps: int, out: Path | None) -> dict[str, Any]:
    title = "Two hosts on a slow link, predicted and measured"
    content: dict[str, Any] = {"title": title, "provenance": provenance(), "task": asdict(task), "steps": steps}
    content["rows"] = json.loads(out.read_text(encoding="utf-8"))["rows"] if out is not None and out.exists() else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "data", task.size)
        for link in links:
            row = measured_link(link, task, plan, steps, folder)
            rows = [old for old in content["rows"] if old["link"] != row["link"]] + [row]
            content["rows"] = sorted(rows, key=lambda row: (row["delay"], row["rate"]))
            write(out, json.dumps(content, indent=1))
    return content


def _explanation(content: dict[str, Any]) -> str:
    task = Task(**content["task"])
    compute = divided(_step(task), 1.0, 0.0)
    sizes = [total_bytes(ready) / 1e6 for ready in (compute.ready_G, compute.ready_D)]
    return (
        f"Two processes of one thread, batch {task.batch} each, {task.size} pixels, ngf = ndf = {task.ngf}, "
        f"{task.blocks} blocks, fp32: gradients of {sizes[0]:.2f} and {sizes[1]:.2f} MB, twice "
        f"{compute.fake / 1e3:.0f} kB of fakes. Milliseconds but for the last two columns; alone: what each host "
        f"takes for a step without the other; G, fakes, D: the waits predicted; ± half the range of the windows "
        f"of {_WINDOW} steps."
    )


if __name__ == "__main__":
    sys.exit(main())
