"""Two gloo processes: gradients averaged in buckets, equal to one process, checked against one another.

All that needs two processes runs in one start of them (ranks.py), because that takes longer than what they do; the
tests look at what each has left behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import LEARNING, assert_same_learning
from test_trainer import assert_same_state, losses, quiet_compiler, records
from tiny_runs import TINY, write_pictures

from cyclegan_fast.config import Config, load_config, to_yaml
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training.trainer import train

HERE = Path(__file__).parent
NETWORKS = ("G_A", "G_B", "D_A", "D_B")
STEPS = 20
# As training does it: nothing but the bits of the same sums can stay equal for long.
EXACT = (f"training.steps={STEPS}", "monitor.log_every=1")
# With buffers and averages, which must stay equal to the bit as the weights do, and with measures of rank 0.
OPTIONS = ("model.spectral_norm=true", "model.upsample=resize", "training.ema=0.9")
MEASURED = ("monitor.metrics_every=7", "monitor.metrics_samples=2", "checkpoint.best=swd_colour", "training.patience=9")
# For runs that round differently. Adam divides by a gradient's own size, an instance norm by the spread of its input:
# with an epsilon above the gradients' rounding, larger weights and a small rate, neither amplifies rounding for long.
# The weights still move by up to ten times the tolerance.
COMPARABLE = (*EXACT, "training.adam_eps=1e-2", "training.lr=5e-6", "model.init_gain=0.2")
JOBS: dict[str, tuple[str, ...]] = {
    "averages": (),
    "averages-bf16": (),
    "order": (),
    "disagreement": (),
    "steps-differ": (),
    "exact": (*EXACT, *OPTIONS, *MEASURED),
    "graph": (*EXACT, *OPTIONS, *MEASURED, "training.mode=graph"),
    "patience": (*EXACT, *MEASURED, "monitor.metrics_every=1", "training.patience=1", "training.lr=0.02"),
    "resumed": (*EXACT, "training.lr_scaling=linear"),
    "accumulate": ("training.steps=3", "training.accumulate=3"),
    "pix2pix": (*EXACT, "model.method=pix2pix", "data.pairing=aligned", "data.unreadable=skip"),
    "augmented": (*EXACT, "model.method=augmented", "model.latent=3"),
    "pix2pix-large": (*COMPARABLE, "model.method=pix2pix", "data.pairing=aligned", "data.unreadable=skip"),
    "eager": COMPARABLE,
    "compile": (*COMPARABLE, "training.mode=compile"),
    "wgangp": (*LEARNING, "training.accumulate=2", "loss.gan=wgangp"),
    "static-memory": (*LEARNING, "training.mode=graph", "data.resident=never"),
    "compressed": (*COMPARABLE, "distributed.compression=bf16"),
    "diverged": ("training.steps=9", "distributed.check_every=2", "checkpoint.every_epochs=0.5"),
    "other-start": ("training.steps=3",),
}


def config_of(root: Path, name: str, *overrides: str) -> Config:
    place = (f"name={name}", f"out={root / 'runs'}", f"data.root={root / 'data'}", f"data.cache={root / 'cache'}")
    sizes = ("data.load_size=54", "data.crop_size=48", "distributed.bucket_mb=0.02")
    return load_config(None, [*place, *TINY, *sizes, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks left: NAME-RANK.pt for each job, runs in `runs`.

    Made once, also by the workers of pytest-xdist, whose temporary folders have one parent.
    """
    shared = tmp_path_factory.getbasetemp()
    root = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "two-ranks"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "output.txt").exists():
            start(root)
    return root


def start(root: Path) -> None:
    for seed, (split, count) in enumerate({"trainA": 6, "trainB": 5, "testA": 2, "testB": 2}.items()):
        write_pictures(root / "data" / split, count, seed)
    for name, overrides in JOBS.items():
        (root / f"{name}.yaml").write_text(to_yaml(config_of(root, name, "training.batch=1", *overrides)))
    # Half of it in one process.
    half = f"training.steps={STEPS // 2}"
    train(config_of(root, "resumed", "training.batch=1", "training.accumulate=2", *JOBS["resumed"], half))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, see quiet_compiler
        micro_batches(root, "compile")  # fills the compiler's cache, so that the ranks find there what they need
    (root / "jobs.json").write_text(json.dumps(list(JOBS)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*torchrun, str(HERE / "ranks.py"), str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path])},
    )
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    (root / "output.txt").write_text(f"{output}\nexit status {process.returncode}")


def said(folder: Path, name: str) -> list[Any]:
    """What both ranks say of a job; their output, as a failure, where one of them says nothing of it."""
    files = [folder / f"{name}-{rank}.pt" for rank in range(2)]
    output = (folder / "output.txt").read_text()
    assert all(file.exists() for file in files), output
    both = [torch.load(file, weights_only=True) for file in files]
    for one in both:
        assert "Traceback" not in one, f"{one}\n{output}"
    return both


