"""Buckets of gradients in one process, with a stand-in for the collective; two processes are in test_two_ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_step import batch_of, networks, state_of
from torch import Tensor, nn

from cyclegan_fast import distributed
from cyclegan_fast.models import PatchDiscriminator
from cyclegan_fast.training.cyclegan import CycleGANState
from cyclegan_fast.training.graph import CudaRecorder, StepGraph
from cyclegan_fast.training.reduction import BucketReduction
from cyclegan_fast.training.step import train_step


class Collectives:
    """What left, in order, and what was waited for; the mean over ranks is half of what this one has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.tensors: list[Tensor] = []
        monkeypatch.setattr(distributed, "begin_mean", self.begin)

    def begin(self, tensor: Tensor, _: Tensor | None = None) -> Callable[[], None]:
        number = len(self.tensors)
        self.tensors.append(tensor)
        self.log.append(f"send {number}")

        def wait() -> None:
            self.log.append(f"wait {number}")
            tensor.mul_(0.5)

        return wait


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> Collectives:
    return Collectives(monkeypatch)


def linear(*sizes: tuple[int, int]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(m, n) for m, n in sizes))


def backward(reduction: BucketReduction, loss: Tensor) -> None:
    with reduction.during():
        loss.backward()


def test_buckets_hold_each_parameter_once_in_reverse_and_one_network_each() -> None:
    one, two = linear((8, 8), (8, 8), (8, 100)), linear((8, 8))
    reduction = BucketReduction([list(one.parameters()), list(two.parameters())], bucket_bytes=700)
    order = [id(parameter) for bucket in reduction.buckets for parameter in bucket]
    assert order == [id(parameter) for network in (two, one) for parameter in reversed(list(network.parameters()))]
    # Of `two`; of `one` a bias of 448 bytes, a weight too large for any bucket, and the rest, of 640 bytes.
    assert [len(bucket) for bucket in reduction.buckets] == [2, 1, 1, 4]


