"""instance_norm with activation, residual and reflection pad at the shapes of the networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contestants import BATCHES, CUDA, CUDNN, DIRECTIONS, DTYPES, PYTORCH, dtype_of, ours
from measure import Call, Row, forward, forward_backward, random
from torch import Tensor

from cyclegan_fast.ops.instance_norm import instance_norm


@dataclass(frozen=True)
class Layer:
    """One use of the op in the generator or the discriminator, for pictures of 256 x 256."""

    channels: int
    side: int
    activation: str | None
    pad: int
    residual: bool
    where: str

    def __str__(self) -> str:
        parts = [f"{self.channels} @ {self.side}", self.activation or "", "+ residual" if self.residual else ""]
        parts += [f"pad {self.pad}" if self.pad else "", f"({self.where})"]
        return " ".join(part for part in parts if part)

    def bytes_moved(self, batch: int, size: int, direction: str) -> float:
        """What has to pass through memory: a map must be read twice, once for its statistics.

        Forward: x twice, residual, y. Backward: x and the gradient of y twice, dx, and the folded gradient of the
        residual, which without padding is the gradient of y and costs nothing.
        """
        inner = batch * self.channels * self.side**2 * size
        outer = batch * self.channels * (self.side + 2 * self.pad) ** 2 * size
        total = 2 * inner + inner * self.residual + outer
        if direction == "forward":
            return total
        return total + 2 * inner + 2 * outer + inner + inner * (self.residual and self.pad > 0)


LAYERS = (
    Layer(256, 64, "relu", 1, False, "in a residual block"),
    Layer(64, 256, "relu", 3, False, "before the head"),
    Layer(256, 64, None, 1, True, "end of a residual block"),
    Layer(128, 128, "relu", 0, False, "downsampling"),
    Layer(512, 31, "leaky_relu", 0, False, "discriminator"),
)


def in_pytorch(layer: Layer) -> Callable[..., Tensor]:
    def function(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.instance_norm(x)
        if layer.activation == "relu":
            y = F.relu(y)
        elif layer.activation == "leaky_relu":
            y = F.leaky_relu(y, 0.2)
        if residual is not None:
            y = y + residual
        return F.pad(y, (layer.pad,) * 4, mode="reflect") if layer.pad else y

    return function


def in_ours(layer: Layer, impl: str) -> Callable[..., Tensor]:
    def function(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return instance_norm(x, residual=residual, activation=layer.activation, pad=layer.pad, impl=impl)

    return function


def in_cudnn(layer: Layer, x: Tensor) -> Callable[..., Tensor]:
    """cuDNN's channels-last instance norm with PyTorch for the rest: cuDNN has no reflection."""
    import cudnn  # type: ignore[import-not-found]

    n, c = x.shape[:2]
    scale = torch.ones(1, c, 1, 1, device=x.device)
    bias = torch.zeros(1, c, 1, 1, device=x.device)
    epsilon = torch.full((1, 1, 1, 1), 1e-5)
    graph = cudnn.pygraph(intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT)
    inputs = [graph.tensor_like(tensor) for tensor in (x, scale, bias, epsilon)]
    outputs = graph.instancenorm(
        name="norm",
        norm_forward_phase=cudnn.norm_forward_phase.TRAINING,
        input=inputs[0],
        scale=inputs[1],
        bias=inputs[2],
        epsilon=inputs[3],
    )
    outputs[0].set_output(True).set_data_type(cudnn.data_type.BFLOAT16)
    for output in outputs[1:]:
        output.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    results = [torch.empty_like(x), *(torch.empty(n, c, 1, 1, device=x.device) for _ in range(2))]
    workspace = torch.empty(graph.get_workspace_size(), device=x.device, dtype=torch.uint8)
    handle = cudnn.create_handle()
    rest = in_pytorch(layer)

    def function(x: Tensor, residual: Tensor | None = None) -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        values = (x, scale, bias, epsilon, *results)
        graph.execute(dict(zip((*inputs, *outputs), values, strict=True)), workspace, handle=handle)
        return rest(results[0], residual)

    return function


def made(contestant: str, layer: Layer, batch: int, dtype: str, direction: str) -> Call:
    """A call of a contestant on inputs of its own."""
    kind = dtype_of(dtype)
    nhwc = contestant != "eager NCHW"
    shape = (batch, layer.channels, layer.side, layer.side)
    x = random(*shape, dtype=kind, nhwc=nhwc)
    residual = random(*shape, dtype=kind, nhwc=nhwc) if layer.residual else None
    function: Callable[..., Any]
    if contestant.startswith("ours"):
        function = in_ours(layer, contestant.split(", ")[1])
    elif contestant in CUDNN:
        function = in_cudnn(layer, x)
    else:
        function = in_pytorch(layer)
    if contestant == "torch.compile":
        function = torch.compile(function, fullgraph=True, dynamic=False)
    if direction == "forward":
        return forward(function, x, residual)
    if contestant in CUDNN:
        raise NotImplementedError("forward only")
    outer = layer.side + 2 * layer.pad
    gradient = random(batch, layer.channels, outer, outer, dtype=kind, nhwc=nhwc)
    return forward_backward(function, gradient, x, residual)


@pytest.mark.parametrize("contestant", [*ours(native=("cpu", "cuda")), *PYTORCH, *CUDNN])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_instance_norm(
    run: Callable[..., Row], small: bool, contestant: str, batch: int, layer: Layer, dtype: str, direction: str
) -> None:
    if small:
        batch, layer = 1, Layer(8, 12, layer.activation, layer.pad, layer.residual, layer.where)
    row = Row("instance_norm", str(layer), batch, dtype, direction, contestant)
    moved = layer.bytes_moved(batch, dtype_of(dtype).itemsize, direction)
    run(row, lambda: made(contestant, layer, batch, dtype, direction), must_move=moved)


@pytest.mark.skipif(CUDA, reason="a GPU finds its inputs in memory anyway")
@pytest.mark.parametrize("contestant", [*ours(native=("cpu",)), "eager channels-last"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_instance_norm_from_memory(
    run: Callable[..., Row], small: bool, contestant: str, layer: Layer, dtype: str, direction: str
) -> None:
    """As `test_instance_norm` at batch 1, with inputs, results and the copy's memory out of the caches."""
    if small:
        layer = Layer(8, 12, layer.activation, layer.pad, layer.residual, layer.where)
    row = Row("instance_norm, inputs not in the caches", str(layer), 1, dtype, direction, contestant)
    moved = layer.bytes_moved(1, dtype_of(dtype).itemsize, direction)
    run(row, lambda: made(contestant, layer, 1, dtype, direction), must_move=moved, cold=True)