def test_reduced_gradients_are_the_plain_means(folder: Path) -> None:
    """To the bit: the sum of two is the same in either order, and half of it exact."""
    for one in said(folder, "averages"):
        assert one["buckets"] == 6
        for reduced, every in zip(one["reduced"], one["all"], strict=True):
            assert torch.equal(reduced, (every[0] + every[1]) / 2)
            assert not torch.equal(every[0], every[1])


def test_compressed_gradients_are_within_the_bound_and_the_same_everywhere(folder: Path) -> None:
    first, second = said(folder, "averages-bf16")
    exact = True
    for reduced, every, other in zip(first["reduced"], first["all"], second["reduced"], strict=True):
        assert torch.equal(reduced, other)
        sizes = (every[0].abs() + every[1].abs()) / 2
        error = (reduced - (every[0] + every[1]) / 2).abs()
        assert (error <= 2 * 2**-8 * (1 + 2**-8) * sizes).all()
        exact &= bool((error == 0).all())
    assert not exact, "nothing was compressed"


def test_collectives_come_in_one_order_whatever_is_ready_first(folder: Path) -> None:
    first, second = said(folder, "order")
    assert first["arrivals"] != second["arrivals"]  # the test's own planting
    assert first["sizes"] == second["sizes"]
    assert len(set(first["sizes"])) > 1
    for one in (first, second):
        assert torch.equal(one["reduced"], (one["all"][0] + one["all"][1]) / 2)


def test_ranks_that_differ_see_one_another(folder: Path) -> None:
    low = -(2**63)
    for one in said(folder, "disagreement"):
        assert one["same"] is None
        assert one["other"].tolist() == [[3, low, 0, 0], [3, low + 1, -1, 0]]


def micro_batches(folder: Path, name: str) -> Path:
    """The job's run by one process, which takes what the two have side by side one after the other."""
    one = ("training.batch=1", "training.accumulate=2", *JOBS[name.removesuffix("-straight")])
    return train(config_of(folder, f"{name}-micro-batches", *one), resume=True)


def twice_the_batch(folder: Path, name: str) -> Path:
    """The job's run by one process, which takes it at once."""
    return train(config_of(folder, f"{name}-batch", "training.batch=2", *JOBS[name]), resume=True)


def assert_same_run(one: Path, two: Path) -> None:
    """The same state and the same records, to the bit."""
    assert_same_state(one, two)
    assert losses(one) == losses(two)
    assert len(losses(one)) == STEPS


def assert_equal_runs(one: Path, two: Path, *, loss: float = 1e-5, weights: float = 1e-5) -> None:
    """Losses to a relative 1e-5, weights to 1e-5, after 20 steps; gradient norms as in test_distributed.py."""
    lines = losses(one), losses(two)
    assert len(lines[0]) == len(lines[1]) == STEPS
    for first, second in zip(*lines, strict=True):
        for name, value in first.items():
            rel = 1e-2 if name.startswith("grad_") else loss
            assert second[name] == pytest.approx(value, rel=rel, abs=loss), (first["step"], name)
    states = [ckpt.read_checkpoint(ckpt.find_checkpoint(run)) for run in (one, two)]
    networks = [name for name in NETWORKS if name in states[0]]
    assert networks
    for network in networks:
        torch.testing.assert_close(states[0][network], states[1][network], rtol=0, atol=weights)


def test_two_ranks_are_one_with_two_micro_batches(folder: Path) -> None:
    """To the bit: halves of a sum are exact, and pictures, draws and pools are the same."""
    for one in said(folder, "exact"):
        assert len(one["sent"]) % STEPS == 0
        assert len(one["sent"]) / STEPS > 4  # more than a bucket for each network
    one, two = micro_batches(folder, "exact"), folder / "runs" / "exact"
    assert_same_run(one, two)
    assert records(one) == records(two)
    assert [line["step"] for line in records(two) if "test_swd_AtoB" in line] == [7, 14, 20]


def test_ranks_stop_early_at_one_step(folder: Path) -> None:
    """At the first measurement that is no better, and where one process stops, in the same state."""
    one, two = micro_batches(folder, "patience"), folder / "runs" / "patience"
    assert_same_state(one, two)
    assert records(one) == records(two)
    names = ("test_swd_colour_AtoB", "test_swd_colour_BtoA")
    measured = [sum(line[name] for name in names) / 2 for line in records(two) if names[0] in line]
    assert 2 <= len(measured) < STEPS
    assert measured[-1] > measured[-2]
    assert measured[:-1] == sorted(measured[:-1], reverse=True)
    per_step = len(said(folder, "exact")[0]["sent"]) // STEPS
    assert [len(rank["sent"]) for rank in said(folder, "patience")] == [len(measured) * per_step] * 2


