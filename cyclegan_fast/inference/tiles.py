"""The residual generator over a picture in bands of rows, with the whole picture's statistics in every instance norm.

A norm needs the mean and variance of its whole map before anything after it can run. So the network is walked norm by
norm: a pass over the map computes it band by band, merges the bands' statistics (Chan, Golub and LeVeque 1983), and
either keeps the map or forgets it. Later passes read what was kept and compute again what was forgotten:

    picture -> [stem] -> [half] -> quarter -> blocks -> quarter -> [half] -> [full -> head] -> result

What is in brackets may be forgotten. Every layer is a source of rows (`_Rows`), which on demand asks the layer before
it for the rows that its kernel covers; so a band's border is its neighbours' pixels, and the reflected or zero border
of the reference stands at the picture's border only. The result equals the network over the whole picture to rounding,
whatever the bands. Nothing here depends on the device: maps lie on it, on the host, or in a temporary file.

In units of q = H W / 16 values of 4 ngf channels, the quarter-resolution map, the whole picture at once takes 8 q or
more, bands take 3 q (half-resolution maps kept), 2 q (two quarter-resolution maps) or, with files, none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cyclegan_fast.device import AUTOCAST
from cyclegan_fast.errors import shown as shown_name
from cyclegan_fast.models import reference
from cyclegan_fast.models.reference import InstanceNorm, ResizeConv2d, ResnetBlock, SameConv2d, SameConvTranspose2d
from cyclegan_fast.ops.instance_norm import runs_kernels
from cyclegan_fast.ops.reflect_conv import reflect_conv2d
from cyclegan_fast.progress import Bar

__all__ = [
    "Plan",
    "Progress",
    "as_input",
    "band_bar",
    "can_tile",
    "plan_tiles",
    "row_filters",
    "translate_tiled",
    "whole_bytes",
]

# Called after each band with the bands done, all bands, and the share of the work that is done.
Progress = Callable[[int, int, float], None]

# Seconds before a bar is drawn, and how.
_BAR_AFTER = 3.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"

_LAYERS = (
    *(reference.ReflectionPad2d, nn.Conv2d, SameConv2d, nn.ConvTranspose2d, SameConvTranspose2d),
    *(ResizeConv2d, InstanceNorm, ResnetBlock, nn.ReLU, nn.Tanh),
)

# Elementwise work goes over so many bytes at a time, which stay in the cache from one operation to the next.
_CACHED = 4 * 2**20
# A band's map of ngf channels: large enough for 3x3 convolutions to spread the transform of their weights.
_BAND = 32 * 2**20
_LEAST_TILE = 4
# Maps of a band's chain of layers that are in memory at once, and rows of their halos; by measurement, see the tests.
_BAND_MAPS, _HALO_ROWS = 6, 32


@dataclass(frozen=True)
class Plan:
    """How a picture is cut and what is kept.

    tile: rows of a map computed at a time, at the finest resolution that takes part. kept: maps of 1/kept of the
    picture's side and coarser ones are kept, finer ones computed again (2 or 4). storage: "device", "host" or "file".
    bytes: estimated peak of device memory, without the weights and the picture; host_bytes: of the host's beside that.
    """

    tile: int
    kept: int
    storage: str
    bytes: int
    host_bytes: int = 0


def can_tile(generator: nn.Module) -> bool:
    """Whether `translate_tiled` knows the network: the residual generators of this package, of the layers known here.

    Layers are told by their exact type: one that is derived from a convolution may do more than convolve.
    """
    return isinstance(generator, reference.ResnetGenerator) and all(type(layer) in _LAYERS for layer in generator.model)


def whole_bytes(generator: nn.Module, height: int, width: int, precision: str, device: torch.device) -> int:
    """Estimated peak memory of a translation of one whole picture, without weights; by measurement.

    At the last norm three maps of ngf channels at full size, or what takes as much, are there: its input, its result,
    and what they came from. The reference computes norms in float32 under autocast too.
    """
    reduced = AUTOCAST.get(precision)
    if reduced is None:
        maps = 3 * 4
    else:
        impl = getattr(generator, "impl", "reference")
        fused = impl == "fused" or (impl == "auto" and runs_kernels(device, reduced))
        maps = 3 * 2 if fused else 3 * 4 + 2
    return (
        height * width * (row_filters(generator) * maps + 64)
    )  # and the picture and its result, in float32 and 8 bits


def plan_tiles(
    generator: nn.Module,
    height: int,
    width: int,
    precision: str,
    *,
    limit: int,
    host_limit: int | None = None,
    tile: int | None = None,
) -> Plan:
    """The fastest plan that stays within `limit` bytes on the device, or else the one that takes least.

    host_limit: bytes of the host's memory that maps may take when the device has its own; None where it has not.
    tile: as in `Plan`, chosen here if None. Whether the plan fits is for the caller to check by its ``bytes``.
    """
    row, quarter = _row_bytes(generator, width, precision), _quarter_bytes(generator, height, width, precision)
    tiles = [min(rows, height + _HALO_ROWS) for rows in ([tile] if tile is not None else _tiles(row))]
    result = 9 * height * width * 3  # float32, one more for its 8 bits, and what is finite

    def plan(kept: int, storage: str, rows: int) -> Plan:
        maps = quarter * (3 if kept == 2 else 2)
        working = row * (_BAND_MAPS * rows + _HALO_ROWS) + 3 * min(_CACHED, row * rows) + result
        held = maps if storage == "device" else 0
        return Plan(rows, kept, storage, held + working, maps if storage == "host" else 0)

    plans = [plan(2, "device", tiles[0]), *(plan(4, "device", rows) for rows in tiles)]
    if host_limit is not None:
        plans += [plan(kept, "host", rows) for kept in (2, 4) for rows in tiles]
    plans += [plan(4, "file", rows) for rows in tiles]
    plans = [one for one in plans if one.host_bytes <= (host_limit or 0)]
    return next((one for one in plans if one.bytes <= limit), min(plans, key=lambda one: one.bytes))


def _tiles(row: int) -> list[int]:
    """Rows at a time, from those that run best down to the fewest."""
    best = max(_BAND // row, _LEAST_TILE)
    return [best, *(rows for rows in (best // 2, best // 4, _LEAST_TILE) if _LEAST_TILE <= rows < best)]


def _row_bytes(generator: nn.Module, width: int, precision: str) -> int:
    """A row of a hidden map, which is the same at full, half and quarter size."""
    return (width + 8) * row_filters(generator) * (2 if precision in AUTOCAST else 4)


def _quarter_bytes(generator: nn.Module, height: int, width: int, precision: str) -> int:
    return (height // 4 + 2) * _row_bytes(generator, width, precision)


def row_filters(network: nn.Module) -> int:
    """Filters of a network's first convolution, which stand at full size; 0 without convolutions."""
    return next((weight.shape[0] for weight in network.parameters() if weight.ndim == 4), 0)


