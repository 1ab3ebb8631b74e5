"""What breaks while a run goes on, broken on purpose: what is on the disk stays valid, and resuming is exact.

The rows of docs/reliability.md name these tests.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import flat, losses
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from zygote import Child, Zygote, session, shared_memory

from cyclegan_fast.cli import main
from cyclegan_fast.config import Config, ConfigError, to_yaml
from cyclegan_fast.data.folder import DataError
from cyclegan_fast.evaluation.figures import curves_figure
from cyclegan_fast.progress import Bar
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training import lock, samples, trainer
from cyclegan_fast.training.health import NonFiniteLossError
from cyclegan_fast.training.lock import RunLockedError
from cyclegan_fast.training.monitor import History
from cyclegan_fast.training.trainer import train

Tiny = Callable[..., Config]
# 6 steps an epoch: checkpoints after the steps 3, 6 and 8, readings after every second.
USUAL = ("training.steps=8", "checkpoint.every_epochs=0.5", "checkpoint.milestones=[1]", "checkpoint.keep=2")
NAMES = ["best.ckpt", "epoch-0001.ckpt", "step-00000006.ckpt", "step-00000008.ckpt"]


def state_of(file: Path) -> dict[str, Any]:
    content = ckpt.read_checkpoint(file)
    for name in ("config", "provenance"):
        del content[name]
    return flat(content)


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Every tensor and number equal, to the bit."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two[name]), name
        else:
            assert value == two[name], name


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure at the end takes half the time of so short a run."""
    monkeypatch.setattr(trainer, "curves_figure", lambda *_: None)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with contextlib.closing(Zygote()) as process:
        yield process


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """State and losses of the usual run, once it has been made: the same in every folder."""
    return {}


@pytest.fixture
def recovered(tiny: Tiny, undisturbed: dict[str, Any]) -> Callable[..., None]:
    """Checks that a run, once resumed, is the usual run without a fault, and has left nothing behind."""

    def check(run: Path, *overrides: str, resume: bool = True, names: list[str] = NAMES) -> None:
        if not undisturbed:
            straight = train(tiny("straight", *USUAL))
            undisturbed.update(losses=losses(straight), latest=state_of(ckpt.find_checkpoint(straight)))
            undisturbed["best"] = state_of(ckpt.find_checkpoint(straight, "best"))
        if resume:
            train(tiny(run.name, *USUAL, *overrides), resume=True)
        assert_same(undisturbed["latest"], state_of(ckpt.find_checkpoint(run)))
        assert losses(run) == undisturbed["losses"]
        if names is NAMES:
            assert_same(undisturbed["best"], state_of(ckpt.find_checkpoint(run, "best")))
        assert sorted(path.name for path in ckpt.checkpoint_dir(run).iterdir()) == names
        left = [path for path in run.rglob("*") if path.name.endswith(".tmp") or path.name == ".lock"]
        assert left == []

    return check


@pytest.fixture
def segments() -> Iterator[None]:
    """Fails the test that leaves shared memory behind."""
    before = shared_memory()
    yield
    deadline = time.monotonic() + 5
    while (left := shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.1)  # another test's process may be about to remove its own
    assert left == set()


def program(config: Config, fault: str, *, resume: bool = False) -> str:
    """A program that trains, with a fault in it."""
    return f"""
import ctypes, os, resource, shutil, signal, sys, time
from pathlib import Path
import torch
from cyclegan_fast.config import from_dict
from cyclegan_fast.data import store
from cyclegan_fast.training import checkpoint as ckpt, monitor, trainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(number, act):
    plain, calls = trainer.train_step, 0
    def patched(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return plain(*arguments, **options)
    trainer.train_step = patched

def train(resume={resume}):
    return trainer.train(config, resume=resume)

config = from_dict({json.loads(json.dumps(_tree(config)))!r})
{textwrap.dedent(fault)}
train()
"""


def _tree(config: Config) -> dict[str, Any]:
    from cyclegan_fast.config import to_dict

    return to_dict(config)


