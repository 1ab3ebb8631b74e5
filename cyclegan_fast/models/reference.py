"""The networks of CycleGAN in plain PyTorch: the definition that every faster execution is compared with.

Sources: Zhu et al. 2017 (arXiv:1703.10593), section 7.1; the de-facto PyTorch implementation for layer order, padding,
initialisation and state-dict keys (preset ``original``); the Keras example for preset ``keras``, which differs in
biases, affine norms, TensorFlow's "same" padding and initialisation. Names: G_A is the paper's G, G_B its F, D_A its
D_Y, D_B its D_X.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "InstanceNorm",
    "PatchDiscriminator",
    "PixelDiscriminator",
    "ResnetBlock",
    "ResnetGenerator",
    "SpectralNorm",
    "power_iteration",
]


@dataclass(frozen=True)
class _Style:
    """What the presets differ in, initialisation of the last convolution apart."""

    hidden_bias: bool  # bias in the convolutions that a norm follows; it has no effect there
    affine: bool
    eps: float
    same_padding: bool  # TensorFlow's "same" instead of symmetric zero padding
    scale: float  # mean of the affine norms' initial scales


_STYLES = {
    "original": _Style(hidden_bias=True, affine=False, eps=1e-5, same_padding=False, scale=1.0),
    "keras": _Style(hidden_bias=False, affine=True, eps=1e-3, same_padding=True, scale=0.0),
}

# The two halvings need multiples of 4, and the reflection by 1 at a quarter of the size needs 2 positions there.
_SIDE_MULTIPLE = 4
_SIDE_MINIMUM = 8

# PyTorch's batch norm sums channels-last positions one after another in float32 on the CPU: at 256 x 256 positions
# its error is below 2e-5 standard deviations, at 12 megapixels it is beyond 1. Larger maps take the composed form.
_NATIVE_POSITIONS = 256 * 256


class InstanceNorm(nn.Module):
    """Normalise each channel of each picture by its own mean and biased variance (Ulyanov et al. 2016).

    The statistics are always taken from the picture itself, in evaluation too, so there are no running ones; without
    ``affine`` there are no parameters either. x: [N, C, H, W] of any floating dtype, H * W >= 2; the result has x's
    dtype and memory format. Statistics are float32 (float64 for float64 input), also under autocast, which leaves
    PyTorch's own ``instance_norm`` in the reduced dtype.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, channels: int, *, eps: float = 1e-5, affine: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(channels)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        # A compiler fuses the composed form and needs no fixed batch size for it.
        if torch.compiler.is_compiling() or x.shape[2] * x.shape[3] > _NATIVE_POSITIONS:
            return _composed_norm(x.to(dtype), weight, bias, self.eps).to(x.dtype)
        return _native_norm(x, weight, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, affine={self.weight is not None}"


def _composed_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    var, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(var + eps)
    if weight is None or bias is None:
        return y
    return y * weight[:, None, None] + bias[:, None, None]


def _native_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch norm of one picture at a time, which unlike PyTorch's instance norm keeps channels-last order."""
    if weight is None and x.dtype in (torch.float16, torch.bfloat16):
        # Without a float32 weight beside it, a 16-bit input gets 16-bit statistics on the CPU.
        weight = torch.ones(x.shape[1], device=x.device, dtype=torch.float32)
        bias = torch.zeros(x.shape[1], device=x.device, dtype=torch.float32)
    pictures = (x,) if x.shape[0] == 1 else x.split(1)
    normed = [F.batch_norm(p, None, None, weight, bias, training=True, momentum=0.0, eps=eps) for p in pictures]
    return normed[0] if len(normed) == 1 else torch.cat(normed)


class ReflectionPad2d(nn.ReflectionPad2d):
    """Reflection padding whose gradient is deterministic where `torch.use_deterministic_algorithms` asks for it.

    PyTorch's own gradient adds atomically on CUDA, and refuses to run then.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Module gives it
        if input.is_cuda and torch.are_deterministic_algorithms_enabled():
            return _reflect_by_copies(input, *self.padding)
        return super().forward(input)


def _reflect_by_copies(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Reflection padding [N, C, H, W] from slices, whose gradients are sums in a fixed order."""
    for dim, before, after in ((3, left, right), (2, top, bottom)):
        size = x.shape[dim]
        x = torch.cat([x.narrow(dim, 1, before).flip(dim), x, x.narrow(dim, size - 1 - after, after).flip(dim)], dim)
    return x


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" zero padding: ceil(size / stride) outputs, the odd zero right and below."""

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x, self.bias)

    def same(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with this bias instead of its own."""
        top, bottom = _same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        left, right = _same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        if top == bottom and left == right:
            return F.conv2d(x, self.weight, bias, self.stride, (top, left))
        return F.conv2d(F.pad(x, (left, right, top, bottom)), self.weight, bias, self.stride)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConvTranspose2d(nn.ConvTranspose2d):
    """Transposed 3x3 convolution of stride 2 with TensorFlow's "same" padding: the transpose of `SameConv2d`.

    That convolution pads nothing before and one position after, so its transpose, 2H + 1 long, loses the last one.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=2, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size)[:, :, :-1, :-1]