@torch.inference_mode()
def translate_tiled(
    generator: nn.Module, picture: Tensor, plan: Plan, *, progress: Progress | None = None, device: torch.device
) -> Tensor:
    """generator(picture) within rounding, in bounded memory.

    picture: [1, in_channels, H, W], uint8 or floating point in [-1, 1], on any device; generator: a ResnetGenerator in
    evaluation mode on `device`, to be called under the autocast that it should run in. Returns [1, out_channels, H, W]
    on `device` in float32 (float64 for float64 weights). Raises ValueError for another network, shape or mode.
    """
    if not isinstance(generator, reference.ResnetGenerator) or not can_tile(generator):
        raise ValueError(
            f"only residual generators of known layers are translated in tiles, not this {type(generator).__name__}"
        )
    if generator.training:
        raise ValueError("the generator is in training mode: call eval() first")
    if picture.ndim != 4 or picture.shape[0] != 1 or picture.shape[1] != generator.in_channels or 0 in picture.shape:
        raise ValueError(f"the picture has shape {list(picture.shape)}, not [1, {generator.in_channels}, H, W]")
    if plan.tile < 1:
        raise ValueError(f"tile = {plan.tile} is not allowed: an integer >= 1")
    count = _Walk(plan, device, None)
    count.run(generator, picture)
    return _Walk(plan, device, count, progress).run(generator, picture)


