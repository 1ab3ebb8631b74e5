"""Hallucination: what a translation has put into a picture and the way back takes for a part of the scene.

With x the source, y = G(x) its translation and r = F(y) the way back, a change that F undoes is style, and explained
by the cycle: the grade of another camera, a film's tint. What stands in y *and* in r, but not in x, is not: the cycle
has accepted it as content. Three things that the plain residual r - x counts, too, are none of it:

* What G has removed. A background that is blurred, as it should be, cannot come back, and is in r - x with all its
  detail; nothing was invented. Detail is therefore compared in r and y with an enlarged or reduced copy of that of x.
* What F has put in, noise and sharp leaves for instance: it is in r, but not in y.
* Grades, which may change the contrast of everything.

A cycle can also hide. Trained on the difference of r and x alone, G learns to write what F needs into y as a faint
pattern (Chu, Zhmoginov and Sandler 2017), so that F can take out again what G has invented, and the residual shows
nothing. A picture that has been saved has lost much of such a pattern; `through_cycle` therefore rounds y to 8 bits and
adds a little noise on the way back (Bashkirova, Usman and Saenko 2019 measure and train against it so), and measures
should be taken of what it returns. Noise costs an honest cycle nothing here, as it is not in y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.metrics import Pictures, Range, as_batch
from cyclegan_fast.evaluation.photographic import shrunk

__all__ = ["Hallucination", "hallucination", "through_cycle"]

_SHORT_SIDE = 256
_LEAST_SIDE = 32
_PIXELS_AT_ONCE = 1 << 19
_WINDOW = 9  # pixels of a level: 81 of them, times 3 channels, say whether two details are the same
_CHANCE = 0.2  # correlations of unrelated details in such windows stay below this
_SEEN = 12 / 255  # a change that is seen at a glance
_ROUNDING = 1 / 255
_NOTHING = (0.1 / 255) ** 2  # power below which there is no detail


@dataclass(frozen=True)
class Hallucination:
    """Of each picture, float64; h and w are its sides, at a short side of at most 256 pixels.

    ``share``: the energy of what was invented and kept over that of all change y - x, 0 to 1; a change of 1 level is
    added to the latter, so that a translation that changes nothing has no share. ``area``: the share of the pixels in
    which it is above 12 levels. ``energy``: its mean square in shares of the range (a PSNR's error). ``map``: its root
    mean square over channels, levels [N, h, w].
    """

    share: Tensor
    area: Tensor
    energy: Tensor
    map: Tensor


def hallucination(
    source: Pictures, translated: Pictures, reconstructed: Pictures, *, value_range: Range = None
) -> Hallucination:
    """What stands in the translation and in the reconstruction, but not in the source.

    Pictures are shrunk to a short side of 256 pixels and parted into the levels of a Laplacian pyramid. At each, the
    change of either picture is what a local gain of the source (least squares in windows of 9 x 9, each channel by
    itself) leaves over; at the coarsest, where brightness and colour are, it is the plain difference, or what one
    affine map of the colours leaves over of it. Of the change u of the reconstruction, min(1, |c| cos / |u|) counts,
    where c is the change of the translation and cos their correlation in the window, less what chance makes. So the
    invented picture is found that both hold, with the lesser of the contrasts that they give it.

    Its limits: something invented that F takes out again is not seen, if F did so by the faint pattern above: see
    `through_cycle`. Something lost is not counted, nor too much contrast of what is there. A copy of the source's own
    texture in the wrong place is. A patch that a grade by chance returns to the colour it covers may be missed.

    All three batches have one shape, with 1 or more channels and sides of 32 pixels or more. Raises InputError.
    """
    names = ("source", "translated", "reconstructed")
    found = [_invented(*part) for part in _parts((source, translated, reconstructed), names, value_range)]
    invented = torch.cat([kept for kept, _ in found])
    change = torch.cat([change for _, change in found])
    square = invented.square().mean(dim=1)
    energy = square.mean(dim=(1, 2))
    return Hallucination(
        share=(energy / (change + _ROUNDING**2)).clamp_max(1),
        area=(square > _SEEN**2).double().mean(dim=(1, 2)),
        energy=energy,
        map=255 * square.sqrt(),
    )


def through_cycle(
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], Tensor],
    source: Tensor,
    *,
    noise: float = 4.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(translated, reconstructed) of pictures in [-1, 1], with nothing hidden between the two.

    ``forward`` and ``backward`` map [N, C, H, W] in [-1, 1], as the generators G and F do. The translation is returned
    as a file of 8 bits holds it; ``backward`` sees it with normal noise of ``noise`` levels besides, drawn by ``seed``
    on the CPU for any device. ``noise=0`` leaves rounding alone, which patterns of a level or more outlive.
    """
    if not 0 <= noise < 128:
        raise InputError(f"noise = {noise!r} is not allowed: a deviation in levels, at least 0 and below 128")
    with torch.no_grad():
        exact = forward(source)
        translated = ((exact.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        draws = torch.randn(translated.shape, generator=torch.Generator().manual_seed(seed))
        seen = (translated + draws.to(translated.device) * (noise / 127.5)).clamp(-1, 1)
        return translated, backward(seen.to(exact.dtype)).float().clamp(-1, 1)


def _invented(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """What was invented and kept [N, C, H, W], and the mean square of the change [N]."""
    change = (y - x).square().mean(dim=(1, 2, 3))
    levels = list(zip(*(_pyramid(picture) for picture in (x, y, r)), strict=True))
    kept = [_kept(_beyond_gain(r, x), _beyond_gain(y, x)) for x, y, r in levels[:-1]]
    x, y, r = levels[-1]
    plain, graded = _kept(r - x, y - x), _kept(r - x, _beyond_grade(y, x))
    result = torch.where(plain.abs() > graded.abs(), plain, graded)
    for detail in reversed(kept):
        result = detail + _enlarged(result, detail)
    return result, change


def _kept(u: Tensor, c: Tensor) -> Tensor:
    """The part of the change u that the change c holds, too."""
    both, own, other = (_local((a * b).mean(dim=1, keepdim=True)) for a, b in ((u, c), (u, u), (c, c)))
    own, other = own.clamp_min(0), other.clamp_min(0)  # differences of sums: 0 may be rounded to less
    cosine = both / (own * other).sqrt().clamp_min(_NOTHING)
    certain = ((cosine - _CHANCE) / (1 - _CHANCE)).clamp_min(0)
    return u * (certain * (other / own.clamp_min(_NOTHING)).sqrt()).clamp_max(1)


def _beyond_gain(y: Tensor, x: Tensor) -> Tensor:
    """What is left of the detail y without its local multiples of the detail x, and of x blurred."""
    soft = _blurred(x)
    return _without(_without(y, x, least=0.0), _without(soft, x))


def _without(y: Tensor, x: Tensor, least: float = -math.inf) -> Tensor:
    """y less its local multiple of x, of a factor not below ``least``."""
    gain = _local(x * y) / _local(x * x).clamp_min(_NOTHING)
    return y - x * gain.clamp_min(least)


def _beyond_grade(y: Tensor, x: Tensor) -> Tensor:
    """What is left of the colours y without the affine map of the colours x that is nearest to them."""
    colours = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).flatten(2)
    gram = colours @ colours.mT / colours.shape[2]
    gram = gram + 1e-6 * torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
    fitted = torch.linalg.solve(gram, colours @ y.flatten(2).mT / colours.shape[2]).mT @ colours
    rest: Tensor = y - fitted.view_as(y)
    return rest


def _local(values: Tensor) -> Tensor:
    """Mean over the window around each place, by running sums: a window of 81 pixels costs what one of 4 would."""
    reach = min(_WINDOW // 2, min(values.shape[2:]) - 2)
    side = 2 * reach + 1
    sums = F.pad(values, (reach + 1, reach, reach + 1, reach), mode="reflect").cumsum(dim=2)
    sums = (sums[:, :, side:] - sums[:, :, :-side]).cumsum(dim=3)
    mean: Tensor = (sums[..., side:] - sums[..., :-side]) / side**2
    return mean


def _blurred(x: Tensor) -> Tensor:
    """Each channel under the window 1 2 1, down and across."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


def _pyramid(batch: Tensor) -> Iterator[Tensor]:
    """Laplacian pyramid down to a short side of 5 to 8 pixels; `_enlarged` puts it together again exactly."""
    while min(batch.shape[2:]) > 8:
        coarse = F.avg_pool2d(batch, 2, ceil_mode=True, count_include_pad=False)
        yield batch - _enlarged(coarse, batch)
        batch = coarse
    yield batch


def _enlarged(coarse: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(coarse, like.shape[2:], mode="bilinear", align_corners=False)


def _parts(batches: tuple[Pictures, ...], names: tuple[str, ...], value_range: Range) -> Iterator[tuple[Tensor, ...]]:
    """The same pictures of each batch, some at a time, shrunk. Raises InputError."""
    for images, name in zip(batches, names, strict=True):
        if getattr(images, "ndim", 0) != 4 or 0 in images.shape:
            as_batch(images, value_range, name)  # says what is wrong
    shapes = [tuple(images.shape) for images in batches]
    for shape, name in zip(shapes, names, strict=True):
        if shape != shapes[0]:
            raise InputError(f"{name} has shape {list(shape)} and source {list(shapes[0])}: they must be the same")
    count, _, height, width = shapes[0]
    if min(height, width) < _LEAST_SIDE:
        raise InputError(f"pictures of {height} x {width} pixels are too small: both sides must have {_LEAST_SIDE}")
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    device = batches[0].device if isinstance(batches[0], Tensor) else "cpu"
    for i in range(0, count, at_once):
        part = (as_batch(b[i : i + at_once], value_range, name) for b, name in zip(batches, names, strict=True))
        yield tuple(shrunk(pictures.to(device), _SHORT_SIDE) for pictures in part)
