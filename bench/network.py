"""Two hosts on one machine, joined by a slow link, train together; measured and predicted, step by step.

    sudo python bench/network.py --rate 200mbit --delay 5ms
    sudo python bench/network.py --rate 50mbit,200mbit,1gbit --delay 0ms,5ms,20ms --markdown FILE.md --out FILE.json

Each host is a network namespace with one address. `tc tbf` limits what it sends to the rate. Without delay the two are
joined by a veth pair, with delay by two TUN devices and bench/delay_line.py, which holds each packet back: the
`netem` queue that would do it in the kernel is missing in many. It needs Linux, root, and `ip` and `tc` (iproute2).
The namespaces go with the program, also when it is interrupted; after a kill -9 the next run clears them away.

For each link: two processes time collectives, from which bandwidth and latency follow (least squares over sizes);
bench/communication.py predicts the step from them and from the step that each host makes alone, at the same time but
without the other; then `torchrun train.py` trains on both, one agent in each namespace, and its scalars.jsonl says how
long a step took. The last of these is never an input to the ones before it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from communication import Gloo, Plan, divided, timeline, total_bytes
from model import Task
from provenance import provenance
from tables import write_both

from cyclegan_fast.models import cost

ROOT = Path(__file__).resolve().parents[1]
_PREFIX = "cyclegan-net"
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
# Jumbo frames: a fifth of the packets, which a delay line in Python can carry at 1 Gbit/s.
_MTU = 9000
# Of a frame's bytes on the wire, which tbf counts, and those of the segment in it: IP, TCP with time stamps, Ethernet.
_PAYLOAD = (_MTU - 52) / (_MTU + 14)
_SYSCTL = {
    # Nothing is lost on this link, so nothing but the window's first growth depends on it; one that every namespace may
    # choose. BBR, some kernels' default, empties its window every ten seconds to look at the delay.
    "net/ipv4/tcp_congestion_control": "reno",
    # As on hosts tuned for such links: no slow start after each pause for computing, windows as large as the link asks.
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_wmem": "4096 131072 33554432",
    "net/ipv4/tcp_rmem": "4096 131072 33554432",
}
# Seconds that the hosts' software adds to a message, where nothing was timed.
_SOFTWARE = 0.1e-3
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# Bytes of the collectives that are timed, and how often.
_SIZES = (8, 2**16, 2**18, 2**20, 2**22)
_REPEATS = 5


class NoLinkError(RuntimeError):
    """The machine does not let us make hosts and links; the message says what is missing."""


@dataclass(frozen=True)
class Link:
    """Bits/s each way, and seconds one way."""

    rate: float
    delay: float

    def __str__(self) -> str:
        rate = f"{self.rate / 1e9:g} Gbit/s" if self.rate >= 1e9 else f"{self.rate / 1e6:g} Mbit/s"
        return f"{rate}, {1e3 * self.delay:g} ms"


@dataclass(frozen=True)
class Host:
    """A network namespace and its one device."""

    namespace: str
    device: str
    address: str

    def command(self, *arguments: str | Path) -> list[str]:
        """Run inside."""
        return ["ip", "netns", "exec", self.namespace, *map(str, arguments)]


@contextlib.contextmanager
def two_hosts(link: Link) -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by the link; they are gone afterwards. Raises NoLinkError where that is not allowed."""
    _check_rights(link)
    _sweep()
    hosts = tuple(
        Host(f"{_PREFIX}-{os.getpid()}-{side}", f"cg{os.getpid()}{side}", address)
        for side, address in zip("ab", _ADDRESSES, strict=True)
    )
    with contextlib.ExitStack() as stack:
        for host in hosts:
            stack.callback(_delete, host.namespace)
            _ip("netns", "add", host.namespace)
        if link.delay:
            _join_by_delay_lines(stack, hosts, link.delay)
        else:
            one, other = hosts
            _ip("link", "add", one.device, "netns", one.namespace, "type", "veth",
                "peer", "name", other.device, "netns", other.namespace)  # fmt: skip
        for host in hosts:
            _configure(host, link)
        yield hosts[0], hosts[1]


