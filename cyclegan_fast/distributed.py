"""The one place that knows of several processes. With a single process every function here does nothing, cheaply.

Processes are started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK. CPU tensors travel by gloo and CUDA
tensors by NCCL.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

# One rank may decode a whole data set while the others wait for it.
_TIMEOUT = timedelta(minutes=60)


def launched() -> bool:
    """Whether torchrun (or something that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Index of this process on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))) if launched() else 1


def init(device: torch.device) -> None:
    """Join the process group if there is one to join; ``device`` is the one this process computes on."""
    if not launched() or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT, device_id=device if device.type == "cuda" else None)


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Index of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return rank() == 0


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the body on rank 0, then on the others, so that only one process builds what all then find ready.

    Raises RuntimeError on the others when rank 0 failed, instead of leaving them to wait.
    """
    if world_size() == 1:
        yield
    elif is_main():
        failed = True
        try:
            yield
            failed = False
        finally:
            any_rank(failed)
    else:
        if any_rank(False):
            raise RuntimeError("rank 0 failed in preparing what all ranks need; its own message says why")
        yield


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must call."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


class StopVote:
    """Agreement of all ranks on stopping at one and the same step, without waiting for one another.

    The vote of step ``s`` travels while step ``s`` computes and is read at step ``s + 1``.
    """

    def __init__(self) -> None:
        self._flag = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None

    def cast(self, stop: bool) -> bool:
        """Vote; returns the outcome of the vote before. A single process is obeyed at once."""
        if world_size() == 1:
            return stop
        outcome = self.settle()
        self._flag = torch.tensor(int(stop))
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return outcome

    def settle(self) -> bool:
        """Wait for the vote under way, if any, and return its outcome."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag)


def broadcast_parameters(modules: Iterable[nn.Module]) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if world_size() == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            dense = tensor.contiguous()  # gloo takes no other memory order
            dist.broadcast(dense, src=0)
            tensor.copy_(dense)


def begin_mean(tensor: Tensor, wire: Tensor | None = None) -> Callable[[], None]:
    """Start to replace a contiguous floating-point tensor by its mean over the ranks; what is returned waits for it.

    Every rank must call in the same order. Until it has arrived the tensor must not be touched. wire: memory of the
    same shape in which it travels, and is summed, in another dtype; the sum is divided in the tensor's own.
    """
    sent = tensor if wire is None else wire.copy_(tensor)
    divided = wire is None and tensor.is_cuda  # NCCL does so on the way; gloo only in later versions of torch
    operation = dist.ReduceOp.AVG if divided else dist.ReduceOp.SUM
    work = dist.all_reduce(sent, op=operation, async_op=True)
    count = world_size()

    def wait() -> None:
        work.wait()
        if wire is not None:
            tensor.copy_(wire)
        if not divided:
            tensor.div_(count)

    return wait


def disagreement(values: Tensor) -> Tensor | None:
    """None where all ranks hold the same int64 [n]; otherwise what each of them holds, int64 [world_size, n].

    On every rank the same: one collective where they agree, two where they do not. On the host, where a CPU tensor
    goes past whatever an accelerator has queued for its own communicator.
    """
    if world_size() == 1:
        return None
    values = values.cpu()
    extremes = torch.cat([values, ~values])  # the largest complement is the complement of the smallest
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[: values.numel()], ~extremes[values.numel() :]
    if torch.equal(largest, smallest):
        return None
    everyone = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(everyone, values)
    return torch.stack(everyone)


def average(values: Tensor) -> Tensor:
    """The mean of a tensor over the ranks."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def gather_batch(images: Tensor) -> Tensor:
    """The images [N, C, H, W] of all ranks as [world_size * N, C, H, W], in the order of the ranks."""
    if world_size() == 1:
        return images
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    images = images.contiguous()
    gathered = images.new_empty((world_size() * images.shape[0], *images.shape[1:]))
    # The name that later versions of torch prefer, where there is one.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(gathered, images)
    return gathered.contiguous(memory_format=torch.channels_last) if channels_last else gathered
