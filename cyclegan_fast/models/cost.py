"""What the networks and a training step cost, counted instead of measured: FLOP, bytes moved, kernels, memory kept.

A network is a list of `Layer`s, a step a list of `Pass`es of networks, a pass a list of `Kernel`s; `training_step` sums
them. FLOP are 2 x MAC of the convolutions and agree with `torch.utils.flop_counter` to the last one. Bytes are those
that must cross the device's memory at a level of fusion, every tensor once for each kernel that touches it:

    i+    eager PyTorch with a layout copy of each tensor that enters or leaves a norm, both ways
    i     eager PyTorch without them: convolution, bias, statistics, normalise, activation, sum, pad; the same backward
    ii    norm + activation + residual + reflection pad in one operation that reads its input twice; biases in the
          convolutions, the input's reflection in the first one
    ii+   the statistics, and the backward's two sums where no residual enters, taken by the convolution before
    iii   normalise, activation and reflection while the next convolution loads: nothing but convolutions is left

What is left out, a per cent or less: losses, image pools, dropout's masks, the cropping of sizes that are no multiple
of 4, the norms' statistics themselves, spectral norms of weights, averaged weights, and the second derivative that the
gradient penalty of wgangp takes.
Weights and the optimisers count separately (`weights`, `optimiser`), since they do not grow with the pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cyclegan_fast.config import Config, ModelConfig

__all__ = [
    "BYTES",
    "LEVELS",
    "Kernel",
    "Layer",
    "Pass",
    "Step",
    "Work",
    "activation_bytes",
    "configured",
    "discriminator_layers",
    "generator_forward",
    "generator_layers",
    "optimiser",
    "step_kernels",
    "step_passes",
    "training_step",
    "weights",
]

LEVELS = ("i+", "i", "ii", "ii+", "iii")
# Of one element of an activation in a resolved precision.
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Work:
    """FLOP, bytes moved and kernels launched of something; adds up, and multiplies by a count."""

    flop: float = 0
    bytes: float = 0
    kernels: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes, self.kernels + other.kernels)

    def __mul__(self, count: int) -> Work:
        return Work(self.flop * count, self.bytes * count, self.kernels * count)


@dataclass(frozen=True)
class Kernel:
    """One kernel: ``conv``, ``dgrad``, ``wgrad`` (a convolution and its two gradients) or anything else by name."""

    kind: str
    flop: float
    bytes: float


@dataclass(frozen=True)
class Layer:
    """A convolution and what follows it, for one picture; ``source``, ``input`` and ``output`` are elements.

    ``source`` is the input before the padding that a convolution cannot do by itself, ``input`` after it. Forward,
    input gradient and weight gradient take ``flop`` each.
    """

    name: str
    flop: int
    source: int
    input: int
    output: int
    filters: int
    """Weights of the convolution."""
    vectors: int
    """Parameters beside them: bias and affine norm."""
    padding: str = ""
    """``reflect``, ``resize`` (to twice the sides, then reflected), or ``zero`` where zeros are not on all sides."""
    bias: bool = False
    norm: bool = True
    activation: bool = True
    residual: bool = False
    """The block's input is added after the norm."""
    block: bool = False
    """Inside a residual block."""
    joined: int = 0
    """Elements of the input that come past the level inside, in a U-Net; a copy puts both parts together."""

    @property
    def parameters(self) -> int:
        """All of them, whether the gradient reaches them or not."""
        return self.filters + self.vectors


@dataclass(frozen=True)
class Step:
    """One training step: networks, size, and how it is executed. Raises ValueError for an unknown level or precision.

    ``precision`` is a resolved one. ``batched``: passes that share weights run as one batch. ``own_gradient``: no
    gradient from one generator into the other. ``accumulate``: forward-backward passes of ``batch`` pairs in one step.
    """

    model: ModelConfig
    batch: int = 1
    height: int = 256
    width: int = 256
    identity: bool = True
    level: str = "i"
    precision: str = "bf16"
    batched: bool = False
    recompute: bool = False
    own_gradient: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level = {self.level!r} is not one of {', '.join(LEVELS)}")
        if self.precision not in BYTES:
            raise ValueError(f"precision = {self.precision!r} is not one of {', '.join(BYTES)}")

    @property
    def pairs(self) -> int:
        """Pairs of pictures in the step."""
        return self.batch * self.accumulate


@dataclass(frozen=True)
class Pass:
    """One run of a network, ``G_A`` say, over ``pictures`` pictures, and the gradients taken from it."""

    network: str
    layers: tuple[Layer, ...]
    pictures: int
    weight_gradient: bool
    input_gradient: bool