def _configure(host: Host, link: Link) -> None:
    settings = "; ".join(f"echo '{value}' > /proc/sys/{name}" for name, value in _SYSCTL.items())
    _call(host.command("sh", "-ec", settings))
    inside = ("-n", host.namespace)
    _ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.device)
    _ip(*inside, "link", "set", host.device, "mtu", str(_MTU), "txqueuelen", "10000", "up")
    _ip(*inside, "link", "set", "lo", "up")
    # Four frames may pass at once after a pause; the queue is long enough that nothing is dropped.
    queue = ("tbf", "rate", f"{link.rate:.0f}bit", "burst", f"{4 * (_MTU + 14)}", "limit", "64mb")
    _call(["tc", *inside, "qdisc", "add", "dev", host.device, "root", *queue])


def _join_by_delay_lines(stack: contextlib.ExitStack, hosts: Sequence[Host], delay: float) -> None:
    """A TUN device in each host and a process for each direction between them."""
    descriptors = []
    for host in hosts:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        request = struct.pack("16sH22x", host.device.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
        _ip("link", "set", host.device, "netns", host.namespace)
        descriptors.append(descriptor)
    for source, sink in (descriptors, descriptors[::-1]):
        command = [sys.executable, "-S", ROOT / "bench" / "delay_line.py", str(source), str(sink), str(delay)]
        line = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(source, sink))  # ends when our end closes
        stack.callback(_end, line)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _check_rights(link: Link) -> None:
    if not sys.platform.startswith("linux"):
        raise NoLinkError(f"network namespaces are Linux's, and this is {sys.platform}")
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise NoLinkError(f"{' and '.join(missing)} not found: install iproute2")
    if os.geteuid() != 0:
        raise NoLinkError("making network namespaces needs root: run it by sudo")
    if link.delay and not Path("/dev/net/tun").exists():
        raise NoLinkError("/dev/net/tun is missing, which the delay needs: load the module tun, or use --delay 0ms")


def _sweep() -> None:
    """Delete what a program that was killed could not."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name, pid in re.findall(rf"^({_PREFIX}-(\d+)-[ab])\b", listed, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            _delete(name)


def _delete(namespace: str) -> None:
    """End what runs in a namespace and delete it, if it is there."""
    inside = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in map(int, inside.stdout.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    _call(["ip", *arguments])


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoLinkError(f"`{' '.join(command)}` was refused: {done.stderr.strip() or done.returncode}")


# --------------------------------------------------------------- on both hosts


def on_both(hosts: Sequence[Host], commands: Sequence[Sequence[str | Path]], timeout: float) -> None:
    """Run one command on each host at the same time. Raises RuntimeError with its output if one fails or is late."""
    with contextlib.ExitStack() as stack:
        started = []
        for host, command in zip(hosts, commands, strict=True):
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                host.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "GLOO_SOCKET_IFNAME": host.device, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
            stack.callback(_kill, process)
            started.append((process, log))
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process, _ in started):
            failed = any(process.poll() for process, _ in started)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for process, log in started:
            if process.poll() != 0:
                log.seek(0)
                state = "did not end in time" if process.poll() is None else f"ended with {process.poll()}"
                raise RuntimeError(f"`{' '.join(map(str, process.args))}` {state}:\n{log.read()[-3000:]}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _agent(rank: int, *script: str | Path) -> list[str | Path]:
    """A torchrun agent of two, with one worker."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
    return [*torchrun, "--nproc-per-node=1", f"--master-addr={_ADDRESSES[0]}", "--master-port=29577", *script]


def _counter(host: Host) -> int:
    """Bytes that a host has sent."""
    lines = subprocess.run(host.command("cat", "/proc/net/dev"), capture_output=True, text=True, check=True).stdout
    fields = next(line.partition(":")[2] for line in lines.splitlines() if line.strip().startswith(host.device + ":"))
    return int(fields.split()[8])


def calibrate(hosts: Sequence[Host], folder: Path) -> dict[str, Any]:
    """Medians of collectives between the hosts, in seconds, by size in bytes, and the rate of copying in memory."""
    file = folder / "calibration.json"
    places = [f"RANK={rank}" for rank in range(2)]
    common = ("WORLD_SIZE=2", f"MASTER_ADDR={_ADDRESSES[0]}", "MASTER_PORT=29577")
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


# ------------------------------------------------------------ model and measure


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
    before = _counter(hosts[1])
    on_both(hosts, commands, timeout=300)
    sent = (_counter(hosts[1]) - before) / steps
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