def test_gradients_are_means_in_flat_buffers_in_the_memory_order_of_their_parameters(collectives: Collectives) -> None:
    D = PatchDiscriminator(3, 4, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(1, 3, 16, 16)
    D(x).square().mean().backward()
    alone = [(p.grad.clone(), p.grad.stride()) for p in D.parameters() if p.grad is not None]
    reduction = BucketReduction([list(D.parameters())], bucket_bytes=2000)
    for _ in range(3):
        D.zero_grad(set_to_none=True)
        backward(reduction, D(x).square().mean())
        reduction.finish()
        for (gradient, strides), parameter in zip(
            alone, (p for p in D.parameters() if p.grad is not None), strict=True
        ):
            assert torch.equal(parameter.grad, 0.5 * gradient)
            assert parameter.grad.stride() == strides
            storage = parameter.grad.untyped_storage().data_ptr()
            assert storage in {tensor.untyped_storage().data_ptr() for tensor in collectives.tensors}
            assert parameter.grad.data_ptr() % 64 == storage % 64
    assert len(collectives.tensors) == 3 * len(reduction.buckets) > 6


def test_buckets_leave_in_the_backward_pass_as_soon_as_they_are_full(collectives: Collectives) -> None:
    """From the second pass on: the first one shows which parameters have gradients."""
    net = linear((4, 4), (4, 4), (4, 4))
    reduction = BucketReduction([list(net.parameters())], bucket_bytes=150)  # a layer each

    def note(module: nn.Module, args: Any, y: Tensor) -> None:
        y.register_hook(lambda _: collectives.log.append("first layer"))

    net[0].register_forward_hook(note)
    for _ in range(2):
        net.zero_grad()
        collectives.log.append("pass")
        backward(reduction, net(torch.rand(2, 4)).sum())
        reduction.finish()
    waits = [["wait 0", "wait 1", "wait 2"], ["wait 3", "wait 4", "wait 5"]]
    assert collectives.log == [
        *("pass", "first layer", "send 0", "send 1", "send 2", *waits[0]),
        *("pass", "send 3", "send 4", "first layer", "send 5", *waits[1]),
    ]


def test_buckets_leave_in_one_order_whatever_is_ready_first(collectives: Collectives) -> None:
    one, two = linear((4, 4)), linear((4, 4))
    reduction = BucketReduction([list(one.parameters()), list(two.parameters())], bucket_bytes=1000)
    x = torch.rand(2, 4)
    for first, second in ((one, two), (one, two), (two, one)):
        one.zero_grad()
        two.zero_grad()
        a, b = first(x), second(x)  # autograd takes the later one first
        collectives.tensors.clear()
        backward(reduction, (a + b).sum())
        reduction.finish()
        own = [two[0].weight, one[0].weight]
        assert [tensor.untyped_storage().data_ptr() for tensor in collectives.tensors] == [
            parameter.grad.untyped_storage().data_ptr() for parameter in own if parameter.grad is not None
        ]


def test_parameters_that_no_loss_reaches_have_no_gradient_and_stop_nobody(collectives: Collectives) -> None:
    net = linear((4, 4), (4, 4))
    reduction = BucketReduction([list(net.parameters())], bucket_bytes=10_000)
    used = torch.ones(4)
    for _ in range(3):
        net.zero_grad()
        backward(reduction, nn.functional.linear(net[0](used), net[1].weight).sum())
        collectives.log.append("backward is over")
        reduction.finish()
        assert net[1].bias.grad is None
        assert torch.equal(net[0].weight.grad, 0.5 * net[1].weight.sum(0)[:, None].expand(4, 4))
    assert collectives.log.index("send 1") < len(collectives.log) - 1 - collectives.log[::-1].index("backward is over")


def test_nothing_of_an_earlier_step_is_sent_for_a_parameter_without_a_gradient(collectives: Collectives) -> None:
    """Another process may have one: what it receives must be its own share, and no old gradient added to it."""
    net = linear((4, 4))
    reduction = BucketReduction([list(net.parameters())], bucket_bytes=10_000)
    x = torch.rand(2, 4)
    for loss in (net(x).sum(), (x @ net[0].weight).sum()):
        net.zero_grad()
        backward(reduction, loss)
        reduction.finish()
    assert net[0].bias.grad is None
    assert float(collectives.tensors[-1].sum()) == pytest.approx(float(net[0].weight.grad.sum()))


def test_a_gradient_that_comes_too_late_is_an_error(collectives: Collectives) -> None:
    """Nobody would average it: without an error the processes would go different ways."""
    net = linear((4, 4), (4, 4))
    reduction = BucketReduction([list(net.parameters())], bucket_bytes=10_000)
    x = torch.rand(2, 4)
    backward(reduction, net[1](x).sum())
    net.zero_grad()
    with pytest.raises(RuntimeError, match=r"shape \(4,\) got a gradient after the others"):
        backward(reduction, net[1](net[0](x)).sum())


def test_what_a_failed_pass_left_is_forgotten(collectives: Collectives) -> None:
    net = linear((4, 4), (4, 4))
    reduction = BucketReduction([list(net.parameters())], bucket_bytes=100)
    x = torch.rand(2, 4)

    def step(fail: bool = False) -> None:
        net.zero_grad()
        with reduction.during():
            net(x).sum().backward()
            if fail:
                raise ValueError("the recording failed")
        reduction.finish()

    step()
    wanted = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    with pytest.raises(ValueError, match="recording"):
        step(fail=True)
    sent = len(collectives.tensors)
    step()
    assert len(collectives.tensors) == sent + len(reduction.buckets)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), wanted, strict=True))


def test_what_cannot_be_a_bucket_is_refused() -> None:
    net = linear((4, 4))
    with pytest.raises(ValueError, match="bucket_bytes = 0"):
        BucketReduction([list(net.parameters())], bucket_bytes=0)
    net[0].bias.data = net[0].bias.data.double()
    with pytest.raises(ValueError, match="several dtypes or devices"):
        BucketReduction([list(net.parameters())], bucket_bytes=1000)


def reduced_state(modules: dict[str, nn.Module], bucket_bytes: int = 4000) -> CycleGANState:
    state = state_of(modules)
    state.reduction_G, state.reduction_D = (
        BucketReduction([list(modules[name].parameters()) for name in names], bucket_bytes=bucket_bytes)
        for names in (("G_A", "G_B"), ("D_A", "D_B"))
    )
    return state


