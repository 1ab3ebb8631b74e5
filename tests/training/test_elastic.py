"""Runs whose processes are killed, stopped, told to go, hang, or change in number, started as a user starts them."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from PIL import Image
from test_trainer import assert_same_state, losses

from cyclegan_fast import distributed, heartbeat
from cyclegan_fast.config import Config, ConfigError, load_config, to_yaml
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training import elastic, process
from cyclegan_fast.training.run_folder import RunExistsError
from cyclegan_fast.training.trainer import Interrupted, Trainer, train

Tiny = Callable[..., Config]
ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("faulty_train.py")
STANDALONE = ("--standalone", "--nproc-per-node=2")
LIMIT = 100  # seconds for any launch

sys.path.insert(0, str(ROOT / "bench"))
soak = importlib.import_module("soak")
sys.path.remove(str(ROOT / "bench"))

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULTY": str(folder), **more}


def start(command: list[str], config: Config, folder: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    file = folder / f"{config.name}.yaml"
    file.write_text(to_yaml(config))
    return subprocess.Popen(
        [*command, str(WORKER), "--config", str(file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(folder, **more),
        start_new_session=True,
    )


def torchrun(config: Config, folder: Path, *arguments: str, options: tuple[str, ...] = STANDALONE) -> Any:
    return start([sys.executable, "-m", "torch.distributed.run", *options], config, folder, *arguments)


def finish(launched: subprocess.Popen[str], status: int | None = 0) -> str:
    """What a launch wrote; None for any status but 0."""
    output, _ = launched.communicate(timeout=LIMIT)
    assert launched.returncode == status if status is not None else launched.returncode != 0, output
    return output


def plan(folder: Path, *faults: dict[str, Any]) -> None:
    (folder / "plan.json").write_text(json.dumps(faults))


def none_is_left(folder: Path, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while soak.processes(folder):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the faults are planned. After the test no process and no shared memory of it may be left."""
    shared = set(os.listdir("/dev/shm"))  # noqa: PTH208, S108
    folder = tmp_path / "faulty"
    folder.mkdir()
    yield folder
    left = not none_is_left(folder)
    for pid in soak.processes(folder):
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert set(os.listdir("/dev/shm")) <= shared  # noqa: PTH208, S108


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short soak, see bench/soak.py: a hundred steps on two ranks, undisturbed and with three faults.

    The first two are for torchrun to mend: one rank is told to stop, and rank 0 is killed while it writes a checkpoint.
    Then torchrun itself is killed.
    """
    folder = tmp_path_factory.mktemp("soak")
    size = ("--steps=100", "--faults=3", "--seed=2", "--limit=250", f"--folder={folder}", f"--out={folder / 'result'}")
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), *size]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_a_short_soak(soaked: Path) -> None:
    """The soak itself has seen that everything is equal to the bit and nothing left behind."""
    figures = json.loads((soaked / "result").read_text())
    assert figures["faults"] == {"kill saving": 1, "terminate": 1, "kill launcher": 1}
    assert figures["disturbed"]["launches"] == 2
    output = (soaked / "two" / "output.txt").read_text()
    assert "continuing the run that this launch began" in output
    assert "gives no sign of life: killed, stopped or cut off" in output  # the writer of the checkpoint
    assert "exitcode: 143" in output  # one rank was told to stop, both did
    assert "stopped by SIGTERM after step" in output
    if output.count("done:") == 1:  # the last steps were not over before the workers had a look at their launcher
        assert "the launcher is gone; stopping" in output


@pytest.mark.slow
def test_two_nodes_lose_a_process_and_go_on(soaked: Path, folder: Path) -> None:
    """Two launchers that meet as those of two hosts do; both restart their workers, without being told to resume."""
    plan(folder, {"act": "kill", "rank": 1, "step": 50, "delay": 0.01})
    config = soak.make_config(soaked, "nodes", 100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    options = (
        *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--local-addr=127.0.0.1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-id=nodes"),
    )
    nodes = [torchrun(config, folder, options=options) for _ in range(2)]
    output = "".join([finish(node) for node in nodes])
    assert "continuing the run that this launch began" in output
    assert re.search(r"step-000000[46]0\.ckpt: step [46]0 of 100", output)
    soak.check_same(soaked / "runs" / "straight", config.run_dir)
    assert soak.check_samples(soaked / "one", folder, 100)["steps_repeated"] > 0


@pytest.mark.slow
def test_processes_that_hang_are_named(tiny: Tiny, folder: Path) -> None:
    """Of three ranks one loops for ever and one is stopped: all end, and say who, where and for what they waited."""
    plan(folder, {"act": "loop", "rank": 1, "step": 4}, {"act": "stop", "rank": 2, "step": 4})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = tiny("hanging", "training.timeout=3")
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start([sys.executable], config, folder, RANK=rank, LOCAL_RANK=rank, **place) for rank in "012"]
    waiting = finish(ranks[0], heartbeat.LOST_STATUS)
    assert "in `gathering of the fakes` of step 5 (training.timeout is 3 s): " in waiting
    assert f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) is alive but did not come: it is busy" in waiting
    assert f"rank 2 (process {ranks[2].pid} on {socket.gethostname()}) gives no sign of life" in waiting
    looping = finish(ranks[1], heartbeat.LOST_STATUS)
    assert "rank 1 has been in step 5 for" in looping
    assert "in act" in looping  # the function that loops
    os.kill(ranks[2].pid, signal.SIGCONT)  # it finds that the others are gone
    stopped = finish(ranks[2], heartbeat.LOST_STATUS)
    assert "rank 2 waited" in stopped
    assert "rank 0" in stopped


@pytest.mark.slow
def test_one_rank_then_two_then_one(tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pairs in the same order, the same losses to 1e-5; see test_distributed.py for the tolerances."""
    common = ("monitor.log_every=1", "training.adam_eps=1e-2", "training.lr=2e-5", "training.batch=2")
    taken: dict[int, tuple[list[int], list[int]]] = {}
    take_step = Trainer._take_step

    def recorded(self: Trainer, batch: Any, *arguments: Any, **more: Any) -> Any:
        taken[self.step] = (batch.index_A.flatten().tolist(), batch.index_B.flatten().tolist())
        return take_step(self, batch, *arguments, **more)

    monkeypatch.setattr(Trainer, "_take_step", recorded)
    straight = train(tiny("straight", "training.steps=6", *common))
    expected, taken = taken, {}
    train(tiny("parts", "training.steps=2", *common))
    output = finish(torchrun(tiny("parts", "training.steps=4", *common), folder, "--resume"))
    assert "a step's 2 pairs: 2 at a time, training.batch 1" in output
    run = train(tiny("parts", "training.steps=6", *common), resume=True)

    parts = [json.loads(line) for file in folder.glob("samples-*") for line in file.read_text().splitlines()]
    for step in (2, 3):
        ranks = sorted(part[1:] for part in parts if part[0] == step)
        assert [rank for rank, _, _ in ranks] == [0, 1]
        taken[step] = tuple([i for _, *ab in ranks for i in ab[domain][0]] for domain in (0, 1))  # type: ignore[assignment]
    assert taken == expected
    for one, other in zip(losses(straight), losses(run), strict=True):
        for name, value in one.items():
            rel = 1e-2 if name.startswith("grad_") else 1e-5
            assert other[name] == pytest.approx(value, rel=rel, abs=1e-5), (one["step"], name)


