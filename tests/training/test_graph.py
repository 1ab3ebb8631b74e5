"""Mode graph without a GPU: the step over static memory, run, recorded on a tape and replayed, to the bit of the loop.

A tape is to the CPU what a CUDA graph is to the GPU: a list of operations with the tensors they read and write. Played
again it does the same operations on the same memory with the same numbers, whatever Python would do by now, and while
it is recorded nothing may be read on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import assert_same_state, losses
from tiny_runs import write_pictures
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cyclegan_fast.config import Config
from cyclegan_fast.training import build, trainer
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training.graph import WARMUP, CudaRecorder, Packed, Staged, StepGraph
from cyclegan_fast.training.trainer import train

Tiny = Callable[..., Config]
CPU = torch.device("cpu")
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Operations in order, each with its arguments and its results; ``undo`` takes back what recording has written."""

    def __init__(self, fail_at: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._random = torch.get_rng_state()
        self._fail_at = fail_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(f"{func} reads a value on the host")
        if self._fail_at and (func.overloadpacket.__name__, self._count(func)) == self._fail_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = tensors((args, kwargs))
        self._keep_what_is_written(func, args, kwargs)
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = [tensor for tensor in tensors(result) if tensor.untyped_storage().data_ptr() not in known]
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in made}
        self.calls.append((func, args, kwargs, made if len(made) == len(tensors(result)) else []))
        return result

    def _count(self, func: Any) -> int:
        return sum(called.overloadpacket is func.overloadpacket for called, *_ in self.calls)

    def _keep_what_is_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tensors(args[i] if i < len(args) else kwargs.get(argument.name)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._made:
                    self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        torch.set_rng_state(self._random)

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, made in self.calls:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))  # what is not computed anew would show
            result = func(*args, **kwargs)
            for work in tree_leaves(result):  # of a collective: a tape has no streams, in which others would wait
                if isinstance(work, torch.ScriptObject) and hasattr(work, "wait"):
                    work.wait()
            for old, new in zip(made, tensors(result), strict=bool(made)):
                old.copy_(new)


class TapeRecorder:
    """A Recorder on tapes."""

    def __init__(self, fail_at: tuple[str, int] | None = None) -> None:
        self.fail_at, self.warmed, self.replayed = fail_at, 0, 0
        self.tape: Tape | None = None

    def warm(self, function: Callable[[], Tensor]) -> Tensor:
        self.warmed += 1
        return function()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.tape = tape = Tape(self.fail_at)
        try:
            with tape:
                result = function()
        finally:
            tape.undo()

        def replay() -> Tensor:
            self.replayed += 1
            tape.play()
            return result

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """The recorder of the next run in mode graph."""
    recorder = TapeRecorder()
    monkeypatch.setattr(trainer, "_recorder", lambda _: recorder)
    return recorder