def training_step(step: Step) -> Work:
    """All forward and backward passes of a step. Weights and optimisers are not in it: `weights`, `optimiser`."""
    return _sum(step_kernels(step))


def configured(config: Config, height: int, width: int, *, precision: str, fused: bool) -> Step:
    """One process's step of a run of CycleGAN or pix2pix on pictures of height x width, in a resolved precision.

    ``fused``: the networks run by the fused operations. Recomputation is left out: these are the FLOP and bytes that
    the step needs, by which the speed of an execution is judged.
    """
    return Step(
        config.model,
        batch=config.training.batch,
        height=height,
        width=width,
        identity=config.loss.identity > 0,
        level="ii" if fused else "i",
        precision=precision,
        batched=True,
        own_gradient=config.loss.generator_gradient == "own",
        accumulate=config.training.accumulate,
    )


def generator_forward(step: Step, *, direction: str = "AtoB") -> Work:
    """One forward pass of a generator over ``step.batch`` pictures, without gradients."""
    layers = _networks(step)["G_A" if direction == "AtoB" else "G_B"]
    return _sum(_forward(Pass("G", layers, step.batch, False, False), step))


def step_kernels(step: Step) -> Iterator[Kernel]:
    """The kernels of a step's passes; their order is not that of execution."""
    for one in step_passes(step):
        yield from _forward(one, step)
        yield from _backward(one, step)
        blocks = tuple(layer for layer in one.layers if layer.block)
        if step.recompute and blocks:
            yield from _forward(replace(one, layers=blocks), step)


def step_passes(step: Step) -> list[Pass]:
    """The runs of the networks in one step of CycleGAN or pix2pix, in the order of `training.step`."""
    networks = _networks(step)
    together = step.identity and step.batched
    passes: list[Pass] = []

    def add(name: str, batches: int = 1, *, weight: bool = True, entry: bool = False) -> None:
        passes.append(Pass(name, networks[name], batches * step.batch, weight, entry))

    for _ in range(step.accumulate):
        if step.model.method == "pix2pix":
            G, D = networks
            add(G)
            add(D, weight=False, entry=True)
            for _ in range(1 if step.batched else 2):
                add(D, 2 if step.batched else 1)
            continue
        for name in ("G_A", "G_B"):  # the fakes, and the identity beside them
            add(name, 2 if together else 1)
            if step.identity and not together:
                add(name)
        for name in ("G_A", "G_B"):
            add(name, entry=not step.own_gradient)
        for name in ("D_A", "D_B"):
            add(name, weight=False, entry=True)
        for name in ("D_A", "D_B"):
            for _ in range(1 if step.batched else 2):
                add(name, 2 if step.batched else 1)
    return passes


def activation_bytes(step: Step) -> float:
    """Bytes that the generators' forward passes of one micro-batch keep for the backward pass, the step's peak.

    Eager (i+, i) keeps the input and the output of each norm, each activation and each padded copy; ii keeps the
    norm's input and the next convolution's; iii the norm's input and the residual stream. With ``recompute`` a block
    keeps its input only; the one block under recomputation is not counted.
    """
    count = 0
    passes = [one for one in step_passes(replace(step, accumulate=1)) if one.network.startswith("G")]
    passes += [one for one in step_passes(replace(step, accumulate=1)) if not one.weight_gradient]
    for one in passes:
        count += one.pictures * sum(
            _kept(before, layer, after, step) for before, layer, after in _neighbours(one.layers)
        )
    return float(count * BYTES[step.precision])


def weights(step: Step) -> Work:
    """Traffic of the weights beside that of the pictures, and its kernels.

    Each pass reads the filters forward, reads them for the input gradient and writes their gradient. The gradients of
    further passes are added to the first's. In a 16-bit precision the filters are cast once for each network in the
    generators' half and in the discriminators', and their gradients back to float32.
    """
    size, passes, total = BYTES[step.precision], step_passes(step), Work()
    for name, layers in _networks(step).items():
        filters, tensors = sum(layer.filters for layer in layers), sum(1 + layer.bias for layer in layers)
        own = [one for one in passes if one.network == name]
        trained = sum(one.weight_gradient for one in own)
        total += Work(bytes=filters * size * (2 * len(own) + trained))
        total += Work(bytes=3 * filters * size, kernels=tensors) * (trained - 1)
        if size < 4:
            casts = step.accumulate * (1 + (trained < len(own)))  # a discriminator is cast in both halves
            total += Work(bytes=filters * (4 + size), kernels=tensors) * (casts + step.accumulate)
    return total