class ResizeConv2d(nn.Conv2d):
    """Nearest-neighbour resize to twice both sides, then a 3x3 convolution over the reflected border.

    A transposed 3x3 convolution of stride 2 reaches some results by one weight and their neighbours by four, and so
    draws checkerboards; here every result is reached by nine (Odena et al. 2016, "Deconvolution and Checkerboard
    Artifacts"). x: [N, C, H, W], H, W >= 1 -> [N, K, 2H, 2W]; weight: [K, C, 3, 3].
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(ReflectionPad2d(1)(self.resize(x)))

    @staticmethod
    def resize(x: Tensor) -> Tensor:
        """Each position as 2 x 2."""
        return F.interpolate(x, scale_factor=2, mode="nearest")


class SpectralNorm(nn.Module):
    """Weights divided by their largest singular value (Miyato et al. 2018, arXiv:1802.05957): a parametrization.

    weight [K, ...] counts as a matrix [K, n]. Its largest singular value is u' W v, where the unit vectors u [K] and
    v [n] are constants for the gradient (eq. 12 of the paper) and follow the weights by `power_iteration`. Unlike in
    `torch.nn.utils.parametrizations.spectral_norm`, whose state-dict keys these are, running a network changes
    nothing: all passes of a training step, however many there are, see the same weights.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, *, iterations: int = 15) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("_u", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("_v", F.normalize(torch.randn_like(matrix[0]), dim=0))
        for _ in range(iterations):
            self.iterate(weight)

    def forward(self, weight: Tensor) -> Tensor:
        # Products and a sum, which autocast leaves in the weights' float32.
        return weight / (self._u[:, None] * weight.flatten(1) * self._v).sum()

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """One step of the power iteration, in place (algorithm 1 of the paper)."""
        matrix = weight.flatten(1)
        self._v.copy_(F.normalize(matrix.T @ self._u, dim=0))
        self._u.copy_(F.normalize(matrix @ self._v, dim=0))


def power_iteration(network: nn.Module) -> None:
    """One step for each weight under `SpectralNorm`; training does it after each step of the optimiser."""
    for module in network.modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], SpectralNorm):
            module[0].iterate(module.original)


class ResnetBlock(nn.Module):
    """x + norm(conv(pad(drop(relu(norm(conv(pad(x)))))))), without an activation after the sum. [N, C, H, W]."""

    def __init__(self, channels: int, style: _Style, *, dropout: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=style.hidden_bias),
            _norm(channels, style),
            nn.ReLU(inplace=True),
        ]
        if dropout:
            layers.append(nn.Dropout(0.5))
        layers += [
            ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=style.hidden_bias),
            _norm(channels, style),
        ]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv_block(x)
        return x + residual


