"""Gradients averaged over the processes, in buckets that travel while the backward pass goes on.

A network here runs forward twice for one backward pass, its compiled form is one node of autograd, and a whole step may
be recorded as a CUDA graph: a wrapper around the forward pass, as DistributedDataParallel is one, fits none of these.
This takes the parameters instead, whatever uses them:

    backward    autograd adds a parameter's gradient up and says so     (`register_post_accumulate_grad_hook`)
    a bucket    when all its gradients are there, one operation packs them into a flat buffer, of which they are views
                from then on, and the buffer sets out
    finish      waits for the buffers, before the optimiser reads the views

Buckets hold parameters of one network, in the reverse of the order in which these were registered, which is about
that in which a backward pass makes gradients. They set out in that order on every process, each one when those before
it have left, whatever becomes ready first: collectives must come in the same order everywhere. Gradients are packed
when they are complete, instead of adding them up in the buffer: that moves fewer bytes (nothing needs clearing or
reading again), micro-batches add up as they do in one process, and who drops the gradients breaks nothing.

A parameter that no loss reaches (the biases before a norm, in the fused networks) never reports. Which ones do is
learnt from the first backward pass, after which all buckets leave at once; from the second on they leave as they fill.

Everything goes through the default process group, on CUDA one NCCL communicator, which works through its queue in one
stream. Several, at work at the same time, may wait for one another for ever, in CUDA graphs above all. It means that a
collective issued behind the gradients also arrives behind them. Nothing here reads a value on the host and all memory
stays where it is, so a CUDA graph can hold it: a recording includes the collectives, and every process replays it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cyclegan_fast import distributed

__all__ = ["BucketReduction"]

# Parameters begin at multiples of so many bytes in a bucket, for kernels that load several numbers at once.
_ALIGN = 64


class BucketReduction:
    """Means of gradients over the processes; a `Reduction` of the step (see `training.step`).

    networks: the parameters of each network, in the order in which the networks run forward; each network's are of one
    dtype and on one device. bucket_bytes: most of what one bucket holds, but at least one parameter. wire: the dtype in
    which gradients travel and are summed, if it is not their own; the sum is divided in their own.

    In bfloat16, which rounds by at most 2**-8 relatively, a mean over n processes is off by at most about n * 2**-8 of
    the mean of the gradients' sizes: each gradient is rounded once, and each of the n - 1 sums.

    Raises ValueError for a bucket_bytes that is not positive and a network of several dtypes or devices.
    """

    def __init__(
        self, networks: Sequence[Iterable[nn.Parameter]], *, bucket_bytes: int, wire: torch.dtype | None = None
    ) -> None:
        if bucket_bytes <= 0:
            raise ValueError(f"BucketReduction: bucket_bytes = {bucket_bytes} is not positive")
        self._buckets = [
            _Bucket(parameters, wire)
            for network in reversed(networks)
            for parameters in _split(list(network)[::-1], bucket_bytes)
        ]
        self._active = False
        self._under_way: list[Callable[[], None]] = []  # what waits for each bucket that has left
        for bucket in self._buckets:
            for i, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, bucket, i))

    @property
    def buckets(self) -> list[list[nn.Parameter]]:
        """The parameters of each bucket, in the order in which buckets set out."""
        return [list(bucket.parameters) for bucket in self._buckets]

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Around the one backward pass that completes the gradients: they leave as it makes them, the last at its end.

        Raises RuntimeError if a parameter gets a gradient in it that had none before, after its bucket was packed.
        """
        self._under_way = []  # of a recording that failed
        for bucket in self._buckets:
            bucket.arrived.clear()
            bucket.packed = False
        self._active = True
        try:
            yield
        finally:
            self._active = False
        for bucket in self._buckets:
            if not bucket.packed:
                bucket.pack()
            bucket.expected = frozenset(bucket.arrived)
        self._send_packed()

    def finish(self) -> None:
        """Wait for all buckets: gradients are means from here on. On CUDA the current stream waits, not the host."""
        for wait in self._under_way:
            wait()
        self._under_way = []

    def _arrived(self, bucket: _Bucket, index: int, parameter: nn.Parameter) -> None:
        """A backward pass has added up a parameter's gradient."""
        if not self._active:  # a micro-batch before the last one
            return
        if bucket.packed:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} got a gradient after the others of its bucket had left "
                "for the other processes; which parameters have gradients must not change while a run goes on"
            )
        bucket.arrived.add(index)
        if bucket.expected is not None and bucket.arrived >= bucket.expected:
            bucket.pack()
            self._send_packed()

    def _send_packed(self) -> None:
        """Let the buckets leave that are packed and have none before them that is not."""
        while len(self._under_way) < len(self._buckets):
            bucket = self._buckets[len(self._under_way)]
            if not bucket.packed:
                return
            self._under_way.append(bucket.send())


class _Bucket:
    """Parameters with a flat buffer that takes their gradients."""

    def __init__(self, parameters: list[nn.Parameter], wire: torch.dtype | None) -> None:
        first = parameters[0]
        if any((p.dtype, p.device) != (first.dtype, first.device) for p in parameters):
            raise ValueError("BucketReduction: the parameters of a network have several dtypes or devices")
        self.parameters = parameters
        sizes = [_aligned(parameter) for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        self._wire = torch.empty_like(self._flat, dtype=wire) if wire not in (None, first.dtype) else None
        self._views = [_view(part, p) for part, p in zip(self._flat.split(sizes), parameters, strict=True)]
        self._stream: torch.cuda.Stream | None = None  # in which it was packed
        self.expected: frozenset[int] | None = None  # parameters that had a gradient last time
        self.arrived: set[int] = set()
        self.packed = False

    def pack(self) -> None:
        """Take the gradients over, which are views of the buffer from here on."""
        pairs = list(zip(self.parameters, self._views, strict=True))
        if absent := [view for parameter, view in pairs if parameter.grad is None]:
            torch._foreach_zero_(absent)
        present = [(parameter, view, parameter.grad) for parameter, view in pairs if parameter.grad is not None]
        if present:
            torch._foreach_copy_([view for _, view, _ in present], [gradient for *_, gradient in present])
        for parameter, view, _ in present:
            parameter.grad = view
        self._stream = torch.cuda.current_stream(self._flat.device) if self._flat.is_cuda else None
        self.packed = True

    def send(self) -> Callable[[], None]:
        """Start on the means; what is returned waits for them."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._flat.device)
            if current != self._stream:  # the bucket it had to wait for is of a network that runs in another stream
                current.wait_stream(self._stream)
        return distributed.begin_mean(self._flat, self._wire)


def _split(parameters: list[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in parts of at most so many bytes, or of one parameter."""
    part: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        size = _aligned(parameter) * parameter.element_size()
        if part and held + size > most:
            yield part
            part, held = [], 0
        part.append(parameter)
        held += size
    if part:
        yield part


def _aligned(parameter: nn.Parameter) -> int:
    """Elements of the buffer that a parameter takes."""
    step = max(1, _ALIGN // parameter.element_size())
    return -(-parameter.numel() // step) * step


def _view(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """The part as the gradient of the parameter, in its memory order, as autograd makes gradients."""
    dense = torch.empty_like(parameter).stride() == parameter.stride()  # without holes or overlaps
    view = part[: parameter.numel()]
    return view.as_strided(parameter.shape, parameter.stride()) if dense else view.view(parameter.shape)