@pytest.mark.slow
def test_sigterm_while_pictures_are_decoded(tiny: Tiny, dataset: Path, folder: Path) -> None:
    """Rank 0 decodes, with processes of its own, and rank 1 waits for it; all end at once and leave no half a store."""
    large = folder / "large.jpg"
    Image.linear_gradient("L").resize((5000, 4000)).convert("RGB").save(large)
    for index in range(200):
        shutil.copyfile(large, dataset / "trainA" / f"large{index}.jpg")
    cache = folder / "cache"
    config = tiny("run", f"data.cache={cache}", "data.workers=2")
    launched = torchrun(config, folder)
    while launched.poll() is None and not list(cache.glob("trainA-*.tmp")):
        time.sleep(0.02)
    time.sleep(0.3)
    began = time.monotonic()
    launched.send_signal(signal.SIGTERM)
    output = finish(launched, None)
    assert time.monotonic() - began < 20  # torchrun kills after 30
    assert "stopped by SIGTERM at once" in output
    assert list(cache.glob("*.tmp")) == []
    assert not ckpt.step_checkpoints(config.run_dir)


STAND_INS = {
    "srun": 'exec "$@"',
    "torchrun": (
        'echo "$@" > torchrun.txt; echo $$ > pid; trap "exit 1" TERM; for i in {1..100}; do sleep 0.1; done; exit 3'
    ),
    "scancel": 'echo "$@" > scancel.txt; kill -TERM $(cat pid)',
    "scontrol": '[ $1 = show ] && printf "n-1\\nn-2\\n" || echo "$@" > requeue.txt',
}


