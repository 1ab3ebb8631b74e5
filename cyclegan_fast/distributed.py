"""The one place that knows of several processes. With a single process every function here does nothing, cheaply.

Processes are started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK. CPU tensors travel by gloo and CUDA
tensors by NCCL.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cyclegan_fast.heartbeat import Heartbeat, LostRankError

__all__ = [
    *("LostRankError", "StopVote", "any_rank", "average", "begin_mean", "broadcast_parameters", "collective"),
    *(
        "disagreement",
        "doing",
        "ended",
        "gather_batch",
        "init",
        "is_main",
        "launched",
        "local_rank",
        "local_world_size",
    ),
    *("main_first", "rank", "shutdown", "told", "world_size"),
]

# Processes of one start come within minutes of one another; Python and torch may have to be read over a network.
_JOIN = timedelta(minutes=10)

_heartbeat: Heartbeat | None = None


def launched() -> bool:
    """Whether torchrun (or something that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Index of this process on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))) if launched() else 1


def init(device: torch.device, timeout: float = 600.0) -> None:
    """Join the process group if there is one to join; ``device`` is the one this process computes on.

    timeout: seconds that one process may keep the others waiting in any operation but `main_first`.
    """
    if not launched() or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=_JOIN))
    start = _meet(dist.PrefixStore("cyclegan_fast", store), rank, size)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(start, store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    _start_heartbeat(start, rank, size, timeout)


def _meet(store: dist.Store, rank: int, size: int) -> str:
    """Wait until all processes of this start are there; returns a name for it, the same on all and never used before.

    torchrun keeps its store when it restarts workers, with all that the dead ones wrote, addresses too. So rank 0
    answers to a word that a process has just made up, and knows by a second one that the answer was read. Raises
    RuntimeError naming the ranks that did not come.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"hello {rank}", mine)
        store.wait([f"welcome {mine}"], _JOIN)
        start = store.get(f"welcome {mine}").decode()
        store.set(f"{start} has {rank}", "")
        store.wait([f"{start} begins"], _JOIN)
        return start
    missing, answered = set(range(1, size)), set()
    end, pause = time.monotonic() + _JOIN.total_seconds(), 0.01
    while missing:
        for other in sorted(missing):
            if store.check([f"{mine} has {other}"]):
                missing.discard(other)
            elif store.check([f"hello {other}"]) and (word := store.get(f"hello {other}").decode()) not in answered:
                store.set(f"welcome {word}", mine)
                answered.add(word)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"of {size} ranks, these did not come within {_JOIN}: {sorted(missing)}")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    store.set(f"{mine} begins", "")
    return mine


def _start_heartbeat(start: str, rank: int, size: int, timeout: float) -> None:
    """Signs of life from here on, by a connection of their own: a thread may not share one that waits."""
    global _heartbeat
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_JOIN)
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    own = dist.PrefixStore(f"{start} heartbeat", store)
    _heartbeat = Heartbeat(own, rank, size, timeout=timeout, launcher=launcher)


def shutdown() -> None:
    """Leave the process group."""
    global _heartbeat
    if dist.is_initialized():
        dist.destroy_process_group()
    if _heartbeat is not None:  # last: it ends this process where a device keeps it from leaving
        _heartbeat.close()
        _heartbeat = None


def doing(what: str, *, unbounded: bool = False) -> None:
    """Tell the other processes what this one does from now on; unbounded: that may take longer than the time-out."""
    if _heartbeat is not None:
        _heartbeat.doing(what, unbounded=unbounded)


def ended(error: BaseException) -> None:
    """Tell the other processes that an error ends this one."""
    if _heartbeat is not None and not isinstance(error, LostRankError):
        _heartbeat.ended(f"{type(error).__name__}: {str(error)[:500]}")


@contextlib.contextmanager
def collective(name: str) -> Iterator[None]:
    """The time in which this process waits for all others in an operation; nothing else belongs inside.

    Raises LostRankError, which names the ranks that did not come, when the operation fails or takes too long.
    """
    if _heartbeat is None:
        yield
        return
    with _heartbeat.waiting(name):
        yield


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

    Rank 0 may take any time, while it gives signs of life. Raises LostRankError on the others when it does not, and
    RuntimeError when it failed.
    """
    if world_size() == 1 or _heartbeat is None:
        yield
    elif is_main():
        outcome = "failed"
        try:
            yield
            outcome = "ready"
        finally:
            _heartbeat.hand_over(outcome)
    else:
        if _heartbeat.hand_over(None) == "failed":
            raise RuntimeError("rank 0 failed in preparing what all ranks need; its own message says why")
        yield


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must call."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    with collective("agreement"):
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def told(value: float) -> float:
    """The number that rank 0 gives, on every rank; every rank must call."""
    if world_size() == 1:
        return value
    number = torch.tensor(value, dtype=torch.float64)
    with collective("word of rank 0"):
        dist.broadcast(number, src=0)
    return float(number)


class StopVote:
    """Agreement of all ranks on stopping, or saving, at one and the same step, without waiting for one another.

    The vote of step ``s`` travels while step ``s`` computes and is read at step ``s + 1``. The strongest wish wins.
    """

    NOTHING, SAVE, STOP = range(3)

    def __init__(self) -> None:
        self._flag = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None

    def cast(self, wish: int) -> int:
        """Vote; returns the outcome of the vote before. A single process is obeyed at once."""
        if world_size() == 1:
            return wish
        outcome = self.settle()
        self._flag = torch.tensor(wish)
        with collective("vote on stopping"):
            self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return outcome

    def settle(self) -> int:
        """Wait for the vote under way, if any, and return its outcome."""
        if self._work is None:
            return self.NOTHING
        with collective("vote on stopping"):
            self._work.wait()
        self._work = None
        return int(self._flag)


def broadcast_parameters(modules: Iterable[nn.Module]) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if world_size() == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            dense = tensor.contiguous()  # gloo takes no other memory order
            with collective("broadcast of the weights"):
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
    with collective("all-reduce of the gradients"):
        work = dist.all_reduce(sent, op=operation, async_op=True)
    count = world_size()

    def wait() -> None:
        with collective("all-reduce of the gradients"):
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
    with collective("comparison of the weights"):
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[: values.numel()], ~extremes[values.numel() :]
    if torch.equal(largest, smallest):
        return None
    everyone = [torch.empty_like(values) for _ in range(world_size())]
    with collective("comparison of the weights"):
        dist.all_gather(everyone, values)
    return torch.stack(everyone)


def average(values: Tensor) -> Tensor:
    """The mean of a tensor over the ranks."""
    if world_size() == 1:
        return values
    values = values.clone()
    with collective("mean of the losses"):
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
    with collective("gathering of the fakes"):
        gather(gathered, images)
    return gathered.contiguous(memory_format=torch.channels_last) if channels_last else gathered