def as_input(picture: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 or floating point in [-1, 1] as what a network takes on its device."""
    x = picture.to(device)
    return x.to(dtype).div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.to(dtype)


@contextlib.contextmanager
def band_bar(name: str, *, shown: bool = True) -> Iterator[Progress]:
    """What draws a progress bar on standard error for one picture, once that has taken a while."""
    look: dict[str, Any] = {"bar_format": _BAR, "delay": _BAR_AFTER, "leave": False, "dynamic_ncols": True, "unit": "%"}
    with Bar(total=100, desc=shown_name(name), file=sys.stderr, disable=not shown, **look) as bar:

        def step(done: int, bands: int, share: float) -> None:
            bar.set_postfix_str(f"band {done}/{bands}", refresh=False)
            bar.update(round(100 * share, 1) - bar.n)

        yield step


# ---- maps that are kept


class _Map(ABC):
    """A whole map [C, H, W] in the order of its rows, H W C."""

    def __init__(self, channels: int, height: int, width: int, dtype: torch.dtype) -> None:
        self.channels, self.height, self.width, self.dtype = channels, height, width, dtype

    @abstractmethod
    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [1, C, bottom - top, W] on the device; perhaps the map itself, so not to be changed."""

    @abstractmethod
    def write(self, top: int, rows: Tensor) -> None:
        """Replace rows from `top` on."""


class _MemoryMap(_Map):
    """A map in the memory of some device."""

    def __init__(
        self, channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device, where: torch.device
    ) -> None:
        super().__init__(channels, height, width, dtype)
        self._device = device
        self._rows = torch.empty(height, width, channels, dtype=dtype, device=where)

    def read(self, top: int, bottom: int) -> Tensor:
        return self._rows[top:bottom].to(self._device).permute(2, 0, 1)[None]

    def write(self, top: int, rows: Tensor) -> None:
        self._rows[top : top + rows.shape[2]].copy_(rows[0].permute(1, 2, 0))


class _FileMap(_Map):
    """A map in a nameless temporary file, by reads and writes: a mapped file would count as this process's memory."""

    def __init__(self, channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(channels, height, width, dtype)
        self._device = device
        self._row = width * channels * dtype.itemsize
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the map
        os.truncate(self._file.fileno(), height * self._row)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # where it could not be opened
            self._file.close()

    def read(self, top: int, bottom: int) -> Tensor:
        rows = torch.empty(bottom - top, self.width, self.channels, dtype=self.dtype)
        view = _bytes(rows)
        self._file.seek(top * self._row)
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                raise OSError(f"a temporary file in {tempfile.gettempdir()} ended early")
            done += got
        return rows.to(self._device).permute(2, 0, 1)[None]

    def write(self, top: int, rows: Tensor) -> None:
        dense = rows[0].permute(1, 2, 0).contiguous().cpu()
        view = _bytes(dense)
        self._file.seek(top * self._row)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])


def _bytes(rows: Tensor) -> memoryview:
    """The memory of a dense tensor of any type."""
    array: Any = rows.flatten().view(torch.uint8).numpy()
    return memoryview(array)


# ---- layers as sources of rows


