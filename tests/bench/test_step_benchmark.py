"""What bench/step.py measures: our step as the trainer runs it, as a recorded graph too, and the order of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import step
import torch
from model import Task
from rounds import NotHereError
from torch import Tensor

SMALL = Task(batch=2, size=32, ngf=4, ndf=4, blocks=1, layers=1)


class Repeats:
    """In the place of CUDA graphs: runs what it should record, each time anew."""

    def warm(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return function


class Refuses(Repeats):
    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError(f"{function} cannot be recorded today")


@pytest.fixture
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of a contestant's own process are not those of the tests'."""
    monkeypatch.setattr(step, "_process_settings", lambda _: None)
    monkeypatch.setattr(step, "DEVICE", torch.device("cpu"))


def recorded_by(recorder: type[Repeats], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cyclegan_fast.training.graph.CudaRecorder", lambda _: recorder())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


@pytest.mark.usefixtures("_no_settings")
def test_our_graph_is_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_by(Repeats, monkeypatch)
    states = []
    original = step._graph_step
    monkeypatch.setattr(step, "_graph_step", lambda task, state: (states.append(state), original(task, state))[1])
    call = step.our_step(SMALL, "fp32", mode="graph")
    before = [parameter.detach().clone() for parameter in states[0].G_A.parameters()]
    call()
    moved = [not torch.equal(a, b) for a, b in zip(before, states[0].G_A.parameters(), strict=True)]
    assert any(moved)
    steps = [float(entry["step"]) for entry in states[0].optimizer_D.state.values()]
    assert set(steps) == {5.0}  # three to warm up, one to see that it is recorded, one called


@pytest.mark.usefixtures("_no_settings")
def test_a_graph_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_by(Refuses, monkeypatch)
    with pytest.raises(RuntimeError, match="could not be recorded"):
        step.our_step(SMALL, "fp32", mode="graph")


@pytest.mark.usefixtures("_no_settings")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eager_steps_return_losses_or_nothing(precision: str) -> None:
    losses = step.our_step(SMALL, precision)()
    assert all(bool(value.isfinite()) for value in losses.values())
    assert step.peer_step(SMALL, precision, channels_last=True)() is None


def test_the_most_telling_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CUDA", True)
    monkeypatch.setattr(step, "resolve_precision", lambda *_: "bf16")
    tasks = [Task(batch) for batch in (16, 1, 4)]
    phases = [(task.batch, [one.name for one in chosen]) for task, chosen in step._phases(tasks, lambda _: True)]
    assert [batch for batch, _ in phases[:3]] == [1, 1, 16]
    assert phases[0][1][:3] == ["ours bf16 graph", "(a) de-facto fp32 eager", "(b) de-facto bf16 channels-last eager"]
    assert all("compile" in name for name in phases[1][1])
    everyone = [(batch, name) for batch, names in phases for name in names]
    assert len(everyone) == len(set(everyone)) == 3 * sum(len(group) for group in step.contestants(tasks[0]))


def test_emulated_bf16_comes_last_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CUDA", False)
    monkeypatch.setattr(step, "resolve_precision", lambda *_: "fp32")
    ((_, chosen),) = step._phases([Task()], lambda _: True)
    assert [one.precision for one in chosen].index("bf16") == len(chosen) - 2
    assert chosen[0].role == "a"
    assert chosen[1].role == "ours"


@pytest.mark.usefixtures("_no_settings")
def test_a_revision_without_the_trainers_parts_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from cyclegan_fast import training

    monkeypatch.setitem(sys.modules, "cyclegan_fast.training.build", None)
    monkeypatch.delattr(training, "build", raising=False)
    assert step.our_step(SMALL, "fp32")()["loss_G"].isfinite()
    with pytest.raises(NotHereError, match="no graph mode"):
        step.our_step(SMALL, "fp32", mode="graph")
