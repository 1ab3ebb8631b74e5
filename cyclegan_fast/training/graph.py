"""A training step over static memory, recorded once as a CUDA graph and then replayed.

A step is some thousand kernels of a few microseconds, and launching them one by one takes the host longer than they
take the device. Replaying a recording is one launch. But a recording repeats itself exactly: same kernels, same
addresses, same numbers. So it must not read a value on the host, not allocate but from PyTorch's caching allocator, and
not hold a number that changes. All that changes from step to step arrives in memory that stays where it is: the places
of the windows in the store, the draws of the image pools and the learning rate in one packed buffer (`Packed`), and
windows that were cut on the host (`Staged`). What the step itself changes stays on the device: weights, Adam's state,
scale, pools. Dropout draws from PyTorch's generator, whose seed and offset a replay reads anew.

    host:    pinned buffer ---- one copy ----+                     +--> scalars, copied out
    graph:                                   v                     |
             inputs -> crop, flip, normalise -> G forward, backward, Adam -> pools -> D forward, backward, Adam

There is one recording, which always measures the gradients' norms. They cost one more reading of the gradients, 113 MB
or 30 microseconds on an H200; a second recording without them would cost its seconds and memory in every run.

The first steps run unrecorded (`WARMUP`): they choose algorithms, compile kernels and allocate what stays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from cyclegan_fast.ops.crop_flip import crop_flip
from cyclegan_fast.training.step import StepBatch, TrainState, train_step

__all__ = [
    *("CudaRecorder", "Draws", "GraphStep", "Packed", "Recorder", "Staged", "StepGraph"),
    *("draw_fields", "step_batch"),
]

logger = logging.getLogger("cyclegan_fast.graph")

WARMUP = 3
Shape = tuple[int, ...]
Scalars = dict[str, Tensor]


class Draws(NamedTuple):
    """The random numbers of one step, in the order of `StepBatch`: float64 but for the slots, which are int64."""

    accept_A: np.ndarray  # [K, M]
    slot_A: np.ndarray
    accept_B: np.ndarray
    slot_B: np.ndarray
    alpha_A: np.ndarray  # [K, N]
    alpha_B: np.ndarray
    latent_A: np.ndarray = np.empty((1, 1, 0))  # [K, N, Z]
    latent_B: np.ndarray = np.empty((1, 1, 0))


def draw_fields(accumulate: int, batch: int, pooled: int, latent: int = 0) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shapes and dtypes of the `Draws` of a step of K = accumulate times N = batch pairs, M = pooled in a pool.

    latent: numbers in a code, 0 for methods without.
    """
    shapes: dict[str, Shape] = dict.fromkeys(("accept", "slot"), (accumulate, pooled))
    shapes |= {"alpha": (accumulate, batch), "latent": (accumulate, batch, latent)}
    return {
        name: (shapes[kind], torch.int64 if kind == "slot" else torch.float64)
        for name, kind in ((name, name.partition("_")[0]) for name in Draws._fields)
    }


def step_batch(given: Mapping[str, Tensor], real_A: Tensor, real_B: Tensor) -> StepBatch:
    """The step's tensors, of pictures and of draws on the device."""
    draws = {name: given[name] for name in Draws._fields}
    for name in ("alpha_A", "alpha_B", "latent_A", "latent_B"):
        draws[name] = draws[name].to(torch.float32)
    return StepBatch(real_A, real_B, **draws)


class Packed:
    """Named arrays of int64 and float64 in one static buffer on the device, which one copy fills.

    views: the arrays by name; they stay where they are.
    """

    def __init__(self, fields: Mapping[str, tuple[Shape, torch.dtype]], device: torch.device) -> None:
        self._fields = dict(fields)
        self._buffer = torch.zeros(sum(math.prod(shape) for shape, _ in fields.values()), dtype=torch.int64).to(device)
        self.views = self._split(self._buffer)

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Copy values of the fields' shapes to the device, in its current stream and without waiting for it."""
        # A new buffer each time: torch reuses pinned memory only after the copies from it are done.
        host = torch.empty(self._buffer.shape, dtype=torch.int64, pin_memory=self._buffer.is_cuda)
        for name, view in self._split(host).items():
            view.numpy()[...] = values[name]
        self._buffer.copy_(host, non_blocking=True)

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([math.prod(shape) for shape, _ in self._fields.values()])
        return {
            name: part.view(dtype).view(shape)
            for part, (name, (shape, dtype)) in zip(parts, self._fields.items(), strict=True)
        }


