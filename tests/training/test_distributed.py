"""Two gloo processes against one with twice the batch, started as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_trainer import assert_same_state, losses

from cyclegan_fast.config import Config, to_yaml
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training.trainer import train

Tiny = Callable[..., Config]
ROOT = Path(__file__).parents[2]
# Adam divides by the gradient's own size, so with its usual epsilon a gradient of rounding size moves its weight by a
# whole learning rate, one way or the other: an epsilon above the rounding and a small rate keep runs comparable. The L1
# losses have a kink: where a pixel is right to rounding, its gradient has either sign, one part in some thousands of
# the whole, which shows in gradient norms and, times the learning rate, in weights.
LEARNING = ("training.steps=5", "monitor.log_every=1", "training.adam_eps=1e-2", "training.lr=2e-5")


def launch(config: Config, *arguments: str) -> subprocess.Popen[str]:
    file = config.run_dir.parent / f"{config.name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(to_yaml(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*torchrun, str(ROOT / "train.py"), "--config", str(file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def assert_same_learning(one: Path, two: Path) -> None:
    """Losses to 1e-5 in float32, and weights and pools, over steps in which the pools fill and exchange."""
    for single, double in zip(losses(one), losses(two), strict=True):
        for name, value in single.items():
            rel = 1e-2 if name.startswith("grad_") else 1e-5
            # Scores are means of numbers of both signs, about 1 in size: 1e-5 of that, as of the losses.
            assert double[name] == pytest.approx(value, rel=rel, abs=1e-5), (single["step"], name)
    states = [ckpt.read_checkpoint(ckpt.find_checkpoint(run)) for run in (one, two)]
    for network in ("G_A", "G_B", "D_A", "D_B"):
        torch.testing.assert_close(states[0][network], states[1][network], rtol=0, atol=1e-5)
    for domain in ("A", "B"):
        first, second = (state["pools"][domain] for state in states)
        assert first["count"] == second["count"] == 3
        # Single pixels amplify rounding far more than means over pictures do; another picture is off by about 0.5.
        torch.testing.assert_close(first["images"], second["images"], rtol=0, atol=5e-3)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tiny: Tiny) -> None:
    """As a user starts them; test_two_ranks.py has more settings."""
    common = (*LEARNING, "data.load_size=54", "data.crop_size=48")
    one = train(tiny("one", "training.batch=2", *common))
    two = tiny("two", "training.batch=1", *common)
    finish(launch(two))
    assert_same_learning(one, two.run_dir)


@pytest.mark.slow
def test_both_processes_stop_at_one_step_and_resume_exactly(tiny: Tiny) -> None:
    config = tiny("stopped", "training.steps=400", "monitor.log_every=1")
    process = launch(config)
    scalars = config.run_dir / "scalars.jsonl"
    while process.poll() is None and not (scalars.exists() and scalars.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    step = ckpt.read_checkpoint(ckpt.find_checkpoint(config.run_dir))["position"]["step"]
    assert 1 <= step < 400, output

    end = f"training.steps={step + 4}"
    finish(launch(tiny("stopped", end, "monitor.log_every=1"), "--resume"))
    # One process, which takes in turns what two have side by side, gives the same bits: see test_two_ranks.py.
    straight = train(tiny("straight", end, "monitor.log_every=1", "training.accumulate=2"))
    assert_same_state(straight, config.run_dir)
    assert losses(straight) == losses(config.run_dir)


@pytest.mark.slow
def test_an_error_on_rank_0_ends_all(tiny: Tiny, dataset: Path) -> None:
    (dataset / "trainA" / "000.png").write_bytes(b"")
    process = launch(tiny("run", "training.steps=2"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "000.png" in output