class _Rows(ABC):
    """The result of a layer over the whole picture [C, H, W], of which any rows can be had.

    stretch: the most rows at a finer resolution that one row takes on the way; work: multiplications for one row, with
    all that is computed again for it.
    """

    channels: int
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device
    stretch: float = 1.0
    work: float = 0.0

    @abstractmethod
    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [1, C, bottom - top, W] in channels-last order; perhaps what is kept, so not to be changed."""

    def read_into(self, out: Tensor, top: int, bottom: int) -> None:
        """The same, written to a view of a larger tensor."""
        out.copy_(self.read(top, bottom))


class _Picture(_Rows):
    """The picture, extended to a size that the generator takes just as the generator does it."""

    def __init__(self, picture: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self._picture, self.device, self.dtype = picture, device, dtype
        self.channels = picture.shape[1]
        self._y, self._x = _extended(picture.shape[2]), _extended(picture.shape[3])
        self.height, self.width = len(self._y), len(self._x)

    def read(self, top: int, bottom: int) -> Tensor:
        rows = self._y[top:bottom]
        low, high = int(rows.min()), int(rows.max()) + 1
        x = as_input(self._picture[:, :, low:high], self.device, self.dtype)
        if self.height != self._picture.shape[2]:
            x = x[:, :, (rows - low).to(self.device)]
        if self.width != self._picture.shape[3]:
            x = x[:, :, :, self._x.to(self.device)]
        return x


def _extended(size: int) -> Tensor:
    """Which of `size` positions stands at each position of the extended side."""
    positions = torch.arange(size, dtype=torch.float64)[None, None, None]
    return reference.extend(positions, dim=3).flatten().long()


class _Stored(_Rows):
    """A map that was kept."""

    def __init__(self, kept: _Map, device: torch.device) -> None:
        self.map, self.device, self.dtype = kept, device, kept.dtype
        self.channels, self.height, self.width = kept.channels, kept.height, kept.width

    def read(self, top: int, bottom: int) -> Tensor:
        return self.map.read(top, bottom)


class _Convolved(_Rows):
    """A convolution over a reflected or a zero border."""

    def __init__(self, rows: _Rows, conv: nn.Conv2d, reflect: int, bias: bool, dtype: torch.dtype, impl: str) -> None:
        self._rows, self._conv, self._reflects, self._impl = rows, conv, reflect > 0, impl
        self.dtype, self.device = dtype, rows.device
        self._bias = conv.bias if bias else None
        self._size, self._stride = conv.kernel_size[0], conv.stride[0]
        self._border = (reflect, reflect) if reflect else _zeros_around(conv)
        self.channels = conv.out_channels
        grow = sum(self._border) - self._size
        self.height, self.width = ((side + grow) // self._stride + 1 for side in (rows.height, rows.width))
        self.stretch = max(1.0, rows.stretch * self._stride)
        self.work = float(self.width * conv.weight.numel()) + rows.work * self._stride

    def read(self, top: int, bottom: int) -> Tensor:
        before, after = self._border
        low = top * self._stride - before
        high = (bottom - 1) * self._stride - before + self._size
        x = _bordered(self._rows, low, high, before, after, reflect=self._reflects)
        if self._stride == 1:  # for which the package has kernels of its own
            return reflect_conv2d(x, self._conv.weight, self._bias, padding=0, impl=self._impl)
        return F.conv2d(x, self._conv.weight, self._bias, self._stride)


def _zeros_around(conv: nn.Conv2d) -> tuple[int, int]:
    """Zeros before and after each side, which is even where the stride is 2."""
    if isinstance(conv, SameConv2d):  # the odd one stands after
        zeros = conv.kernel_size[0] - conv.stride[0]
        return zeros // 2, zeros - zeros // 2
    return int(conv.padding[0]), int(conv.padding[0])


def _bordered(rows: _Rows, low: int, high: int, left: int, right: int, *, reflect: bool) -> Tensor:
    """Rows `low` to `high` with columns before and after: what lies outside the picture mirrors it, or is zero."""
    top, bottom, width = max(low, 0), min(high, rows.height), rows.width
    shape = (1, rows.channels, high - low, left + width + right)
    x = torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=torch.channels_last)
    columns = slice(left, left + width)
    rows.read_into(x[:, :, top - low : bottom - low, columns], top, bottom)
    for row in (*range(low, top), *range(bottom, high)):
        mirrored = -row if row < 0 else 2 * (rows.height - 1) - row
        _fill(x[:, :, row - low, columns], x[:, :, mirrored - low, columns] if reflect else None)
    for column in (*range(-left, 0), *range(width, width + right)):
        mirrored = -column if column < 0 else 2 * (width - 1) - column
        _fill(x[:, :, :, column + left], x[:, :, :, mirrored + left] if reflect else None)
    return x


def _fill(line: Tensor, other: Tensor | None) -> None:
    if other is None:
        line.zero_()
    else:
        line.copy_(other)


class _Transposed(_Rows):
    """A transposed convolution that doubles both sides, whatever its padding."""

    def __init__(self, rows: _Rows, conv: nn.ConvTranspose2d, bias: bool, dtype: torch.dtype) -> None:
        self._rows, self._conv = rows, conv
        self.dtype, self.device = dtype, rows.device
        self._bias = conv.bias if bias else None
        self._stride, self._padding = conv.stride[0], int(conv.padding[0])
        self.channels = conv.out_channels
        self.height, self.width = rows.height * self._stride, rows.width * self._stride
        self.stretch = max(1.0, rows.stretch / self._stride)
        self.work = (rows.width * conv.weight.numel() + rows.work) / self._stride

    def read(self, top: int, bottom: int) -> Tensor:
        conv, stride, padding = self._conv, self._stride, self._padding
        # Row r is the sum over i of row i of the input with row r + padding - stride i of the kernel.
        low = max(-((conv.kernel_size[0] - 1 - top - padding) // stride), 0)
        high = min((bottom - 1 + padding) // stride + 1, self._rows.height)
        x = self._rows.read(low, high)
        y = F.conv_transpose2d(x, conv.weight, self._bias, stride, (0, padding), (0, int(conv.output_padding[1])))
        first = top + padding - low * stride
        return y[:, :, first : first + bottom - top, : self.width]


class _Doubled(_Rows):
    """Each position as 2 x 2, for the convolution of a `ResizeConv2d`."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self.channels, self.height, self.width = rows.channels, 2 * rows.height, 2 * rows.width
        self.dtype, self.device = rows.dtype, rows.device
        self.stretch, self.work = max(1.0, rows.stretch / 2), rows.work / 2

    def read(self, top: int, bottom: int) -> Tensor:
        low = top // 2
        doubled = ResizeConv2d.resize(self._rows.read(low, (bottom + 1) // 2))
        return doubled[:, :, top - 2 * low : bottom - 2 * low]


class _Normed(_Rows):
    """An instance norm by statistics of the whole map, and ReLU."""

    def __init__(self, rows: _Rows, norm: InstanceNorm, statistics: _Statistics, relu: bool) -> None:
        self.rows, self._relu = rows, relu
        self.channels, self.height, self.width = rows.channels, rows.height, rows.width
        self.dtype, self.device = rows.dtype, rows.device
        self.stretch, self.work = rows.stretch, rows.work
        self._wide = torch.promote_types(rows.dtype, torch.float32)
        mean, scale, bias = statistics.affine(norm, self._wide)
        self._mean, self._scale = mean[:, None, None], scale[:, None, None]
        self._bias = None if bias is None else bias[:, None, None]

    def read(self, top: int, bottom: int) -> Tensor:
        shape = (1, self.channels, bottom - top, self.width)
        out = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        self.read_into(out, top, bottom)
        return out

    def read_into(self, out: Tensor, top: int, bottom: int) -> None:
        raw = self.rows.read(top, bottom)
        for part in _parts(raw):
            self._apply(raw[:, :, part], out[:, :, part])

    def add_to(self, stream: Tensor, top: int, bottom: int) -> Tensor:
        """stream [1, C, bottom - top, W] plus these rows, rounded once."""
        raw, total = self.rows.read(top, bottom), torch.empty_like(stream)
        for part in _parts(raw):
            wide = torch.empty_like(raw[:, :, part], dtype=self._wide)
            self._apply(raw[:, :, part], wide)
            total[:, :, part].copy_(wide.add_(stream[:, :, part]))
        return total

    def _apply(self, raw: Tensor, out: Tensor) -> None:
        # The mean goes first: multiplied out, mean * scale would round away what is small beside it.
        y = out if out.dtype == self._wide else torch.empty_like(raw, dtype=self._wide)
        torch.sub(raw, self._mean, out=y)
        y.mul_(self._scale)
        if self._bias is not None:
            y.add_(self._bias)
        if self._relu:
            y.relu_()
        if y is not out:
            out.copy_(y)


class _Tanh(_Rows):
    """The last activation, in the type in which the picture leaves."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self.channels, self.height, self.width = rows.channels, rows.height, rows.width
        self.dtype, self.device = rows.dtype, rows.device
        self.stretch, self.work = rows.stretch, rows.work

    def read(self, top: int, bottom: int) -> Tensor:
        return self._rows.read(top, bottom).tanh()


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows [1, C, R, W] that the cache holds."""
    step = max(1, _CACHED // max(1, rows[0, :, 0].numel() * rows.element_size()))
    for first in range(0, rows.shape[2], step):
        yield slice(first, min(first + step, rows.shape[2]))


class _Statistics:
    """Mean and variance of each channel of a map that comes in parts: float32 sums, merged in float64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)  # of the deviations from the mean

    def add(self, rows: Tensor) -> None:
        """Take in rows [1, C, R, W]."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        for part in _parts(rows):
            pixels = rows[0, :, part].permute(1, 2, 0).reshape(-1, rows.shape[1])
            # Deviations from about the mean, for their squares to keep the small digits beside a large mean.
            pivot = self.mean.to(wide) if self.count else pixels[: rows.shape[3]].to(wide).mean(0)
            deviations = pixels - pivot
            total = deviations.sum(0).double()
            squares = deviations.mul_(deviations).sum(0).double()
            count = pixels.shape[0]
            self._merge(count, pivot.double() + total / count, squares - total * total / count)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Chan, Golub and LeVeque 1983, equations 2.1."""
        everything = self.count + count
        difference = mean - self.mean
        self.squares += squares.clamp_(min=0) + difference * difference * (self.count * count / everything)
        self.mean += difference * (count / everything)
        self.count = everything

    def affine(self, norm: InstanceNorm, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a norm subtracts, multiplies by and adds, in the type in which it computes."""
        scale = torch.rsqrt(self.squares / max(self.count, 1) + norm.eps)
        if norm.weight is None or norm.bias is None:
            return self.mean.to(wide), scale.to(wide), None
        return self.mean.to(wide), (scale * norm.weight.double()).to(wide), norm.bias.to(wide)


# ---- the walk


class _Walk:
    """One pass over the network's norms; without `count` a dry one, which only counts bands and work."""

    def __init__(self, plan: Plan, device: torch.device, count: _Walk | None, progress: Progress | None = None) -> None:
        self._plan, self._device, self._count, self._progress = plan, device, count, progress
        self.bands, self.work = 0, 0.0
        self._spare: _Map | None = None

    def run(self, generator: reference.ResnetGenerator, picture: Tensor) -> Tensor:
        """The result over the whole picture."""
        weights = next(generator.parameters()).dtype
        dtype = weights
        if torch.is_autocast_enabled(self._device.type) and weights != torch.float64:
            dtype = torch.get_autocast_dtype(self._device.type)
        impl = "reference" if getattr(generator, "impl", "auto") == "reference" else "auto"
        layers = list(generator.model)
        rows: _Rows = _Picture(picture, self._device, weights)
        self._full = rows.height
        reflect = 0
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            normed = isinstance(after, InstanceNorm)  # which subtracts the bias again
            if isinstance(layer, nn.ReflectionPad2d):
                reflect = int(layer.padding[0])
            elif isinstance(layer, nn.ConvTranspose2d):
                rows = _Transposed(rows, layer, not normed, dtype)
            elif isinstance(layer, ResizeConv2d):
                rows = _Convolved(_Doubled(rows), layer, 1, not normed, dtype, impl)
            elif isinstance(layer, nn.Conv2d):
                rows, reflect = _Convolved(rows, layer, reflect, not normed, dtype, impl), 0
            elif isinstance(layer, InstanceNorm):
                rows = self._norm(rows, layer, relu=isinstance(after, nn.ReLU))
            elif isinstance(layer, ResnetBlock):
                rows = self._block(rows, layer, dtype, impl)
            elif isinstance(layer, nn.Tanh):
                rows = _Tanh(rows)
            if not isinstance(layer, ResnetBlock):
                self._spare = None
        height, width = picture.shape[2:]
        return self._result(rows, height, width, torch.promote_types(weights, torch.float32))

    def _norm(self, rows: _Rows, norm: InstanceNorm, *, relu: bool) -> _Normed:
        """The statistics of a map, which is kept on the way if the plan says so, and the norm by them."""
        kept = self._map(rows) if rows.height * self._plan.kept <= self._full else None
        return self._normed(rows, norm, kept, relu)

    def _normed(self, rows: _Rows, norm: InstanceNorm, kept: _Map | None, relu: bool) -> _Normed:
        statistics = _Statistics(rows.channels, self._device)
        behind: tuple[int, Tensor] | None = None
        for top, bottom in self._bands(rows):
            y = rows.read(top, bottom)
            statistics.add(y)
            # One band behind, because the next one may read this one's last row from the map that is replaced.
            if kept is not None and behind is not None:
                kept.write(*behind)
            behind = top, y
        if kept is not None and behind is not None:
            kept.write(*behind)
        return _Normed(rows if kept is None else _Stored(kept, self._device), norm, statistics, relu)

    def _block(self, rows: _Rows, block: ResnetBlock, dtype: torch.dtype, impl: str) -> _Rows:
        """x + the block's result, in place of x; with one more map, which the second convolution overwrites."""
        convs = [layer for layer in block.conv_block if isinstance(layer, nn.Conv2d)]
        norms = [layer for layer in block.conv_block if isinstance(layer, InstanceNorm)]
        stream = rows if isinstance(rows, _Stored) else self._stored(rows)
        y = _Convolved(stream, convs[0], 1, False, dtype, impl)
        inside = self._spare = self._spare or self._map(y)
        hidden = self._normed(y, norms[0], inside, relu=True)
        again = _Convolved(hidden, convs[1], 1, False, dtype, impl)
        residual = self._normed(again, norms[1], inside, relu=False)
        for top, bottom in self._bands(residual):
            stream.map.write(top, residual.add_to(stream.read(top, bottom), top, bottom))
        return stream

    def _stored(self, rows: _Rows) -> _Stored:
        """These rows, kept: in place of what they are made of where that is a map."""
        inside = rows.rows if isinstance(rows, _Normed) else None
        kept = inside.map if isinstance(inside, _Stored) else self._map(rows)
        for top, bottom in self._bands(rows):
            kept.write(top, rows.read(top, bottom))
        return _Stored(kept, self._device)

    def _result(self, rows: _Rows, height: int, width: int, dtype: torch.dtype) -> Tensor:
        y = torch.empty((1, rows.channels, height, width), dtype=dtype, device=self._where(self._device))
        for top, bottom in self._bands(rows):
            bottom = min(bottom, height)
            if top < bottom:
                y[:, :, top:bottom].copy_(rows.read(top, bottom)[:, :, :, :width])
        return y

    def _map(self, like: _Rows) -> _Map:
        shape = (like.channels, like.height, like.width, like.dtype)
        if self._plan.storage == "file" and self._count is not None:
            return _FileMap(*shape, self._device)
        on_host = self._plan.storage == "host"
        return _MemoryMap(*shape, self._device, self._where(torch.device("cpu") if on_host else self._device))

    def _where(self, device: torch.device) -> torch.device:
        """The device, or for a dry walk none."""
        return torch.device("meta") if self._count is None else device

    def _bands(self, rows: _Rows) -> Iterator[tuple[int, int]]:
        """First row and end of each band; a dry walk counts them and makes none."""
        step = max(1, int(self._plan.tile // rows.stretch))
        bands = -(-rows.height // step)
        # What is elementwise counts too: about as much as so many multiplications.
        work = rows.height * (rows.work + 32.0 * rows.width * rows.channels)
        if self._count is None:
            self.bands, self.work = self.bands + bands, self.work + work
            return
        for top in range(0, rows.height, step):
            yield top, min(top + step, rows.height)
            self.bands, self.work = self.bands + 1, self.work + work / bands
            if self._progress is not None:
                self._progress(self.bands, self._count.bands, min(self.work / self._count.work, 1.0))