def measured_link(link: Link, task: Task, plan: Plan, alone: float, steps: int, folder: Path) -> dict[str, Any]:
    """One row of the table: predictions, in the order and at the times they were made, and the measurement."""
    with two_hosts(link) as hosts:
        nominal = Gloo(link.rate / 8 * _PAYLOAD, link.delay + _SOFTWARE)
        row: dict[str, Any] = {"link": str(link), **asdict(link), "plan": asdict(plan)}
        calibration = calibrate(hosts, folder)
        network = fitted(calibration)
        compute = divided(_step(task), alone, 0.0, calibration["copy"])
        guesses = {"nominal": timeline(compute, nominal, 2, plan), "predicted": timeline(compute, network, 2, plan)}
        row |= {"calibration": calibration, "fitted": asdict(network), "alone": alone, "predicted_at": time.time()}
        row |= {name: guess.total for name, guess in guesses.items()}
        row |= {"waits": guesses["predicted"].waits, "copies": guesses["predicted"].copies}
        row["bytes"] = (total_bytes(compute.ready_G) + total_bytes(compute.ready_D) + 2 * compute.fake) / _PAYLOAD
        say(f"{link}: predicted {1e3 * row['predicted']:.0f} ms a step ({1e3 * row['nominal']:.0f} by name)")
        windows, sent = train(hosts, folder, task, steps, together=True)
    row |= {"measured_at": time.time(), "windows": windows, "measured": statistics.median(windows), "sent": sent}
    say(f"{link}: measured {1e3 * row['measured']:.0f} ms, {row['predicted'] / row['measured'] - 1:+.1%}")
    return row


def _step(task: Task) -> cost.Step:
    return task.step("i", "fp32")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Predicted and measured, in milliseconds."""
    lines = [
        "| link, each way | fitted: Mbit/s, ms | G | fakes | D | step by name | step predicted | step measured | off "
        "| kB sent: counted | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        waits, fit = row["waits"], row["fitted"]
        parts = " | ".join(f"{1e3 * waits[name]:.0f}" for name in ("generators", "fakes", "discriminators"))
        spread = 1e3 * (max(row["windows"]) - min(row["windows"])) / 2
        lines.append(
            f"| {row['link']} | {8e-6 * fit['bandwidth']:.0f}, {1e3 * fit['latency']:.2f} | {parts} | "
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
        with _leaving_in_order():
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
    rows: list[dict[str, Any]] = []
    if out is not None and out.exists():
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    facts = provenance()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "data", task.size)
        with two_hosts(links[0]) as hosts:
            windows, _ = train(hosts, folder, task, steps, together=False)
        alone = statistics.median(windows)
        say(f"each host alone, both at the same time: {1e3 * alone:.0f} ms a step")
        for link in links:
            row = measured_link(link, task, plan, alone, steps, folder)
            rows = [old for old in rows if old["link"] != row["link"]] + [row]
    rows.sort(key=lambda row: (row["delay"], row["rate"]))
    title = "Two hosts on a slow link, predicted and measured"
    return {"title": title, "provenance": facts, "task": asdict(task), "steps": steps, "rows": rows}


def _explanation(content: dict[str, Any]) -> str:
    task, rows = Task(**content["task"]), content["rows"]
    compute = divided(_step(task), 1.0, 0.0)
    sizes = [total_bytes(ready) / 1e6 for ready in (compute.ready_G, compute.ready_D)]
    low, high = (1e3 * pick(row["alone"] for row in rows) for pick in (min, max))
    alone = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    return (
        f"Two processes of one thread, batch {task.batch} each, {task.size} pixels, ngf = ndf = {task.ngf}, "
        f"{task.blocks} blocks, fp32: gradients of {sizes[0]:.2f} and {sizes[1]:.2f} MB, twice "
        f"{compute.fake / 1e3:.0f} kB of fakes; {alone} ms a step for each alone. Milliseconds but for the last two "
        f"columns; ± half the range of the windows of {_WINDOW} steps."
    )


@contextlib.contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Signals that would end the program on the spot raise SystemExit instead, so that hosts are deleted."""

    def leave(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
        sys.exit(128 + signum)

    previous = {signum: signal.signal(signum, leave) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    sys.exit(main())