def test_two_ranks_are_one_with_twice_the_batch(folder: Path) -> None:
    said(folder, "eager")
    assert_equal_runs(twice_the_batch(folder, "eager"), folder / "runs" / "eager")


@pytest.mark.parametrize("name", ["wgangp", "static-memory"])
def test_other_settings_on_two_ranks_are_one_with_twice_the_batch(folder: Path, name: str) -> None:
    """Two micro-batches a step with a gradient penalty; a step over static memory, fed from streamed pictures."""
    said(folder, name)
    assert_same_learning(twice_the_batch(folder, name), folder / "runs" / name)


@pytest.mark.parametrize("method", ["pix2pix", "augmented"])
def test_other_methods_on_two_ranks_are_one_with_two_micro_batches(folder: Path, method: str) -> None:
    """To the bit, with their pools, codes and aligned pictures."""
    said(folder, method)
    assert_same_run(micro_batches(folder, method), folder / "runs" / method)


def test_pix2pix_on_two_ranks_is_one_with_twice_the_batch(folder: Path) -> None:
    said(folder, "pix2pix-large")
    assert_equal_runs(twice_the_batch(folder, "pix2pix-large"), folder / "runs" / "pix2pix-large")


def test_a_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    """Its first ten steps in one process, the others in two, with a scaled learning rate that stays what it was."""
    said(folder, "resumed")
    assert_same_run(micro_batches(folder, "resumed-straight"), folder / "runs" / "resumed")
    assert {line["lr"] for line in losses(folder / "runs" / "resumed")} == {2 * 2e-4}


def test_a_recorded_step_reduces_like_an_unrecorded_one(folder: Path) -> None:
    """To the bit; the recording holds the collectives, so in steps that are replayed Python starts none."""
    eager, graph = said(folder, "exact")[0]["sent"], said(folder, "graph")
    for one in graph:
        assert (one["warmed"], one["replayed"]) == (3, STEPS - 3)
        assert one["sent"] == eager[: len(eager) // STEPS * 4]  # the steps before, and the recording
    assert_same_run(folder / "runs" / "exact", folder / "runs" / "graph")


def test_accumulation_reduces_once_a_step(folder: Path) -> None:
    """The same collectives as without, of which each holds a bucket: every parameter once."""
    per_step = len(said(folder, "exact")[0]["sent"]) // STEPS
    state = ckpt.read_checkpoint(ckpt.find_checkpoint(folder / "runs" / "accumulate"))
    elements = sum(-(-value.numel() // 16) * 16 for name in NETWORKS for value in state[name].values())
    for one in said(folder, "accumulate"):
        assert len(one["sent"]) == 3 * per_step
        assert sum(one["sent"]) == 3 * 4 * elements


def test_compression_halves_the_bytes_and_learns_the_same(folder: Path) -> None:
    """A gradient is off by a few thousandths; what the weights have moved by, at most 20 * 2e-5, hardly at all."""
    plain, compressed = (said(folder, name)[0]["sent"] for name in ("eager", "compressed"))
    assert [2 * size for size in compressed] == plain
    assert_equal_runs(folder / "runs" / "eager", folder / "runs" / "compressed", loss=1e-4)


def test_a_divergence_ends_all_ranks_with_one_message(folder: Path) -> None:
    """One bit of one weight of rank 1, changed after step 3, with a check every other step."""
    first, second = said(folder, "diverged")
    assert first == second
    assert first.startswith("after 4 steps: the 2 processes do not hold the same state after step 4;")
    assert "D_B on rank 1. They were the same after step 2." in first
    saved = [int(path.stem.partition("-")[2]) for path in ckpt.step_checkpoints(folder / "runs" / "diverged")]
    assert max(saved, default=0) <= 3  # nothing after the check that failed


def test_another_start_ends_all_ranks_before_the_first_step(folder: Path) -> None:
    first, second = said(folder, "other-start")
    assert first == second
    assert first.startswith("after 0 steps: ")
    assert "at the start, with 0 steps done; different from the others: G_A on rank 1." in first


def test_a_rank_with_another_checkpoint_is_found(folder: Path) -> None:
    first, second = said(folder, "steps-differ")
    assert first == second
    assert "the number of steps on rank 1" in first


@pytest.mark.slow
@quiet_compiler
def test_compiled_ranks_are_one_with_twice_the_batch(folder: Path) -> None:
    """And to the bit one with two micro-batches; no graph breaks, and nothing compiled after the second step."""
    for one in said(folder, "compile"):
        assert len(set(one["compiled"][1:])) == 1, one["compiled"]
        assert one["breaks"] == {}
        assert one["sent"] == said(folder, "eager")[0]["sent"]
    run = folder / "runs" / "compile"
    assert_same_run(folder / "runs" / "compile-micro-batches", run)
    torch._dynamo.reset()
    assert_equal_runs(twice_the_batch(folder, "compile"), run)