def test_a_step_reduces_each_gradient_once_however_many_micro_batches(collectives: Collectives) -> None:
    state = reduced_state(networks())
    assert isinstance(state.reduction_G, BucketReduction)
    assert isinstance(state.reduction_D, BucketReduction)
    count = len(state.reduction_G.buckets) + len(state.reduction_D.buckets)
    for step, micro_batches in enumerate((1, 3, 2)):
        train_step(state, batch_of(step, micro_batches, 1))
        assert len(collectives.tensors) == (step + 1) * count


def test_the_generators_gradients_travel_while_the_discriminators_compute(
    collectives: Collectives, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = networks()
    state = reduced_state(modules, bucket_bytes=10**6)  # one bucket a network
    for name in ("D_A", "D_B"):
        modules[name].register_forward_hook(lambda *_, name=name: collectives.log.append(name))
    for name, optimizer in (("G", state.optimizer_G), ("D", state.optimizer_D)):
        optimizer.register_step_pre_hook(lambda *_, name=name: collectives.log.append(f"Adam {name}"))
    exchange = state.exchange_A
    state.exchange_A = lambda *a: (collectives.log.append("pool"), exchange(*a))[1]
    for step in range(2):
        collectives.log.clear()
        collectives.tensors.clear()
        train_step(state, batch_of(step, 1, 1))
    assert collectives.log == [
        *("D_A", "D_B", "pool", "send 0", "send 1"),  # the generators' pass
        *("D_A", "D_B", "send 2", "send 3"),
        *("wait 0", "wait 1", "Adam G", "wait 2", "wait 3", "Adam D"),
    ]


def test_a_reduction_that_changes_nothing_leaves_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets, late optimiser and all: the step of several processes computes what that of one does."""
    monkeypatch.setattr(distributed, "begin_mean", lambda *_: lambda: None)
    plain, bucketed = networks(torch.float32), networks(torch.float32)
    states: list[Any] = [state_of(plain, pool=3), reduced_state(bucketed)]
    states[1].exchange_A, states[1].exchange_B = (state_of(bucketed, pool=3).exchange_A for _ in "AB")
    for step in range(6):
        batch = batch_of(step, 2, 1, torch.float32)
        logs = [train_step(state, batch, measure=True) for state in states]
        assert logs[0].keys() == logs[1].keys()
        assert all(torch.equal(logs[0][name], logs[1][name]) for name in logs[0])
    for name, module in plain.items():
        for key, value in module.state_dict().items():
            assert torch.equal(bucketed[name].state_dict()[key], value), (name, key)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    def test_a_cuda_graph_holds_the_reductions_of_one_nccl_rank(self, tmp_path: Path) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group(
            "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, device_id=device
        )
        try:
            plain, recorded = (self.losses(device, recorder) for recorder in (None, CudaRecorder(device)))
        finally:
            dist.destroy_process_group()
        assert recorded == pytest.approx(plain, rel=1e-4)
        assert len(set(plain)) == len(plain)

    def losses(self, device: torch.device, recorder: CudaRecorder | None) -> list[float]:
        """Of ten steps of a discriminator, recorded after the third where there is a recorder."""
        torch.manual_seed(0)
        D = PatchDiscriminator(3, 8, 2).to(device)
        optimizer = torch.optim.Adam(D.parameters(), lr=1e-3, fused=True, capturable=True)
        reduction = BucketReduction([list(D.parameters())], bucket_bytes=20_000)
        x = torch.rand(2, 3, 32, 32, device=device)

        def step() -> dict[str, Tensor]:
            optimizer.zero_grad(set_to_none=True)
            loss = (D(x) - 1).square().mean()
            with reduction.during():
                loss.backward()
            reduction.finish()
            optimizer.step()
            return {"loss": loss.detach()}

        graph = StepGraph(step, recorder)
        losses = [float(graph()["loss"]) for _ in range(10)]
        assert graph.recorded == (recorder is not None)
        graph.release()
        return losses