@pytest.mark.parametrize("told", [True, False], ids=["told-to-stop", "failed"])
def test_the_slurm_script(tmp_path: Path, told: bool) -> None:
    """It passes SIGTERM on to the launchers and queues the job again; a failure it passes on as it is."""
    for name, commands in STAND_INS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + commands.replace("{1..100}", "{1..100}" if told else "1") + "\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n-[1-2]", "SLURM_NNODES": "2"}
    script = subprocess.Popen(
        ["bash", str(ROOT / "docs" / "slurm" / "train.sbatch"), "a.yaml", "training.global_batch=16"],
        cwd=tmp_path,
        env={**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    end = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    if told:
        time.sleep(0.2)
        script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == (1 if told else 3)
    arguments = (tmp_path / "torchrun.txt").read_text().split()
    assert {"--rdzv-endpoint=n-1:29500", "--nnodes=2", "--rdzv-id=7", "--resume"} <= set(arguments)
    assert arguments[arguments.index("train.py") :] == [
        *("train.py", "--config", "a.yaml", "--resume", "training.global_batch=16"),
    ]
    if told:
        assert (tmp_path / "scancel.txt").read_text() == "--signal=TERM 7\n"
        assert (tmp_path / "requeue.txt").read_text() == "requeue 7\n"
    assert (tmp_path / "requeue.txt").exists() == told


def test_the_kubernetes_manifest_agrees_with_itself() -> None:
    service, job = yaml.safe_load_all((ROOT / "docs" / "kubernetes" / "train.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:{port}" in container["args"]
    assert f"--nnodes={job['spec']['completions']}" in container["args"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["args"]
    assert int(container["env"][0]["value"]) < pod["terminationGracePeriodSeconds"]
    settings = [word for word in container["args"] if re.match(r"[a-z_.]+=", word)]
    assert load_config(None, settings).training.global_batch == 16
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_workers_of_one_launch_continue_what_they_began(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the launch has no id, and not where a launch that was refused is tried again."""
    straight = train(tiny("straight", "training.steps=4"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    train(tiny("run", "training.steps=2"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(RunExistsError):
        train(tiny("run", "training.steps=4"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    run = train(tiny("run", "training.steps=4"))
    assert_same_state(straight, run, but=("best",))

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    train(tiny("nameless", "training.steps=1"))
    train(tiny("nameless", "training.steps=2"))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(RunExistsError):
        train(tiny("nameless", "training.steps=3"))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    train(tiny("nameless", "training.steps=3"), resume=True)
    with pytest.raises(RunExistsError):
        train(tiny("nameless", "training.steps=4"))


def partition(world_size: int, *overrides: str, pairs: int | None = None) -> tuple[int, int]:
    config = load_config(None, list(overrides))
    then = {"batch": config.training.batch, "accumulate": config.training.accumulate}
    saved = None if pairs is None else {"config": {"training": then}, "position": {"step": 1, "pairs_per_step": pairs}}
    training = elastic.partitioned(config, world_size, saved).training
    return training.batch, training.accumulate


def test_a_global_batch_is_shared_by_any_number_of_processes() -> None:
    assert partition(3, "training.batch=2", "training.accumulate=5") == (2, 5)
    glob = "training.global_batch=12"
    assert [partition(count, glob, "training.batch=4") for count in (1, 2, 3, 4, 6, 12)] == [
        *((4, 3), (3, 2), (4, 1), (3, 1), (2, 1), (1, 1)),
    ]
    with pytest.raises(ConfigError, match=r"training\.global_batch = 12: 5 processes cannot .* 1, 2, 3, 4, 6, 12 proc"):
        partition(5, glob)
    with pytest.raises(ConfigError, match="leave it at 1"):
        partition(1, glob, "training.accumulate=2")


def test_a_resumed_run_keeps_its_global_batch() -> None:
    assert partition(2, "training.batch=2", pairs=4) == (2, 1)
    assert partition(1, "training.batch=2", pairs=4) == (2, 2)
    assert partition(4, "training.batch=2", pairs=4) == (1, 1)
    with pytest.raises(ConfigError, match=r"resumed = 4: 3 processes .* 1, 2, 4 processes can"):
        partition(3, "training.batch=2", pairs=4)
    assert elastic.shares(6, 2) == (
        "with this number of processes, 2, training.batch x training.accumulate can be 1 x 3, 3 x 1"
    )
    assert elastic.shares(6, 4) == "4 processes cannot share 6 pairs equally, 1, 2, 3, 6 processes can"


def test_what_does_not_fit_is_refused_with_what_does(tiny: Tiny) -> None:
    train(tiny("run", "training.steps=1", "training.accumulate=4"))
    with pytest.raises(ConfigError, match=r"took 4 pairs a step.* is now 3: .* can be 1 x 4, 2 x 2, 4 x 1"):
        train(tiny("run", "training.steps=2", "training.batch=3"), resume=True)
    with pytest.raises(ConfigError, match="is now 8"):
        train(tiny("run", "training.steps=2", "training.global_batch=8"), resume=True)
    train(tiny("run", "training.steps=2", "training.global_batch=4", "training.batch=2"), resume=True)


def test_one_request_to_stop_may_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the scheduler and from the launcher; a later one acts as signals did before, at once."""
    now = 100.0
    monkeypatch.setattr(process.time, "monotonic", lambda: now)
    with process.stopped_by_signals(lambda signum: Interrupted(signum, None)):
        with process.catch_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            now += 1
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert stop.signum == signal.SIGTERM
            now += 10
            with pytest.raises(Interrupted, match="SIGINT at once"):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # within the same moment as the last
        now += 10
        with pytest.raises(Interrupted, match="SIGTERM at once"):
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def hearts(store: dist.Store, count: int, timeout: float) -> list[heartbeat.Heartbeat]:
    own = [dist.TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=20)) for _ in range(count)]
    return [heartbeat.Heartbeat(each, rank, count, timeout=timeout) for rank, each in enumerate(own)]


def test_the_others_say_who_is_to_blame(store: dist.Store) -> None:
    """Of six ranks, one waits as we do, one is busy, one went with an error, one because of that, one stopped."""
    ranks = hearts(store, 6, timeout=4.0)
    error = RuntimeError("closed by peer\nmore")
    with ranks[0].waiting("sum"), ranks[1].waiting("sum"):  # the innocent
        ranks[2].doing("step 3")
        ranks[3].ended("DataError: no such file")
        ranks[4].ended("LostRankError: rank 3 went")
        ranks[5].doing("step 2")
        ranks[5].close()
        lost = ranks[0].lost("sum", "step 3", 0.5, error)
    for rank in ranks:
        rank.close()
    message = str(lost)
    assert "rank 0 waited 0.5 s for the others in `sum` of step 3" in message
    parts = message.partition("): ")[2].split("; ")
    assert [part[:6] for part in parts] == ["rank 3", "rank 5", "rank 2"]
    assert "ended: DataError: no such file" in parts[0]
    assert "no sign of life" in parts[1]
    assert "busy with step 3" in parts[2]
    assert message.endswith("It ended with: closed by peer")


def test_rank_0_may_take_any_time_but_not_die(store: dist.Store) -> None:
    main, other = hearts(store, 2, timeout=0.5)
    later = threading.Timer(1.2, main.hand_over, ["ready"])
    later.start()
    assert other.hand_over(None) == "ready"  # longer than the time-out
    later.join()
    main.close()
    with pytest.raises(heartbeat.LostRankError, match=r"rank 0 \(process .* no sign of life"):
        other.hand_over(None)
    other.close()


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    """As where rank 0, which keeps it, was stopped."""

    class Silent(dist.HashStore):  # type: ignore[misc]
        def check(self, keys: list[str]) -> bool:  # noqa: ARG002
            time.sleep(20)
            return False

    rank = heartbeat.Heartbeat(Silent(), 1, 2, timeout=1.0)
    with pytest.raises(heartbeat.LostRankError, match="has not answered for 1 s"), rank.waiting("sum"):
        raise RuntimeError("timed out")
    rank.close()


def test_a_restart_does_not_meet_the_dead(store: dist.Store) -> None:
    """The launcher's store outlives its workers: what those of the last start wrote there is not believed."""

    def meet(missing: float) -> set[str]:
        names: list[str] = []

        def run(rank: int) -> None:
            if rank == 1:
                time.sleep(missing)
            own = dist.TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=20))
            names.append(distributed._meet(own, rank, 3))
            assert time.monotonic() - began >= missing  # nobody goes before all are there

        began = time.monotonic()
        with ThreadPoolExecutor(3) as ranks:
            for result in [ranks.submit(run, rank) for rank in range(3)]:
                result.result(timeout=20)
        return set(names)

    first, second = meet(0.0), meet(0.5)
    assert len(first) == len(second) == 1
    assert first != second