class Staged:
    """Windows that the host cut, in static memory on the device: uint8 [n, h, w, C] of A and of B.

    On CUDA they travel in a stream of their own, beside the step before, into one of two staging buffers, and from
    there into the static memory once that step has read what it held.
    """

    def __init__(self, shapes: tuple[Shape, Shape], device: torch.device) -> None:
        self.windows = tuple(torch.zeros(shape, dtype=torch.uint8, device=device) for shape in shapes)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._staging = [[torch.empty_like(window) for window in self.windows] for _ in range(2)]
            self._free = [torch.cuda.Event() for _ in range(2)]  # that a staging buffer has been read
            self._turn = 0

    def load(self, cuts: tuple[Tensor, Tensor]) -> None:
        """Bring pinned windows into the static memory; waits at most for the step before the last one.

        So no more than a few steps' windows are pinned at a time, however far the host could run ahead.
        """
        if self._stream is None:
            for window, cut in zip(self.windows, cuts, strict=True):
                window.copy_(cut)
            return
        staging, free = self._staging[self._turn], self._free[self._turn]
        self._turn = 1 - self._turn
        current = torch.cuda.current_stream(self._stream.device)
        free.synchronize()
        with torch.cuda.stream(self._stream):
            for stage, cut in zip(staging, cuts, strict=True):
                stage.copy_(cut, non_blocking=True)
        current.wait_stream(self._stream)
        for window, stage in zip(self.windows, staging, strict=True):
            window.copy_(stage)
        free.record(current)


class Recorder(Protocol):
    """Who runs a function on the device, and records it."""

    def warm(self, function: Callable[[], Tensor]) -> Tensor:
        """Run the function as it will be recorded, now."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record the function, without running it; what is returned runs it, always into the same memory.

        Raises whatever keeps it from being recorded.
        """


class CudaRecorder:
    """CUDA graphs, after PyTorch's rules: warmed up and recorded in one side stream, replayed in the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def warm(self, function: Callable[[], Tensor]) -> Tensor:
        """Run the function in the side stream, between what comes before and after it in the current stream."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture the function into a graph. Raises what it raises, and RuntimeError for what CUDA cannot capture."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            # Meanwhile the loader's thread may pin memory and NCCL's may query events: only this thread is watched.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        except BaseException:
            torch.cuda.set_stream(current)  # a capture that ends in an error leaves its own stream current
            raise

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class StepGraph:
    """A step `function` without arguments: run for WARMUP steps, then recorded, then replayed; one step a call.

    The function reads and writes static memory only and returns scalars. Without a recorder, and when recording fails,
    it is simply run: a warning then names the reason. `prepare` is called before a recording and returns what puts the
    state's Python side back after a failed one; on the device nothing has happened then. `agree` tells whether a flag
    is set in any process, because all of them must replay or none.
    """

    def __init__(
        self,
        function: Callable[[], Scalars],
        recorder: Recorder | None,
        *,
        prepare: Callable[[], Callable[[], None]] = lambda: lambda: None,
        agree: Callable[[bool], bool] = lambda flag: flag,
        warmup: int = WARMUP,
    ) -> None:
        self._function, self._recorder = function, recorder
        self._prepare, self._agree = prepare, agree
        self._left = warmup
        self._names: list[str] = []
        self._replay: Callable[[], Tensor] | None = None

    @property
    def recorded(self) -> bool:
        """Whether the steps are replayed."""
        return self._replay is not None

    def __call__(self) -> Scalars:
        """Do one step; returns its scalars, float32 [] on the device."""
        if self._replay is None and self._recorder is not None:
            if self._left:
                self._left -= 1
                return self._scalars(self._recorder.warm(self._run))
            self._record(self._recorder)
        values = self._run() if self._replay is None else self._replay().clone()  # the next replay writes there again
        return self._scalars(values)

    def release(self) -> None:
        """Forget the recording, which holds on to memory and to communicators; steps are simply run from then on."""
        self._replay = self._recorder = None

    def _run(self) -> Tensor:
        scalars = self._function()
        self._names = list(scalars)
        return torch.stack(list(scalars.values()))

    def _scalars(self, values: Tensor) -> Scalars:
        return dict(zip(self._names, values.unbind(), strict=True))

    def _record(self, recorder: Recorder) -> None:
        """Record the function, or give up recording for good. Neither does a step."""
        restore, reason = self._prepare(), None
        try:
            self._replay = recorder.record(self._run)
        except Exception as error:  # whatever it is: the step can be done without
            chain = (error, error.__context__)  # the end of a failed capture raises an error of its own
            reason = "; ".join(f"{type(each).__name__}: {each}" for each in chain if each is not None)
        if self._agree(reason is not None):
            logger.warning(
                "training.mode=graph: the step cannot be recorded and runs eagerly from here on: %s",
                reason or "another process could not record it",
            )
            self.release()
            restore()