def killed(zygote: Zygote, config: Config, fault: str, folder: Path, **options: Any) -> Child:
    """Let a fault kill a run; nothing may outlive it."""
    child = zygote.run(program(config, fault, **options), folder)
    assert child.status == -signal.SIGKILL, child.output
    deadline = time.monotonic() + 10
    while (alive := session(child.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []
    return child


# ---- kill -9


def test_kill_during_a_step(
    zygote: Zygote, tiny: Tiny, tmp_path: Path, recovered: Callable[..., None], segments: None
) -> None:
    config = tiny("run", *USUAL)
    killed(zygote, config, "at_step(5, die)", tmp_path)
    assert [path.name for path in ckpt.step_checkpoints(config.run_dir)] == ["step-00000003.ckpt"]
    recovered(config.run_dir)


AT_STEP_6 = """
def is_6(path):
    return Path(path).name == "step-00000006.ckpt"
"""
WRITE_FAULTS = {
    "before": """
plain = ckpt.write_checkpoint
ckpt.write_checkpoint = lambda path, content: die() if is_6(path) else plain(path, content)
""",
    "half-of-the-file": """
plain = torch.save
def save(content, path):
    plain(content, path)
    if content["position"]["step"] == 6:
        os.truncate(path, Path(path).stat().st_size // 2)
        die()
torch.save = save
""",
    "before-the-checksum": """
plain = torch.save
def save(content, path):
    plain(content, path)
    if content["position"]["step"] == 6:
        die()
torch.save = save
""",
    "before-the-rename": """
plain = Path.replace
Path.replace = lambda path, target: die() if is_6(target) else plain(path, target)
""",
    "after-the-rename": """
plain = Path.replace
def replace(path, target):
    plain(path, target)
    if is_6(target):
        die()
Path.replace = replace
""",
    "before-the-second-name": """
plain = Path.replace
Path.replace = lambda path, target: die() if Path(target).name == "epoch-0001.ckpt" else plain(path, target)
""",
    "before-pruning": """
plain, calls = ckpt.prune, []
def prune(run, keep):
    calls.append(run)
    if len(calls) == 3:
        die()
    plain(run, keep)
ckpt.prune = prune
""",
}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_kill_during_a_checkpoint_write(
    zygote: Zygote, tiny: Tiny, tmp_path: Path, recovered: Callable[..., None], segments: None, fault: str
) -> None:
    config = tiny("run", *USUAL)
    killed(zygote, config, AT_STEP_6 + WRITE_FAULTS[fault], tmp_path)
    there = [path.name for path in ckpt.step_checkpoints(config.run_dir)]
    whole = {"after-the-rename": 2, "before-the-second-name": 2, "before-pruning": 3}.get(fault, 1)
    assert there == ["step-00000003.ckpt", "step-00000006.ckpt", "step-00000008.ckpt"][:whole]
    for path in ckpt.step_checkpoints(config.run_dir):
        ckpt.read_checkpoint(path)
    # A run that was killed when all was done has nothing to do, and so nothing to clear away.
    names = ["best.ckpt", "epoch-0001.ckpt", *there] if fault == "before-pruning" else NAMES
    recovered(config.run_dir, names=names)


def test_kill_while_the_settings_are_written(
    zygote: Zygote, tiny: Tiny, tmp_path: Path, recovered: Callable[..., None]
) -> None:
    """`--resume RUN` reads them from the run."""
    config = tiny("run", *USUAL)
    killed(zygote, config, "at_step(5, die)", tmp_path)
    fault = """
    plain = Path.replace
    Path.replace = lambda path, target: die() if Path(target).name == "config.yaml" else plain(path, target)
    """
    killed(zygote, config, fault, tmp_path, resume=True)
    assert main(["train", "--resume", str(config.run_dir)]) == 0
    recovered(config.run_dir, resume=False)


def test_kill_while_the_store_is_built(
    zygote: Zygote, tiny: Tiny, tmp_path: Path, recovered: Callable[..., None], segments: None
) -> None:
    """The decoding processes end with the one that asked, and its half store is removed by the next."""
    config = tiny("run", *USUAL, "data.workers=2")
    fault = """
    plain = store._Builder._publish
    store._Builder._publish = lambda self, *rest: die() if self.split == "trainB" else plain(self, *rest)
    ask = store._Worker.ask
    def slow(self, task):
        answer = ask(self, task)
        if task.index == 2 and "trainB" in task.path:
            die()
        return answer
    store._Worker.ask = slow
    """
    killed(zygote, config, fault, tmp_path)
    cache = tmp_path / "cache"
    assert len(list(cache.glob("trainB-*.tmp"))) == 1
    assert ckpt.step_checkpoints(config.run_dir) == []
    recovered(config.run_dir)
    assert list(cache.glob("*.tmp")) == []


# ---- the disk

MOUNT = """
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind, flags, options=None):
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if libc.mount(*encoded, flags, None if options is None else options.encode()):
        print("cannot mount:", os.strerror(ctypes.get_errno()))
        sys.exit(77)

user, group = os.getuid(), os.getgid()
if libc.unshare(0x00020000 if user == 0 else 0x10020000):  # mounts of its own; users too for who is not root
    print("cannot unshare:", os.strerror(ctypes.get_errno()))
    sys.exit(77)
if user:
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
mount("none", "/", None, 0x44000)  # private, and all below
"""


def mounted(zygote: Zygote, code: str, folder: Path) -> Child:
    """Run code that mounts, where that is allowed."""
    child = zygote.run(code, folder)
    if child.status == 77:
        pytest.skip(child.output)
    return child


def test_disk_full_while_saving(zygote: Zygote, tiny: Tiny, tmp_path: Path, recovered: Callable[..., None]) -> None:
    """A file system with room for one checkpoint and a half; then it gets room again."""
    config = tiny("run", *USUAL)
    place = config.run_dir.parent
    place.mkdir()
    fault = f"""
    mount("none", {str(place)!r}, "tmpfs", 0, "size=8m")
    ballast, plain = Path({str(place)!r}, "ballast"), ckpt.write_checkpoint
    def write(path, content):
        if content["position"]["step"] == 6 and not ballast.exists():
            free = os.statvfs({str(place)!r}).f_bavail * 4096
            ballast.write_bytes(bytes(free - ckpt.step_path(config.run_dir, 3).stat().st_size // 2))
        plain(path, content)
    ckpt.write_checkpoint = write
    try:
        train()
    except ckpt.CheckpointError as error:
        print("ERROR", error)
    print("THERE", sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()))
    shutil.copytree(config.run_dir, {str(tmp_path / "full")!r})
    """
    child = mounted(zygote, program(config, MOUNT + textwrap.dedent(fault)).removesuffix("train()\n"), tmp_path)
    assert child.status == 0, child.output
    assert "ERROR cannot write the checkpoint" in child.output
    assert "step-00000006.ckpt" in child.output
    assert "THERE ['best.ckpt', 'step-00000003.ckpt']" in child.output
    shutil.copytree(tmp_path / "full", config.run_dir)
    recovered(config.run_dir)


def test_files_limited_while_saving(zygote: Zygote, tiny: Tiny, tmp_path: Path, recovered: Callable[..., None]) -> None:
    """The same by a limit on the size of files, which needs no rights: the write fails in its middle."""
    config = tiny("run", *USUAL)
    fault = """
    plain = ckpt.write_checkpoint
    def write(path, content):
        if content["position"]["step"] == 6:
            limit = ckpt.step_path(config.run_dir, 3).stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        plain(path, content)
    ckpt.write_checkpoint = write
    """
    child = zygote.run(program(config, fault), tmp_path)
    assert child.status == 1
    assert "CheckpointError: cannot write the checkpoint" in child.output
    names = sorted(path.name for path in ckpt.checkpoint_dir(config.run_dir).iterdir())
    assert names == ["best.ckpt", "step-00000003.ckpt"]
    assert session(child.pid) == []
    recovered(config.run_dir)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoints(
    tiny: Tiny, recovered: Callable[..., None], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """The one before the damaged is used, and is not removed for it later on."""
    run = train(tiny("run", *USUAL, "training.steps=6"))
    latest = ckpt.step_path(run, 6)

    def harm(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()  # further names of the file keep what it was
        path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])

    harm(latest)
    train(tiny("run", *USUAL, "training.steps=4", "checkpoint.keep=1", "checkpoint.best=none"), resume=True)
    assert f"{latest} {'is damaged' if damage == 'flipped' else 'has no checksum'}" in caplog.text
    assert f"{latest.name}.damaged" in caplog.text
    assert [path.name for path in ckpt.step_checkpoints(run)] == ["step-00000004.ckpt"]
    recovered(run, names=[*NAMES[:3], "step-00000006.ckpt.damaged", *NAMES[3:]])

    for path in ckpt.step_checkpoints(run):
        harm(path)
    with pytest.raises(ckpt.CheckpointError, match=r"none of the 2 checkpoints in .* can be read"):
        train(tiny("run", *USUAL, "training.steps=10"), resume=True)


# ---- two runs in one folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.2)


def test_two_runs_in_one_folder(
    zygote: Zygote, tiny: Tiny, tmp_path: Path, recovered: Callable[..., None], impatient: None
) -> None:
    config = tiny("run", *USUAL)
    child = zygote.start(program(config, "at_step(5, lambda: (Path('ready').touch(), time.sleep(60)))"), tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(RunLockedError) as error:
            train(config, resume=resume)
        for word in (str(config.run_dir), f"process {child.pid} ", f"host {platform.node()} "):
            assert word in str(error.value)
    assert {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()} == before
    train(tiny("another", "training.steps=1"))  # other folders are free
    child.kill()
    assert (config.run_dir / ".lock").exists()  # which is no obstacle: the lock went with the process
    recovered(config.run_dir)


def test_a_lock_file_of_another_user(tiny: Tiny, recovered: Callable[..., None], monkeypatch: Any) -> None:
    """A copied or inherited run folder may hold one that cannot be written."""
    run = train(tiny("run", *USUAL, "training.steps=4"))
    left_over, plain = run / ".lock", os.open
    left_over.write_text("{}")
    left_over.chmod(0o444)
    inode = left_over.stat().st_ino

    def guarded(path: Any, flags: int, *rest: Any, **options: Any) -> int:  # root would be let in
        inherited = str(path) == str(left_over) and left_over.exists() and left_over.stat().st_ino == inode
        if inherited and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", guarded)
    with lock.run_lock(run):
        assert json.loads(left_over.read_text())["pid"] == os.getpid()
    left_over.write_text("{}")
    recovered(run)


def test_a_file_system_without_locks(
    tiny: Tiny, recovered: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock._fcntl, "flock", flock)
    run = train(tiny("run", *USUAL))
    assert caplog.text.count("the file system has no locks (No locks available)") == 1
    (run / ".lock").unlink()  # nobody knows whether another uses it, so it stays
    recovered(run, resume=False)


# ---- numbers that are none


def disturb(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[..., None]) -> None:
    """Have ``act(state, scalars)`` called after the step of that number; with scalars None before it."""
    plain, calls = trainer.train_step, 0

    def patched(state: Any, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == number:
            act(state, None)
        scalars = plain(state, *arguments, **options)
        if calls == number:
            act(state, scalars)
        return scalars

    monkeypatch.setattr(trainer, "train_step", patched)


def nan_loss(state: Any, scalars: dict[str, torch.Tensor] | None) -> None:
    if scalars is not None:
        scalars["cycle_A"].fill_(math.nan)


def nan_gradient(state: Any, scalars: dict[str, torch.Tensor] | None) -> None:
    if scalars is None:
        weight = next(state.D_A.parameters())
        handles = [weight.register_hook(lambda gradient: (handles[0].remove(), gradient * math.nan)[1])]


def nan_weight(state: Any, scalars: dict[str, torch.Tensor] | None) -> None:
    if scalars is not None:
        next(state.D_B.parameters()).data[0, 0, 0, 0] = math.nan


def huge_moment(state: Any, scalars: dict[str, torch.Tensor] | None) -> None:
    if scalars is not None:
        state.optimizer_G.state[next(state.G_B.parameters())]["exp_avg_sq"][0, 0, 0, 0] = math.inf


@pytest.mark.parametrize(
    ("act", "step", "log_every", "words"),
    [
        (nan_loss, 5, 2, ("cycle_A became",)),
        (nan_loss, 5, 50, ("cycle_A became",)),
        (nan_gradient, 5, 2, ("grad_D became", "No numbers after step 6: G_A.")),
        (nan_gradient, 6, 50, ("grad_D became", "No numbers after step 6: D_A.", ".weight")),
        (nan_weight, 6, 2, ("D_B.model.0.weight became",)),
        (huge_moment, 6, 2, ("exp_avg_sq of G_B.model.1.weight became",)),
    ],
    ids=["loss-read", "loss-unread", "gradient-read", "gradient-unread", "weight", "moment"],
)
def test_not_a_number(
    tiny: Tiny,
    recovered: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[..., None],
    step: int,
    log_every: int,
    words: tuple[str, ...],
) -> None:
    """It never comes into a checkpoint, whether losses are read before or not; the state is kept to look at."""
    config = tiny("run", *USUAL, f"monitor.log_every={log_every}")
    disturb(monkeypatch, step, act)
    with pytest.raises(NonFiniteLossError) as error:
        train(config)
    monkeypatch.undo()
    message = str(error.value)
    A, B = pictures_of(config, step)
    for word in (*words, f"in step {step} (epoch 1)", f"A {A[0]}; B {B[0]}", "nonfinite-00000006.ckpt"):
        assert word in message
    kept = ckpt.read_checkpoint(ckpt.checkpoint_dir(config.run_dir) / "nonfinite-00000006.ckpt")
    assert kept["position"]["step"] == 6
    assert [path.name for path in ckpt.step_checkpoints(config.run_dir)] == ["step-00000003.ckpt"]
    if log_every == 2:
        recovered(config.run_dir, names=[*NAMES[:2], "nonfinite-00000006.ckpt", *NAMES[2:]])


def pictures_of(config: Config, step: int) -> tuple[list[str], list[str]]:
    """The pictures of a step, counted from 1."""
    from cyclegan_fast.data.loader import open_training_data

    loader = open_training_data(config, rank=0, world_size=1, device="cpu", progress=False).loader
    batch = loader.batch(step - 1)
    return loader.names_of(batch.index_A, batch.index_B)


def test_gradients_that_a_loss_scaler_leaves_out(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As fp16 has it: a step whose gradients overflow is left out and is no fault, but all of them are."""
    build = trainer.build_state

    def scaled(*arguments: Any) -> Any:
        state = build(*arguments)
        state.scaler = GradScaler("cpu", init_scale=2.0**-8)
        return state

    monkeypatch.setattr(trainer, "build_state", scaled)
    disturb(monkeypatch, 3, nan_gradient)
    run = train(tiny("run", "training.steps=5", "monitor.log_every=50", "checkpoint.every_epochs=0.5"))
    content = ckpt.read_checkpoint(ckpt.find_checkpoint(run))
    assert content["scaler"]["scale"] == 2.0**-9
    assert all(weight.isfinite().all() for weight in content["D_A"].values())

    def always(state: Any, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        nan_gradient(state, None)
        return plain(state, *arguments, **options)

    plain = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", always)
    with pytest.raises(NonFiniteLossError, match=r"every gradient at every loss scale down to 0\.00024 .* in step 4 "):
        train(tiny("always", "training.steps=8", "monitor.log_every=4"))


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_looking_for_them_does_not_wait_for_the_device(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, counter = trainer.Trainer._take_step, CountReads()

    def counted(*arguments: Any) -> dict[str, torch.Tensor]:
        with counter:
            return plain(*arguments)

    monkeypatch.setattr(trainer.Trainer, "_take_step", counted)
    run = train(tiny("run", "training.steps=4", "monitor.log_every=2"))
    assert counter.reads == 0
    assert all(line["grad_G"] > 0 for line in losses(run))
    with counter:
        assert bool(torch.ones(()).isfinite())  # the counter would have seen it
    assert counter.reads == 1


def test_a_measure_that_is_no_number_is_not_the_best(
    tiny: Tiny, recovered: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test picture may overflow where the training pictures do not."""
    measures = iter([{"test_cycle": 3.0}, {"test_cycle": math.nan}, {"test_cycle": 2.0}])
    monkeypatch.setattr(samples.Samples, "measure", lambda _: next(measures))
    run = train(tiny("run", *USUAL))
    assert ckpt.read_checkpoint(ckpt.step_path(run, 6))["best"] == 3.0
    assert ckpt.read_checkpoint(ckpt.find_checkpoint(run, "best"))["position"]["step"] == 8


# ---- the pictures


def test_pictures_changed_between_runs(
    tiny: Tiny, dataset: Path, tmp_path: Path, recovered: Callable[..., None]
) -> None:
    run = train(tiny("run", *USUAL, "training.steps=6"))
    changed = dataset / "trainB" / "002.png"
    original, status = changed.read_bytes(), changed.stat()

    changed.write_bytes((dataset / "trainB" / "003.png").read_bytes())
    with pytest.raises(ckpt.CheckpointError, match=r"other content: trainB/002\.png\): restore them"):
        train(tiny("run", *USUAL), resume=True)
    changed.rename(changed.with_name("005.png"))
    with pytest.raises(ckpt.CheckpointError, match=r"6 of A and 5 of B, list .* then, 6 of A and 5 of B, list .* now"):
        train(tiny("run", *USUAL), resume=True)
    changed.with_name("005.png").unlink()
    with pytest.raises(ckpt.CheckpointError, match=r"6 of A and 4 of B, list .* now"):
        train(tiny("run", *USUAL), resume=True)

    # The same pictures in another place, with other times, are the same.
    changed.write_bytes(original)
    assert changed.stat().st_mtime_ns != status.st_mtime_ns
    dataset.rename(tmp_path / "moved")
    recovered(run, f"data.root={tmp_path / 'moved'}")


def test_checkpoints_of_the_first_version(tiny: Tiny, recovered: Callable[..., None]) -> None:
    """They know the names of the pictures alone, hold a history of rows and no step of the best."""
    run = train(tiny("run", *USUAL, "training.steps=3", "monitor.log_every=2"))
    path = ckpt.find_checkpoint(run)
    content = ckpt.read_checkpoint(path)
    del content["data"]["files"], content["best_step"]
    content["history"] = {"names": ["loss_G"], "rows": []}
    ckpt.write_checkpoint(path, content)
    train(tiny("run", *USUAL), resume=True)
    assert [line["step"] for line in losses(run)] == [2, 3, 4, 6, 8]


def test_history_is_one_tensor_in_a_checkpoint() -> None:
    history, resumed = History(), History()
    for step in range(2500):
        history.append({"a": torch.tensor(float(step)), "b": torch.tensor(0.5)})
    state = history.state_dict()
    assert ckpt._is_history(state)
    assert state["values"].shape == (2500, 2)
    rows = {"names": ["a", "b"], "rows": list(state["values"])}
    assert ckpt._is_history(rows)
    for earlier in (state, rows):
        resumed.load_state_dict(earlier, torch.device("cpu"))
        resumed.append({"a": torch.tensor(2500.0), "b": torch.tensor(0.5), "c": torch.tensor(1.0)})
        assert len(resumed) == 2501
        names, values, extra = resumed.take()
        assert names == ["a", "b"]
        assert torch.equal(values[:, 0], torch.arange(2501.0))
        assert list(extra) == ["c"]
    resumed.load_state_dict(resumed.state_dict(), torch.device("cpu"))
    assert len(resumed) == 0
    for wrong in (
        {"names": ["a"], "values": torch.zeros(2, 2)},
        {"names": ["a"], "values": torch.zeros(1)},
        {"names": ["a"], "values": [torch.zeros(1)]},
        {"names": ["a"]},
        {"names": ["a"], "rows": torch.zeros(2, 1)},
    ):
        assert not ckpt._is_history(wrong)


def without_pictures(dataset: Path, cache: Path) -> Callable[..., None]:
    def remove(state: Any, scalars: Any) -> None:
        for folder in (dataset, cache):
            shutil.rmtree(folder, ignore_errors=True)

    return remove


@pytest.mark.parametrize("resident", ["auto", "never"])
def test_pictures_vanish_in_mid_epoch(
    tiny: Tiny,
    dataset: Path,
    tmp_path: Path,
    recovered: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    resident: str,
) -> None:
    """A run has the store open, which stays as long as that; the next start says what is missing."""
    config = tiny("run", *USUAL, f"data.resident={resident}")
    disturb(monkeypatch, 4, without_pictures(dataset, tmp_path / "cache"))
    shutil.copytree(dataset, tmp_path / "copy")
    train(config)
    with pytest.raises(DataError, match=f"{dataset} does not exist"):
        train(tiny("run", *USUAL), resume=True)
    (tmp_path / "copy").rename(dataset)
    recovered(config.run_dir, resume=False)


def test_pictures_vanish_while_they_are_decoded(
    tiny: Tiny, dataset: Path, recovered: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cyclegan_fast.data import store

    plain, lost = store._store_picture, dataset / "trainA" / "004.png"
    kept = lost.read_bytes()

    def vanishing(*arguments: Any) -> Any:
        lost.unlink(missing_ok=True)
        return plain(*arguments)

    monkeypatch.setattr(store, "_store_picture", vanishing)
    with pytest.raises(DataError, match=r"004\.png: vanished after it was scanned|004\.png.*No such file"):
        train(tiny("run", *USUAL))
    monkeypatch.undo()
    lost.write_bytes(kept)
    recovered(tiny("run").run_dir)


def test_a_store_cut_off_in_mid_epoch(
    zygote: Zygote, tiny: Tiny, tmp_path: Path, recovered: Callable[..., None], segments: None
) -> None:
    """The system ends a process that reads what is no longer there. The store is then built again."""
    config = tiny("run", *USUAL)
    fault = """
    def cut():
        for path in Path(os.environ["CYCLEGAN_FAST_CACHE"]).glob("*/data.bin"):
            os.truncate(path, 0)
    at_step(5, cut)
    """
    child = zygote.run(program(config, fault), tmp_path)
    assert child.status == -signal.SIGBUS, child.output
    assert session(child.pid) == []
    recovered(config.run_dir)


def test_a_data_folder_that_cannot_be_written(
    zygote: Zygote, tiny: Tiny, dataset: Path, tmp_path: Path, recovered: Callable[..., None]
) -> None:
    """Nothing is put beside the pictures, here or (mounted read-only, which binds root too) where nothing can be."""
    before = {path: path.stat().st_mtime_ns for path in (dataset, *dataset.rglob("*"))}
    for folder in (dataset, *(path for path in dataset.iterdir())):
        folder.chmod(0o555)
    recovered(train(tiny("run", *USUAL)), resume=False)
    assert {path: path.stat().st_mtime_ns for path in (dataset, *dataset.rglob("*"))} == before
    shutil.rmtree(tmp_path / "cache")
    fault = f"""
    mount({str(dataset)!r}, {str(dataset)!r}, None, 0x1000)
    mount({str(dataset)!r}, {str(dataset)!r}, None, 0x1021)  # remount, bind, read-only
    try:
        Path({str(dataset)!r}, "file").touch()
    except OSError as error:
        print(error.strerror)
    """
    config = tiny("mounted", *USUAL)
    child = mounted(zygote, program(config, MOUNT + textwrap.dedent(fault)), tmp_path)
    assert child.status == 0, child.output
    assert "Read-only file system" in child.output
    recovered(config.run_dir, resume=False)


# ---- clocks


class Clock:
    """A clock of the system that jumps by a year at every look, forth and back."""

    def __init__(self) -> None:
        self._time, self.looks = time.time, 0

    def __call__(self) -> float:
        self.looks += 1
        return self._time() + (-1) ** self.looks * 3.2e7


def test_a_clock_that_jumps(
    tiny: Tiny, recovered: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    saved = []
    write = ckpt.write_checkpoint
    monkeypatch.setattr(ckpt, "write_checkpoint", lambda path, content: (saved.append(path.name), write(path, content)))
    config = tiny("run", *USUAL, "checkpoint.every_minutes=1", "training.steps=6")
    run = train(config)
    assert saved == ["step-00000003.ckpt", "step-00000006.ckpt"]
    assert clock.looks > 0

    # The latest is the one of the last step, whatever the files' times say.
    for path, seconds in ((ckpt.step_path(run, 3), 4e9), (ckpt.step_path(run, 6), 0)):
        os.utime(path, (seconds, seconds))
    caplog.set_level(logging.INFO)
    recovered(run)
    assert "step-00000006.ckpt: step 6 of 8" in caplog.text


def test_minutes_are_those_of_the_monotonic_clock(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, started = time.monotonic, time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: started + 100 * (plain() - started))
    run = train(tiny("run", "training.steps=4", "checkpoint.every_minutes=0.0001", "checkpoint.keep=9"))
    assert len(ckpt.step_checkpoints(run)) == 4


def test_the_bar_goes_on_when_the_clock_is_set_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bar(total=3, mininterval=0.001, miniters=1) as bar:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        monkeypatch.setattr("tqdm.std.time", lambda: 0.0)
        time.sleep(0.01)
        bar.update()
        assert "1/3" in capsys.readouterr().err


# ---- records


def test_tensorboard_cannot_be_written(
    tiny: Tiny, recovered: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("run", *USUAL, "monitor.tensorboard=true", "monitor.images_every=0.5")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "tensorboard").write_text("a file")
    train(config)
    assert caplog.text.count("TensorBoard's events cannot be kept") == 1
    recovered(config.run_dir, resume=False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_fails_in_the_middle(
    tiny: Tiny, recovered: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("run", *USUAL, "monitor.tensorboard=true")
    disturb(monkeypatch, 4, lambda *_: shutil.rmtree(config.run_dir / "tensorboard", ignore_errors=True))
    train(config)
    assert caplog.text.count("TensorBoard's events cannot be kept") == 1
    recovered(config.run_dir, resume=False)


def test_tensorboard_has_what_the_checkpoint_has(zygote: Zygote, tiny: Tiny, tmp_path: Path) -> None:
    """Its thread writes when it comes to it; what lies before a checkpoint is not recorded again after a kill."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny("run", *USUAL, "monitor.tensorboard=true")
    fault = """
    from tensorboard.summary.writer.record_writer import RecordWriter
    plain = RecordWriter.write
    RecordWriter.write = lambda self, data: (time.sleep(0.02), plain(self, data))  # a slow disk
    at_step(7, die)
    """
    killed(zygote, config, fault, tmp_path)
    train(config, resume=True)
    events = EventAccumulator(str(config.run_dir / "tensorboard"))
    events.Reload()
    # Sorted, as TensorBoard orders files by the second in which they were made.
    assert sorted(event.step for event in events.Scalars("loss/loss_G")) == [2, 4, 6, 8]


def test_scalars_cannot_be_written(
    tiny: Tiny, recovered: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("run", *USUAL)
    (config.run_dir / "scalars.jsonl").mkdir(parents=True)
    train(config)
    assert caplog.text.count("the losses cannot be recorded") == 1
    assert "lacks the last 7 records" in caplog.text
    (config.run_dir / "scalars.jsonl").rmdir()
    latest = ckpt.find_checkpoint(config.run_dir).read_bytes()
    train(config, resume=True)
    assert ckpt.find_checkpoint(config.run_dir).read_bytes() == latest


def test_scalars_fail_in_the_middle(
    tiny: Tiny, recovered: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full for some steps, after half a line: nothing is missing in the end."""
    plain, calls = os.write, 0

    def write(descriptor: int, data: bytes) -> int:
        nonlocal calls
        if b"loss_G" not in data:
            return plain(descriptor, data)
        calls += 1
        if calls == 2:
            return plain(descriptor, data[:50])
        if calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    run = train(tiny("run", *USUAL))
    monkeypatch.undo()
    assert calls > 3
    assert caplog.text.count("the losses cannot be recorded: No space left on device") == 1
    recovered(run, resume=False)


def test_pictures_and_curves_cannot_be_written(
    tiny: Tiny, recovered: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "curves_figure", curves_figure)
    config = tiny("run", *USUAL, "monitor.images_every=0.5")
    (config.run_dir / "training_curves.png").mkdir(parents=True)
    (config.run_dir / "samples").write_text("a file")
    train(config)
    assert caplog.text.count("picture grids cannot be kept") == 1
    assert caplog.text.count("no training curves") == 1
    recovered(config.run_dir, resume=False)


def test_damaged_records_do_not_stop_a_run(tiny: Tiny, recovered: Callable[..., None]) -> None:
    run = train(tiny("run", *USUAL, "training.steps=6"))
    with (run / "scalars.jsonl").open("ab") as file:
        file.write(b"\xff\xfe{\n" + b"[" * 100_000 + b"\n" + b'{"step": 1, "loss')
    recovered(run)


def test_standard_error_on_a_full_disk(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, recovered: Callable[..., None]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        run = train(tiny("run", *USUAL, "monitor.progress=true"))
        with pytest.raises(OSError, match="No space left"):
            full.write("a word")
        monkeypatch.undo()
    recovered(run, resume=False)


def test_a_refused_resume_leaves_the_settings(tiny: Tiny) -> None:
    """`--resume RUN` would otherwise read the refused ones ever after."""
    config = tiny("run", "training.steps=2")
    run = train(config)
    with pytest.raises(ConfigError, match=r"training\.lr"):
        train(tiny("run", "training.steps=2", "training.lr=1"), resume=True)
    assert (run / "config.yaml").read_text() == to_yaml(config)