class ResnetGenerator(nn.Module):
    """Residual generator of the paper: 7x7, two halvings, residual blocks, two doublings, 7x7, tanh.

    x: [N, in_channels, H, W] in [-1, 1], any H, W >= 1 -> [N, out_channels, H, W] in [-1, 1]. Sizes that the network
    cannot halve twice or reflect (not a multiple of 4, or below 8) are extended at the bottom and right, by
    reflection where the picture is large enough for it, else by repeating its border, and cropped at the end; every
    other size goes through `model` as it is. State-dict keys are those of the de-facto implementation.

    preset: ``original`` or ``keras``; affine: norms with a scale and a shift for each channel, and no biases before
    them, in preset ``original`` too; gamma: mean of the initial scales, None for the preset's (1, in ``keras`` 0);
    upsample: ``transposed`` or ``resize`` (`ResizeConv2d`, whose weights have the keys of the transposed convolutions
    and the shape of a convolution); init_gain: standard deviation of the normal initialisation, drawn from torch's
    default generator. Raises ValueError for an impossible argument and for an input of another shape.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        ngf: int = 64,
        blocks: int = 9,
        *,
        preset: str = "original",
        affine: bool = False,
        gamma: float | None = None,
        upsample: str = "transposed",
        dropout: bool = False,
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        style = _style(preset, affine, gamma)
        _check_positive(in_channels=in_channels, out_channels=out_channels, ngf=ngf, blocks=blocks)
        self.in_channels = in_channels
        layers: list[nn.Module] = [
            ReflectionPad2d(3),
            nn.Conv2d(in_channels, ngf, 7, bias=style.hidden_bias),
            _norm(ngf, style),
            nn.ReLU(inplace=True),
        ]
        for width in (ngf, 2 * ngf):
            down = _conv(width, 2 * width, 3, 2, style, bias=style.hidden_bias)
            layers += [down, _norm(2 * width, style), nn.ReLU(inplace=True)]
        layers += [ResnetBlock(4 * ngf, style, dropout=dropout) for _ in range(blocks)]
        for width in (2 * ngf, ngf):
            layers += [_double(2 * width, width, style, upsample), _norm(width, style), nn.ReLU(inplace=True)]
        last = nn.Conv2d(ngf, out_channels, 7)
        layers += [ReflectionPad2d(3), last, nn.Tanh()]
        self.model = nn.Sequential(*layers)
        _initialise(self, init_gain, style.scale)
        if preset == "keras":
            # The one convolution of the Keras example that is left to Keras' default, Glorot uniform.
            nn.init.xavier_uniform_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.in_channels, "ResnetGenerator")
        height, width = x.shape[2], x.shape[3]
        extended = extend(extend(x, dim=2), dim=3)
        y = self._layers(extended)
        if extended is x:
            return y
        return y[:, :, :height, :width]

    def _layers(self, x: Tensor) -> Tensor:
        """The network on a size it can take."""
        y: Tensor = self.model(x)
        return y


class PatchDiscriminator(nn.Module):
    """PatchGAN of the paper: `layers` 4x4 convolutions of stride 2, one of stride 1, one to logits (70x70 for 3).

    x: [N, in_channels, H, W] -> logits [N, 1, h, w], without a sigmoid: preset ``original`` gives
    h = H // 2**layers - 2 (30 for 256), ``keras`` gives h = ceil(H / 2**layers) (32 for 256). State-dict keys are
    those of the de-facto implementation. spectral_norm: all weights under `SpectralNorm`, beside the instance norms;
    a weight's key then is, for the first, ``model.0.parametrizations.weight.original``, with its vectors beside it.
    Raises ValueError for an impossible argument, and for an input of another shape or too small to give a logit.
    """

    def __init__(
        self,
        in_channels: int = 3,
        ndf: int = 64,
        layers: int = 3,
        *,
        preset: str = "original",
        affine: bool = False,
        gamma: float | None = None,
        spectral_norm: bool = False,
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        style = _style(preset, affine, gamma)
        _check_positive(in_channels=in_channels, ndf=ndf, layers=layers)
        self.in_channels = in_channels
        self.layers = layers
        self.same_padding = style.same_padding
        stages: list[nn.Module] = [_conv(in_channels, ndf, 4, 2, style, bias=True), nn.LeakyReLU(0.2, inplace=True)]
        width = ndf
        for stage in range(1, layers + 1):
            before, width = width, ndf * min(2**stage, 8)
            conv = _conv(before, width, 4, 2 if stage < layers else 1, style, bias=style.hidden_bias)
            stages += [conv, _norm(width, style), nn.LeakyReLU(0.2, inplace=True)]
        stages.append(_conv(width, 1, 4, 1, style, bias=True))
        self.model = nn.Sequential(*stages)
        _initialise(self, init_gain, style.scale)
        if spectral_norm:
            _normalise_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.in_channels, "PatchDiscriminator")
        self._check_size(x.shape[2], x.shape[3])
        return self._layers(x)

    def _layers(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def _check_size(self, height: int, width: int) -> None:
        if self.same_padding:
            least, usable = 2**self.layers + 1, max(height, width) > 2**self.layers
            need = f"one side of at least {least} pixels"
        else:
            least = 3 * 2**self.layers
            usable, need = min(height, width) >= least, f"sides of at least {least} pixels"
        if not usable:
            raise ValueError(
                f"PatchDiscriminator: a picture of {height} x {width} pixels is too small; {self.layers} layers need "
                f"{need}: use larger pictures or fewer layers"
            )


class PixelDiscriminator(nn.Module):
    """1x1 convolutions only, which judge each pixel by its own colour.

    x: [N, in_channels, H, W] -> logits [N, 1, H, W], without a sigmoid. H * W >= 2. State-dict keys are those of the
    de-facto implementation; spectral_norm as in `PatchDiscriminator`. Raises ValueError for an impossible argument and
    for an input of another shape.
    """

    def __init__(
        self,
        in_channels: int = 3,
        ndf: int = 64,
        *,
        preset: str = "original",
        affine: bool = False,
        gamma: float | None = None,
        spectral_norm: bool = False,
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        style = _style(preset, affine, gamma)
        _check_positive(in_channels=in_channels, ndf=ndf)
        self.in_channels = in_channels
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, ndf, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=style.hidden_bias),
            _norm(2 * ndf, style),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * ndf, 1, 1),
        )
        _initialise(self, init_gain, style.scale)
        if spectral_norm:
            _normalise_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.in_channels, "PixelDiscriminator")
        if x.shape[2] * x.shape[3] < 2:
            raise ValueError("PixelDiscriminator: a picture of 1 x 1 pixel has no variance; use larger pictures")
        return self._layers(x)

    def _layers(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int, style: _Style, *, bias: bool) -> nn.Conv2d:
    """A zero-padded convolution: by 1 on each side, or TensorFlow's "same"."""
    if style.same_padding:
        return SameConv2d(in_channels, out_channels, kernel, stride, bias=bias)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=1, bias=bias)