VARIANTS = {
    "plain": ("training.epochs=1", "training.epochs_decay=1"),
    "two-epochs-of-decay": ("training.epochs=0", "training.epochs_decay=4", "data.limit_train=3"),
    "batch-accumulate": ("training.batch=2", "training.accumulate=2", "training.pool_size=7"),
    "dropout": ("model.dropout=true", "training.pool_size=0"),
    "wgangp": ("loss.gan=wgangp", "loss.identity=0"),
    "keras": ("model.preset=keras", "loss.generator_gradient=own", "data.pairing=zip"),
    "streamed": ("data.resident=never", "training.batch=2"),
    "reference": ("training.impl=reference", "training.channels_last=false"),
    "recompute": ("training.recompute=true", "model.blocks=2"),
    "options": ("model.spectral_norm=true", "training.ema=0.9", "model.upsample=resize", "training.accumulate=2"),
    "gray": ("model.channels_A=1", "loss.identity=0", "data.resident=never"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_replaying_gives_the_bits_of_the_eager_loop(tiny: Tiny, recorder: TapeRecorder, variant: str) -> None:
    """Pools of three pictures fill and begin to exchange after the recording, and the learning rate falls."""
    overrides = ("training.steps=9", *VARIANTS[variant])
    eager = train(tiny("eager", *overrides))
    graph = train(tiny("graph", "training.mode=graph", *overrides))
    assert (recorder.warmed, recorder.replayed) == (WARMUP, 9 - WARMUP)
    assert_same_state(eager, graph)
    assert losses(eager) == losses(graph)


@pytest.mark.parametrize("variant", ["plain", "streamed"])
def test_without_a_recorder_the_same_function_is_run(
    tiny: Tiny, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ("training.steps=6", *VARIANTS[variant])
    eager = train(tiny("eager", *overrides))
    graph = train(tiny("graph", "training.mode=graph", *overrides))
    assert "training.mode=graph: the step runs eagerly: it needs a CUDA device, not cpu" in caplog.text
    assert_same_state(eager, graph)
    assert losses(eager) == losses(graph)


def test_a_loss_scale_is_part_of_the_recording(
    tiny: Tiny, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It doubles every second step here, and at the end of the float range steps are left out and it is halved."""
    scaler = functools.partial(GradScaler, init_scale=2.0**122, growth_interval=2)
    monkeypatch.setattr(build, "GradScaler", lambda device, **_: scaler(device))
    eager, graph = (train(tiny(mode, "training.steps=12", f"training.mode={mode}")) for mode in ("eager", "graph"))
    assert recorder.replayed == 12 - WARMUP
    assert_same_state(eager, graph)
    content = ckpt.read_checkpoint(ckpt.find_checkpoint(graph))
    steps = {float(state["step"]) for state in content["optimizer_G"]["state"].values()}
    assert steps != {12.0}, "no step was left out: the scale never overflowed"


def test_a_checkpoint_of_one_mode_resumes_in_the_other(tiny: Tiny, recorder: TapeRecorder) -> None:
    straight = train(tiny("straight", "training.steps=13"))
    for steps, mode in ((2, "graph"), (7, "eager"), (12, "graph"), (13, "eager")):
        run = train(tiny("run", f"training.steps={steps}", f"training.mode={mode}"), resume=True)
    assert recorder.replayed == 12 - 7 - WARMUP
    assert_same_state(straight, run, but=("best",))


@pytest.mark.parametrize("fail_at", [("copy_", 0), ("convolution", 3), ("_fused_adam_", 0), ("_fused_adam_", 1)])
def test_a_failed_recording_costs_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fail_at: tuple[str, int]
) -> None:
    """At the first operation, in the generators' pass, with scaled gradients at hand, and before the very end.

    No step is lost, none done twice, and nothing of the half step is left.
    """
    recorder = TapeRecorder(fail_at)
    monkeypatch.setattr(trainer, "_recorder", lambda _: recorder)
    scaler = functools.partial(GradScaler, init_scale=256.0, growth_interval=2)
    monkeypatch.setattr(build, "GradScaler", lambda device, **_: scaler(device))
    eager = train(tiny("eager", "training.steps=7"))
    graph = train(tiny("graph", "training.steps=7", "training.mode=graph"))
    assert (recorder.warmed, recorder.replayed) == (WARMUP, 0)
    assert "cannot be recorded and runs eagerly from here on: RuntimeError: operation not permitted" in caplog.text
    assert_same_state(eager, graph)
    assert losses(eager) == losses(graph)


def test_a_step_that_reads_on_the_host_is_not_recorded(
    tiny: Tiny, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = trainer.train_step

    def reading(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        scalars = step(*arguments, **options)
        assert float(scalars["loss_G"]) > 0
        return scalars

    monkeypatch.setattr("cyclegan_fast.training.graph.train_step", reading)
    train(tiny("graph", "training.steps=5", "training.mode=graph"))
    assert recorder.replayed == 0
    assert "aten._local_scalar_dense.default reads a value on the host" in caplog.text


def test_pictures_of_several_sizes_run_eagerly(
    tiny: Tiny, dataset: Path, recorder: TapeRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(dataset / "more", 1, 9, (44, 52))
    (dataset / "more" / "000.png").rename(dataset / "trainA" / "zzz.png")
    train(tiny("graph", "training.steps=4", "training.mode=graph", "data.preprocess=none"))
    assert recorder.warmed == 0
    assert "pictures of several sizes cannot share a recording" in caplog.text


class TestStepGraph:
    def test_one_step_a_call_and_one_recording(self) -> None:
        total = torch.zeros(())

        def step() -> dict[str, Tensor]:
            total.add_(1)
            return {"total": total * 10, "half": total / 2}

        recorder = TapeRecorder()
        graph = StepGraph(step, recorder, warmup=2)
        seen = [graph() for _ in range(6)]
        assert [float(scalars["total"]) for scalars in seen] == [10, 20, 30, 40, 50, 60]
        assert float(seen[3]["half"]) == 2  # later replays leave earlier results alone
        assert graph.recorded
        assert (recorder.warmed, recorder.replayed) == (2, 4)
        graph.release()
        assert float(graph()["total"]) == 70
        assert not graph.recorded

    def test_a_number_that_changes_in_python_would_show(self) -> None:
        """What the comparisons above rest on: a tape repeats the number that it was recorded with."""
        numbers = iter(range(10))
        graph = StepGraph(lambda: {"number": torch.zeros(()) + next(numbers)}, TapeRecorder(), warmup=1)
        assert [float(graph()["number"]) for _ in range(4)] == [0, 1, 1, 1]

    def test_all_processes_replay_or_none(self, caplog: pytest.LogCaptureFixture) -> None:
        votes: list[bool] = []

        def agree(failed: bool) -> bool:
            votes.append(failed)
            return True

        undone: list[bool] = []
        graph = StepGraph(
            lambda: {"one": torch.ones(())},
            TapeRecorder(),
            agree=agree,
            prepare=lambda: lambda: undone.append(True),
            warmup=0,
        )
        assert float(graph()["one"]) == 1
        assert (votes, undone) == ([False], [True])
        assert not graph.recorded
        assert "another process could not record it" in caplog.text


def test_packed_values_arrive_where_they_always_were() -> None:
    packed = Packed({"a": ((2, 3), torch.int64), "b": ((), torch.float64), "c": ((2, 0), torch.float64)}, CPU)
    addresses = {name: view.data_ptr() for name, view in packed.views.items()}
    rng = np.random.default_rng(0)
    for _ in range(3):
        values = {"a": rng.integers(-(2**62), 2**62, (2, 3)), "b": rng.random(), "c": np.zeros((2, 0))}
        packed.load(values)
        assert packed.views["a"].tolist() == values["a"].tolist()
        assert packed.views["b"].item() == values["b"]
    assert {name: view.data_ptr() for name, view in packed.views.items()} == addresses
    with pytest.raises(ValueError, match="broadcast"):
        packed.load({**values, "a": np.zeros((3, 2), np.int64)})


def test_staged_windows_arrive_where_they_always_were() -> None:
    staged = Staged(((2, 4, 4, 3), (2, 4, 4, 1)), CPU)
    addresses = [window.data_ptr() for window in staged.windows]
    for value in (1, 2):
        cuts = torch.full((2, 4, 4, 3), value, dtype=torch.uint8), torch.full((2, 4, 4, 1), value, dtype=torch.uint8)
        staged.load(cuts)
        for window, cut in zip(staged.windows, cuts, strict=True):
            assert torch.equal(window, cut)
    assert [window.data_ptr() for window in staged.windows] == addresses


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    COMMON = ("training.device=cuda", "training.steps=12", "training.deterministic=true", "monitor.log_every=1")

    @pytest.mark.parametrize("variant", [*VARIANTS, "two-streams", "fp16"])
    def test_a_graph_learns_what_the_eager_loop_learns(
        self, tiny: Tiny, variant: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """To rounding: the learning rate is a float32 there, and kernels may be chosen anew."""
        more = {"two-streams": ("training.streams=2",), "fp16": ("training.precision=fp16",)}
        overrides = (*self.COMMON, *(more.get(variant) or VARIANTS[variant]))
        runs = [train(tiny(mode, f"training.mode={mode}", *overrides)) for mode in ("eager", "graph")]
        assert "cannot be recorded" not in caplog.text
        for one, two in zip(*(losses(run) for run in runs), strict=True):
            assert two["loss_G"] == pytest.approx(one["loss_G"], rel=1e-3)
            assert two["D_A"] == pytest.approx(one["D_A"], rel=1e-3)

    def test_dropout_differs_from_replay_to_replay(self) -> None:
        x = torch.ones(1000, device="cuda")
        graph = StepGraph(
            lambda: {"sum": (torch.dropout(x, 0.5, True) * torch.arange(1000, device="cuda")).sum()},
            CudaRecorder(torch.device("cuda", torch.cuda.current_device())),
        )
        sums = [float(graph()["sum"]) for _ in range(WARMUP + 8)]
        assert graph.recorded
        assert len(set(sums)) == len(sums)
        torch.manual_seed(5)
        again = float(graph()["sum"])
        torch.manual_seed(5)
        assert float(graph()["sum"]) == again

    def test_what_cuda_cannot_capture_is_run(self, caplog: pytest.LogCaptureFixture) -> None:
        total = torch.zeros((), device="cuda")

        def step() -> dict[str, Tensor]:
            total.add_(1)
            return {"twice": torch.full((), 2 * total.item(), device="cuda")}

        stream = torch.cuda.current_stream()
        graph = StepGraph(step, CudaRecorder(torch.device("cuda", torch.cuda.current_device())))
        assert [float(graph()["twice"]) for _ in range(WARMUP + 3)] == [2, 4, 6, 8, 10, 12]
        assert not graph.recorded
        assert "cannot be recorded" in caplog.text
        assert torch.cuda.current_stream() == stream