def optimiser(step: Step) -> Work:
    """Both Adam steps in float32: reads weight, gradient and two moments, writes all but the gradient."""
    parameters = sum(layer.parameters for layers in _networks(step).values() for layer in layers)
    return Work(bytes=7 * 4 * parameters, kernels=2)


def generator_layers(model: ModelConfig, in_channels: int, out_channels: int, h: int, w: int) -> tuple[Layer, ...]:
    """The layers of a generator on a picture of h x w."""
    if model.generator != "resnet":
        return _unet_layers(model, in_channels, out_channels, h, w)
    h, w = (max(-(-side // 4) * 4, 8) for side in (h, w))
    make = _LayerMaker(model, in_channels, h, w)
    ngf = model.ngf
    make.conv("stem", ngf, 7, padding="reflect")
    make.conv("down1", 2 * ngf, 3, stride=2)
    make.conv("down2", 4 * ngf, 3, stride=2)
    for index in range(model.blocks):
        make.conv(f"block{index}.conv1", 4 * ngf, 3, padding="reflect", block=True)
        make.conv(f"block{index}.conv2", 4 * ngf, 3, padding="reflect", block=True, activation=False, residual=True)
    for name, channels in (("up1", 2 * ngf), ("up2", ngf)):
        make.double(name, channels, resize=model.upsample == "resize")
    make.conv("head", out_channels, 7, padding="reflect", norm=False)
    return tuple(make.layers)


def _unet_layers(model: ModelConfig, in_channels: int, out_channels: int, h: int, w: int) -> tuple[Layer, ...]:
    """The layers of a `UnetGenerator`, which runs as plain PyTorch at every level of fusion but the norms'."""
    multiple = int(model.generator.removeprefix("unet_"))
    downs = multiple.bit_length() - 1
    make = _LayerMaker(model, in_channels, -(-h // multiple) * multiple, -(-w // multiple) * multiple)
    widths = [model.ngf * min(2**level, 8) for level in range(downs)]
    for level, width in enumerate(widths):
        make.conv(f"down{level}", width, 4, stride=2, norm=0 < level < downs - 1, bias=not model.affine)
    for level, width in reversed(list(enumerate([out_channels, *widths[:-1]]))):
        make.double(f"up{level}", width, 4, joined=level < downs - 1, norm=level > 0)
    return tuple(make.layers)


def discriminator_layers(model: ModelConfig, in_channels: int, h: int, w: int) -> tuple[Layer, ...]:
    """The layers of a `PatchDiscriminator` or `PixelDiscriminator` on a picture of h x w."""
    make = _LayerMaker(model, in_channels, h, w)
    if model.discriminator == "pixel":
        make.conv("first", model.ndf, 1, norm=False)
        make.conv("second", 2 * model.ndf, 1)
        make.conv("logits", 1, 1, norm=False, activation=False)
        return tuple(make.layers)
    last = model.discriminator_layers
    make.conv("stage0", model.ndf, 4, stride=2, norm=False)
    for stage in range(1, last + 1):
        make.conv(f"stage{stage}", model.ndf * min(2**stage, 8), 4, stride=2 if stage < last else 1)
    make.conv("logits", 1, 4, norm=False, activation=False)
    return tuple(make.layers)


class _LayerMaker:
    """Adds layers one after another and keeps the size they leave."""

    def __init__(self, model: ModelConfig, channels: int, h: int, w: int) -> None:
        self.layers: list[Layer] = []
        self._keras = model.preset == "keras"
        self._affine = self._keras or model.affine
        self._channels, self._h, self._w = channels, h, w

    def conv(
        self, name: str, channels: int, kernel: int, *, stride: int = 1, padding: str = "", norm: bool = True,
        activation: bool = True, residual: bool = False, block: bool = False, bias: bool = True,
    ) -> None:  # fmt: skip
        """A convolution: reflected, else padded by zeros as the preset says; 1x1 has no padding.

        ``bias``: it has one where no norm follows.
        """
        h, w = self._h, self._w
        if padding == "reflect":
            padded, size = (h + kernel - 1, w + kernel - 1), (h, w)
        elif kernel == 1 or not self._keras:
            pad = min(1, kernel - 1)
            padded, size = (h, w), ((h + 2 * pad - kernel) // stride + 1, (w + 2 * pad - kernel) // stride + 1)
        else:
            size = -(-h // stride), -(-w // stride)
            extra = [max((n - 1) * stride + kernel - m, 0) for n, m in zip(size, (h, w), strict=True)]
            padding = "zero" if any(more % 2 for more in extra) else ""
            padded = (h + extra[0], w + extra[1]) if padding else (h, w)
        filters = self._channels * channels * kernel * kernel
        self._add(name, channels, size, padded, filters, filters * size[0] * size[1], padding, norm, activation,
                  residual, block, bias)  # fmt: skip

    def double(
        self,
        name: str,
        channels: int,
        kernel: int = 3,
        *,
        resize: bool = False,
        joined: bool = False,
        norm: bool = True,
    ) -> None:
        """A convolution that doubles both sides, transposed or after a resize.

        ``joined``: of as many channels again from elsewhere.
        """
        past = self._channels * self._h * self._w if joined else 0
        self._channels *= 1 + joined
        filters, positions = self._channels * channels * kernel**2, self._h * self._w
        size, padded, padding = (2 * self._h, 2 * self._w), (self._h, self._w), ""
        if resize:
            positions, padded, padding = 4 * positions, (size[0] + 2, size[1] + 2), "resize"
        macs = filters * positions
        self._add(name, channels, size, padded, filters, macs, padding, norm, True, False, False, True, past)

    def _add(
        self, name: str, channels: int, size: tuple[int, int], padded: tuple[int, int], filters: int, macs: int,
        padding: str, norm: bool, activation: bool, residual: bool, block: bool, bias: bool, joined: int = 0,
    ) -> None:  # fmt: skip
        bias = bias and not (norm and self._affine)
        self.layers.append(
            Layer(
                name,
                flop=2 * macs,
                source=self._channels * self._h * self._w,
                input=self._channels * padded[0] * padded[1],
                output=channels * size[0] * size[1],
                filters=filters,
                vectors=channels * bias + 2 * channels * (norm and self._affine),
                padding=padding,
                bias=bias,
                norm=norm,
                activation=activation,
                residual=residual,
                block=block,
                joined=joined,
            )
        )
        self._channels, self._h, self._w = channels, *size


def _networks(step: Step) -> dict[str, tuple[Layer, ...]]:
    model, h, w = step.model, step.height, step.width
    if model.method == "pix2pix":
        A, B = model.channels_A, model.channels_B
        suffix, source, target = ("A", A, B) if model.direction == "AtoB" else ("B", B, A)
        G, D = generator_layers(model, source, target, h, w), discriminator_layers(model, A + B, h, w)
        return {f"G_{suffix}": G, f"D_{suffix}": D}
    return {
        "G_A": generator_layers(model, model.channels_A, model.channels_B, h, w),
        "G_B": generator_layers(model, model.channels_B, model.channels_A, h, w),
        "D_A": discriminator_layers(model, model.channels_B, h, w),
        "D_B": discriminator_layers(model, model.channels_A, h, w),
    }


def _sum(kernels: Iterable[Kernel]) -> Work:
    total = Work()
    for kernel in kernels:
        total += Work(kernel.flop, kernel.bytes, 1)
    return total


def _neighbours(layers: tuple[Layer, ...]) -> Iterator[tuple[Layer | None, Layer, Layer | None]]:
    """Each layer with the one before it and the one after it."""
    yield from zip((None, *layers[:-1]), layers, (*layers[1:], None), strict=True)


def _forward(one: Pass, step: Step) -> Iterator[Kernel]:
    rule = _forward_eager if step.level in ("i+", "i") else _forward_fused
    for before, layer, after in _neighbours(one.layers):
        for kind, flop, elements in (*_join(layer), *rule(before, layer, after, step.level)):
            yield Kernel(kind, flop * one.pictures, elements * one.pictures * BYTES[step.precision])


def _backward(one: Pass, step: Step) -> Iterator[Kernel]:
    rule = _backward_eager if step.level in ("i+", "i") else _backward_fused
    for before, layer, after in _neighbours(one.layers):
        for kind, flop, elements in (*rule(before, layer, after, step.level), *_part(layer)):
            needless = before is None and not one.input_gradient and kind in ("dgrad", "pad")
            if not needless and (one.weight_gradient or kind not in ("wgrad", "bias")):
                yield Kernel(kind, flop * one.pictures, elements * one.pictures * BYTES[step.precision])


# Below, (kind, FLOP, elements moved) of each kernel for one picture; x is a layer's input, y its output.
_Counts = Iterator[tuple[str, int, int]]


def _join(layer: Layer) -> _Counts:
    """What comes past a level is put beside what comes out of it, and activated there."""
    if layer.joined:
        yield "join", 0, 2 * layer.input
        yield "activation", 0, 2 * layer.joined


def _part(layer: Layer) -> _Counts:
    """The gradient of what comes past a level, added to the one through it."""
    if layer.joined:
        yield "activation", 0, 3 * layer.joined
        yield "sum", 0, 3 * layer.joined


def _forward_eager(before: Layer | None, layer: Layer, after: Layer | None, level: str) -> _Counts:  # noqa: ARG001
    x, y = layer.input, layer.output
    if layer.padding:
        yield "pad", 0, layer.source + x
    yield "conv", layer.flop, x + y
    if layer.bias:
        yield "bias", 0, 2 * y
    if layer.norm:
        yield "norm", 0, y
        yield "norm", 0, 2 * y
    if layer.activation:
        yield "activation", 0, 2 * y
    if layer.residual:
        yield "sum", 0, 3 * y
    if layer.norm and level == "i+":
        yield from [("layout", 0, 2 * y)] * 2


def _backward_eager(before: Layer | None, layer: Layer, after: Layer | None, level: str) -> _Counts:  # noqa: ARG001
    x, y = layer.input, layer.output
    if layer.residual:
        yield "sum", 0, 3 * y  # the stream's gradient: through the block and past it
    if layer.activation:
        yield "activation", 0, 3 * y
    if layer.norm:
        yield "norm", 0, 2 * y
        yield "norm", 0, 3 * y
    if layer.norm and level == "i+":
        yield from [("layout", 0, 2 * y)] * 2
    if layer.bias:
        yield "bias", 0, y
    yield "dgrad", layer.flop, x + y
    yield "wgrad", layer.flop, x + y
    if layer.padding:
        yield "pad", 0, 2 * layer.source + x  # cleared first, then added to


def _forward_fused(before: Layer | None, layer: Layer, after: Layer | None, level: str) -> _Counts:
    y, copied = layer.output, layer.padding in ("zero", "resize") and level != "iii"
    x = layer.source if level == "iii" or before is None else layer.input
    if copied:
        yield "pad", 0, layer.source + layer.input
    # At level iii whoever reads the residual stream adds to it: reads it and the block's norm input, writes it.
    stream = 2 * layer.source if level == "iii" and before is not None and before.residual else 0
    yield "conv", layer.flop, x + stream + y
    if level == "iii":
        return
    if layer.norm:
        reads = (2 if level == "ii" else 1) * y
        yield "norm", 0, reads + (y if layer.residual else 0) + _next_input(layer, after)
    elif layer.activation:
        yield "activation", 0, 2 * y


def _backward_fused(before: Layer | None, layer: Layer, after: Layer | None, level: str) -> _Counts:
    y, gradient = layer.output, _next_input(layer, after)
    if level == "iii":
        # dy is made from the activation's gradient and the norm's input wherever it is read; the input gradient's
        # epilogue reads the norm input before it for the sums, and carries the stream's gradient.
        dy = 2 * y if layer.norm else y
        sums = layer.source if before is not None and before.norm else 0
        stream = 2 * y if layer.residual else 0
        yield "dgrad", layer.flop, dy + layer.source + sums + stream
        yield "wgrad", layer.flop, dy + layer.source
        return
    if layer.norm:
        if level == "ii" or layer.residual:
            yield "norm", 0, y + gradient
        yield "norm", 0, 2 * y + gradient + (2 * y if layer.residual else 0)
    elif layer.activation:
        yield "activation", 0, 3 * y
    x = layer.source if before is None else layer.input
    sums = layer.source if level == "ii+" and before is not None and before.norm and not before.residual else 0
    yield "dgrad", layer.flop, x + y + sums
    yield "wgrad", layer.flop, x + y
    if layer.padding in ("zero", "resize"):
        yield "pad", 0, layer.source + layer.input


def _next_input(layer: Layer, after: Layer | None) -> int:
    """What a fused norm writes: the next convolution's input, reflected already."""
    return after.input if after is not None and after.padding == "reflect" else layer.output


def _kept(before: Layer | None, layer: Layer, after: Layer | None, step: Step) -> int:
    """Elements of one picture kept for this layer's backward pass."""
    in_stream = before is None or not before.block or before.residual  # not inside a block
    raw = layer.source if before is None or before.residual else 0
    source = raw if step.level == "iii" else layer.input
    if step.recompute and layer.block:
        return source if in_stream else 0
    kept = source + (layer.output if layer.norm else 0)
    if layer.activation and (after is None or (step.level in ("i+", "i") and after.padding)):
        kept += layer.output  # not kept as the next input
    return kept