def _double(in_channels: int, out_channels: int, style: _Style, upsample: str) -> nn.ConvTranspose2d | ResizeConv2d:
    """The convolution that doubles both sides, transposed or after a resize."""
    if upsample == "resize":
        return ResizeConv2d(in_channels, out_channels, bias=style.hidden_bias)
    if upsample != "transposed":
        raise ValueError(f"upsample = {upsample!r} is not known: one of transposed, resize")
    if style.same_padding:
        return SameConvTranspose2d(in_channels, out_channels, bias=style.hidden_bias)
    return nn.ConvTranspose2d(
        in_channels, out_channels, 3, stride=2, padding=1, output_padding=1, bias=style.hidden_bias
    )


def _norm(channels: int, style: _Style) -> InstanceNorm:
    return InstanceNorm(channels, eps=style.eps, affine=style.affine)


def _initialise(network: nn.Module, gain: float, scale: float) -> None:
    """Weights N(0, gain), affine scales N(scale, gain), biases 0."""
    for module in network.modules():
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, InstanceNorm)):
            continue
        if module.weight is not None:
            nn.init.normal_(module.weight, scale if isinstance(module, InstanceNorm) else 0.0, gain)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _normalise_weights(network: nn.Module) -> None:
    """Put the weights of all convolutions under `SpectralNorm`."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d):
            parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))


def extend(x: Tensor, dim: int, multiple: int = _SIDE_MULTIPLE, minimum: int = _SIDE_MINIMUM) -> Tensor:
    """x, or x extended at the end of spatial dimension `dim` (2 or 3) to a multiple and a minimum of positions.

    By reflection where the picture is large enough for it, else by repeating its border. The defaults are what a
    ResnetGenerator needs.
    """
    size = x.shape[dim]
    missing = max(-(-size // multiple) * multiple, minimum) - size
    if missing == 0:
        return x
    padding = (0, 0, 0, missing) if dim == 2 else (0, missing, 0, 0)
    if missing < size:
        reflected: Tensor = ReflectionPad2d(padding)(x)
        return reflected
    return F.pad(x, padding, mode="replicate")


def _style(preset: str, affine: bool = False, gamma: float | None = None) -> _Style:
    """The preset's, with affine norms also where it has none, and then without the biases before them.

    gamma: mean of their initial scales, if not the preset's. Raises ValueError where there are no scales.
    """
    if preset not in _STYLES:
        raise ValueError(f"preset = {preset!r} is not known: one of {', '.join(_STYLES)}")
    style = _STYLES[preset]
    if affine:
        style = replace(style, affine=True, hidden_bias=False)
    if gamma is None:
        return style
    if not style.affine:
        raise ValueError(f"gamma = {gamma} is not possible without affine norms: affine=True or preset='keras'")
    return replace(style, scale=gamma)


def _check_positive(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} = {value} is not allowed: an integer >= 1")


def _check_input(x: Tensor, channels: int, name: str) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{name}: input of shape {tuple(x.shape)} is not [N, {channels}, H, W]")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name}: input of shape {tuple(x.shape)} holds no pixels; H and W must be at least 1")