class GraphStep:
    """`train_step` on windows of two stores, by a StepGraph.

    shapes: (h, w, C) of the windows of A and of B. images: the stores on the device, uint8 [M, H, W, C] each, or None
    where the host cuts the windows. The optimisers get their learning rate and `capturable` set here: call it after
    their state was loaded. recorder and agree: see `StepGraph`.
    """

    def __init__(
        self,
        state: TrainState,
        shapes: tuple[tuple[int, int, int], tuple[int, int, int]],
        images: tuple[Tensor, Tensor] | None,
        *,
        accumulate: int,
        batch: int,
        pooled: int,
        latent: int = 0,
        device: torch.device,
        recorder: Recorder | None,
        agree: Callable[[bool], bool] = lambda flag: flag,
    ) -> None:
        self._state, self._micro_batches = state, (accumulate, batch)
        self._sizes = tuple(shape[:2] for shape in shapes)
        n = accumulate * batch
        places = dict.fromkeys(("places_A", "places_B"), ((4, n), torch.int64))
        lr = {"lr": ((), torch.float64)}
        self._packed = Packed({**places, **draw_fields(accumulate, batch, pooled, latent), **lr}, device)
        self._staged = Staged(((n, *shapes[0]), (n, *shapes[1])), device) if images is None else None
        self._images: tuple[Tensor, ...] = images or () if self._staged is None else self._staged.windows
        # CUDA's fused Adam reads its learning rate as float32; the CPU's takes any, and so gives the bits of a number.
        self._lr = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
        for optimizer in (state.optimizer_G, state.optimizer_D):
            for group in optimizer.param_groups:
                group.update(lr=self._lr, capturable=True)
        self.graph = StepGraph(self._step, recorder, prepare=self._prepare, agree=agree)

    def __call__(
        self,
        places: tuple[Tensor, Tensor],
        cuts: tuple[Tensor | None, Tensor | None],
        draws: Draws,
        lr: float,
        *,
        measure: bool = False,
    ) -> Scalars:
        """One step; the result is that of `train_step`.

        places: int64 [4, n] of A and of B on the host, rows picture, y, x, flip of each window; cuts: uint8
        [n, h, w, C], the windows, where the host cuts them.
        """
        places_A, places_B = (each.numpy() for each in places)
        self._packed.load({"places_A": places_A, "places_B": places_B, **draws._asdict(), "lr": np.float64(lr)})
        if self._staged is not None:
            cut_A, cut_B = cuts
            if cut_A is None or cut_B is None:
                raise ValueError("GraphStep: the stores are not on the device, and the windows were not cut")
            self._staged.load((cut_A, cut_B))
        scalars = self.graph()
        return scalars if measure else {name: value for name, value in scalars.items() if not name.startswith("grad_")}

    def _step(self) -> Scalars:
        """What is recorded: everything it reads is static memory."""
        given = self._packed.views
        self._lr.copy_(given["lr"])
        reals = []
        for images, size, places in zip(self._images, self._sizes, (given["places_A"], given["places_B"]), strict=True):
            index, y, x, flip = places.unbind()
            reals.append(crop_flip(images, index, y, x, flip != 0, size).unflatten(0, self._micro_batches))
        return train_step(self._state, step_batch(given, *reals), measure=True)

    def _prepare(self) -> Callable[[], None]:
        """Drop the gradients, so that the recording makes its own; returns what undoes half a step."""
        state, scaler = self._state, self._state.scaler
        saved = scaler.state_dict() if scaler.is_enabled() else None
        self._drop_gradients()

        def restore() -> None:
            self._drop_gradients()  # they lie in memory of a recording that is gone
            if saved is not None:  # it may have stopped between two of its calls
                state.scaler = GradScaler(self._lr.device.type)
                state.scaler.load_state_dict(saved)

        return restore

    def _drop_gradients(self) -> None:
        self._state.optimizer_G.zero_grad(set_to_none=True)
        self._state.optimizer_D.zero_grad(set_to_none=True)
