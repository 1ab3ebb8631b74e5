"""Figures of a run: loss curves, and labelled grids of inputs, translations and reconstructions.

The notation follows the code, with the paper's beside it where both are shown: G_A (G: A -> B), G_B (F: B -> A), D_A
(D_Y: judges domain B), D_B (D_X: judges domain A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from cyclegan_fast.atomic import replacing
from cyclegan_fast.data.photo import open_photo
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.records import CURVES, Curve, curve_values, generator_terms, loss_records, running_mean
from cyclegan_fast.inference.translate import Translator, load
from cyclegan_fast.training.checkpoint import CheckpointError, find_checkpoint

Picture = Image.Image | npt.NDArray[np.uint8]
Input = str | Path | Image.Image
Floats = npt.NDArray[np.float64]

_INK = (20, 20, 20)
_PALE_INK = (110, 110, 110)
_PAPER = (255, 255, 255)


# Column captions: a line of what it is, and a second, paler one with the formula.
_CYCLE_TITLES = {
    "AtoB": ("Input\nA", "Generated\nG_A(A)", "Reconstructed\nG_B(G_A(A))"),
    "BtoA": ("Input\nB", "Generated\nG_B(B)", "Reconstructed\nG_A(G_B(B))"),
}


def grid(
    rows: Sequence[Sequence[Picture]],
    *,
    column_titles: Sequence[str],
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
    cell: int = 192,
) -> Image.Image:
    """Labelled grid of pictures, RGB on white.

    ``rows`` holds PIL images of any mode, or uint8 arrays [H, W] or [H, W, C] with C of 1 (gray), 2 (gray + alpha), 3
    (RGB) or 4 (RGB + alpha); alpha is laid over white. Each picture is scaled, keeping its aspect ratio, to fit
    ``cell`` x ``cell`` pixels; columns and rows are as wide and as high as what they hold. The lines of a column
    title after its first are set in gray. Titles that do not fit are wrapped, then shortened.

    Raises ValueError when the grid is empty or ragged, when titles and pictures differ in number, for a cell below 16
    pixels, and for arrays of another type or shape.
    """
    row_titles = [""] * len(rows) if row_titles is None else row_titles
    _check_grid(rows, column_titles, row_titles, cell)
    pictures = [[_fit(to_rgb(picture), cell) for picture in row] for row in rows]
    layout = _Layout(
        widths=[max(row[column].width for row in pictures) for column in range(len(column_titles))],
        heights=[max(picture.height for picture in row) for row in pictures],
        gap=max(2, cell // 32),
        label=max(11, round(cell / 13)),
    )
    columns = [
        _lines(text, width, layout.label, most=3) for text, width in zip(column_titles, layout.widths, strict=True)
    ]
    sides = [
        _lines(text, height, layout.label, most=2) for text, height in zip(row_titles, layout.heights, strict=True)
    ]
    heading = _lines(title, layout.inner_width, layout.heading, most=3) if title else []
    layout.left = layout.gap * 2 + _block(sides, layout.label)
    layout.headed = layout.gap * 2 + _block([heading], layout.heading)
    layout.top = layout.headed + _block(columns, layout.label)
    canvas = Image.new("RGB", (layout.left + layout.inner_width + 2 * layout.gap, layout.bottom), _PAPER)
    _draw_text(canvas, heading, layout.heading, layout.left, layout.gap * 2, layout.inner_width, pale_from=len(heading))
    for x, width, lines, text in zip(layout.columns(), layout.widths, columns, column_titles, strict=True):
        first = len(_lines(text.partition("\n")[0], width, layout.label, most=3))
        _draw_text(canvas, lines, layout.label, x, layout.headed, width, pale_from=first)
    for y, height, lines, row in zip(layout.rows(), layout.heights, sides, pictures, strict=True):
        _draw_upright(canvas, lines, layout, y, height)
        for x, width, picture in zip(layout.columns(), layout.widths, row, strict=True):
            canvas.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    return canvas


def progress_figure(
    run: str | Path,
    epochs: Sequence[int],
    inputs: Sequence[Input],
    direction: str = "AtoB",
    *,
    size: int | None = 256,
    cell: int = 192,
    title: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Image.Image:
    """Input | generated after each of ``epochs``, a row an input: how the translation came to be.

    The epochs must be among the run's milestones (``checkpoint.milestones``). Inputs are files or PIL images; those
    with a side longer than ``size`` pixels are shrunk first, near what the networks were trained on (None: translated
    as they are).

    Raises CheckpointError for a run or an epoch that is not there, PhotoError for an unusable input, and InputError
    when there are no inputs or no epochs.
    """
    if not epochs:
        raise InputError("epochs is empty: name at least one epoch")
    if not Path(run).is_dir():
        raise CheckpointError(f"{run} is not a run folder, which alone has the checkpoints of several epochs")
    for epoch in epochs:
        find_checkpoint(Path(run), f"epoch-{epoch}")
    rows: list[list[Picture]] = []
    for epoch in epochs:
        translator = load(run, which=f"epoch-{epoch}", device=device, precision=precision)
        if not rows:
            rows = [[image] for image in _open_inputs(inputs, translator, direction, size)]
        for row in rows:
            row.append(translator.translate(_as_image(row[0]), direction))
    titles = ["Input", *(f"After epoch {epoch}" for epoch in epochs)]
    return grid(rows, column_titles=titles, row_titles=_names(inputs), title=title, cell=cell)


def translation_figure(
    run: str | Path,
    which: str,
    inputs: Sequence[Input],
    direction: str = "AtoB",
    *,
    size: int | None = 256,
    cell: int = 192,
    title: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Image.Image:
    """Input | generated, a row an input; of pictures unlike the training set's, the out-of-domain figure.

    Arguments and errors as in ``cycle_figure``.
    """
    translator = load(run, which=which, device=device, precision=precision)
    images = _open_inputs(inputs, translator, direction, size)
    rows = [[image, translator.translate(image, direction)] for image in images]
    return grid(rows, column_titles=_CYCLE_TITLES[direction][:2], row_titles=_names(inputs), title=title, cell=cell)


def cycle_figure(
    run: str | Path,
    which: str,
    inputs: Sequence[Input],
    direction: str = "AtoB",
    *,
    size: int | None = 256,
    cell: int = 192,
    title: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Image.Image:
    """Input | generated | reconstructed, a row an input.

    ``run`` is a run folder, with ``which`` as in ``find_checkpoint`` (latest, best, epoch-N), or a checkpoint file.
    Inputs and ``size`` as in ``progress_figure``. Raises CheckpointError, PhotoError, and InputError when there are
    no inputs or the direction is neither AtoB nor BtoA.
    """
    translator = load(run, which=which, device=device, precision=precision)
    images = _open_inputs(inputs, translator, direction, size)
    rows = [[image, *translator.cycle(image, direction)] for image in images]
    return grid(rows, column_titles=_CYCLE_TITLES[direction], row_titles=_names(inputs), title=title, cell=cell)


def curves_figure(scalars_jsonl: str | Path, out: str | Path) -> None:
    """Losses of the four networks over the epochs, as a picture or vector file (the format by ``out``'s suffix).

    A generator's loss is the sum of its weighted terms, as each network's loss is reported by the paper:
    G = G_A + cycle_B + idt_A and F = G_B + cycle_A + idt_B, in pix2pix with L1 in place of the last two; terms that a
    run does not have count as 0, and networks that it does not have are left out. Raw values are
    faint, their running mean (1/15 of the curve) is bold, values that are not finite leave a gap and a cross. Where a
    resumed run wrote steps again, the later lines count; lines that are cut off are passed over.

    Raises InputError naming ``scalars_jsonl`` when it is missing or holds no losses, and naming ``out`` when it
    cannot be written.
    """
    records = loss_records(Path(scalars_jsonl))
    epochs = np.array([record["epoch"] for record in records], dtype=np.float64)
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _panel(upper, epochs, records, CURVES[:2])
    _panel(lower, epochs, records, CURVES[2:])
    upper.set_ylabel("Generator loss\n" + " + ".join(generator_terms(records)))
    lower.set_ylabel("Discriminator loss")
    lower.set_xlabel("Epoch")
    lower.set_xlim(0, max(float(epochs.max()), 1e-6))
    lower.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=bool(epochs.max() >= 5)))
    figure.align_ylabels([upper, lower])
    _save_figure(figure, Path(out))


@dataclass
class _Layout:
    """Pixel geometry of a grid; ``left``, ``headed`` and ``top`` follow from the titles."""

    widths: list[int]
    heights: list[int]
    gap: int
    label: int
    left: int = 0
    headed: int = 0
    top: int = 0

    @property
    def heading(self) -> int:
        """Font size of the title."""
        return round(self.label * 1.25)

    @property
    def inner_width(self) -> int:
        return sum(self.widths) + self.gap * (len(self.widths) - 1)

    @property
    def bottom(self) -> int:
        return self.top + sum(self.heights) + self.gap * (len(self.heights) + 1)

    def columns(self) -> list[int]:
        """Left edge of each column."""
        return [self.left + sum(self.widths[:i]) + self.gap * i for i in range(len(self.widths))]

    def rows(self) -> list[int]:
        """Top edge of each row."""
        return [self.top + sum(self.heights[:i]) + self.gap * i for i in range(len(self.heights))]


def _check_grid(
    rows: Sequence[Sequence[Picture]], column_titles: Sequence[str], row_titles: Sequence[str], cell: int
) -> None:
    if not rows or not rows[0]:
        raise ValueError("the grid has no pictures: rows must hold at least one row of at least one picture")
    if cell < 16:
        raise ValueError(f"cell = {cell} is too small: at least 16 pixels")
    for index, row in enumerate(rows):
        if len(row) != len(column_titles):
            raise ValueError(f"row {index} has {len(row)} pictures, but there are {len(column_titles)} column_titles")
    if len(row_titles) != len(rows):
        raise ValueError(f"there are {len(rows)} rows, but {len(row_titles)} row_titles")


def to_rgb(picture: Picture) -> Image.Image:
    """RGB copy of a picture, alpha laid over white."""
    image = _as_image(picture)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (*_PAPER, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _as_image(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (2, 3, 4))
    if array.dtype != np.uint8 or not fits or array.size == 0:
        raise ValueError(
            f"a picture is an array {array.dtype} {list(array.shape)}; "
            "it must be uint8 [H, W] or [H, W, C] with C from 1 to 4"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """Scale to the largest size of the same aspect ratio that fits cell x cell."""
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size == image.size:
        return image
    shrinks = scale < 1
    return image.resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC, reducing_gap=3.0)


@lru_cache(maxsize=32)
def _font_at(size: int, plain: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if plain:
        return ImageFont.load_default(size)
    # Pillow's own font has ASCII only; matplotlib brings one with accents, Greek, Cyrillic and arrows.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), round(size * 0.92))


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return _font_at(size, text.replace("…", "").isascii())


def _fits(line: str, width: int, size: int) -> bool:
    return _font(line, size).getlength(line) <= width


def _lines(text: str, width: int, size: int, most: int) -> list[str]:
    """Break a text into at most ``most`` lines of ``width`` pixels, shortened where that is not enough."""
    lines: list[str] = []
    for part in text.split("\n"):
        words = part.split()
        while words:
            count = next((n for n in range(len(words), 1, -1) if _fits(" ".join(words[:n]), width, size)), 1)
            lines.append(" ".join(words[:count]))
            words = words[count:]
    if len(lines) > most:
        lines[most - 1 :] = [" ".join(lines[most - 1 :])]
    return [_shorten(line, width, size) for line in lines]


def _shorten(line: str, width: int, size: int) -> str:
    """Leave out as much of the middle as does not fit: names often differ at their end."""
    if _fits(line, width, size):
        return line
    for kept in range(len(line) - 1, 1, -1):
        short = f"{line[: (kept + 1) // 2]}…{line[-(kept // 2) :]}"
        if _fits(short, width, size):
            return short
    return "…"


def _leading(size: int) -> int:
    return round(size * 1.3)


def _block(texts: Sequence[Sequence[str]], size: int) -> int:
    """Height of the highest of some texts with the space below it, or 0 if all are empty."""
    most = max(len(lines) for lines in texts)
    return most * _leading(size) + size // 2 if most else 0


def _draw_text(
    canvas: Image.Image, lines: Sequence[str], size: int, x: int, y: int, width: int, *, pale_from: int
) -> None:
    """Centre lines in a box that starts at (x, y)."""
    draw = ImageDraw.Draw(canvas)
    for index, line in enumerate(lines):
        ink = _INK if index < pale_from else _PALE_INK
        place = (x + width / 2, y + (index + 0.5) * _leading(size))
        draw.text(place, line, fill=ink, font=_font(line, size), anchor="mm")


def _draw_upright(canvas: Image.Image, lines: Sequence[str], layout: _Layout, y: int, height: int) -> None:
    """Write a row's title beside it, reading from bottom to top, next to the pictures."""
    if not lines:
        return
    thickness = len(lines) * _leading(layout.label)
    label = Image.new("RGB", (height, thickness), _PAPER)
    _draw_text(label, lines, layout.label, 0, 0, height, pale_from=len(lines))
    turned = label.transpose(Image.Transpose.ROTATE_90)
    canvas.paste(turned, (layout.left - layout.label // 2 - thickness, y))


def _open_inputs(
    inputs: Sequence[Input], translator: Translator, direction: str, size: int | None
) -> list[Image.Image]:
    """The inputs with the channels that the translator takes, no side longer than ``size``."""
    if not inputs:
        raise InputError("inputs is empty: name at least one picture")
    channels = translator.channels(direction)[0]
    images = []
    for item in inputs:
        image = item if isinstance(item, Image.Image) else open_photo(item, channels).image
        images.append(image if size is None or max(image.size) <= size else _fit(image, size))
    return images


def _names(inputs: Sequence[Input]) -> list[str]:
    return ["" if isinstance(item, Image.Image) else Path(item).stem for item in inputs]


def _panel(axes: Axes, epochs: Floats, records: Sequence[dict[str, Any]], curves: Sequence[Curve]) -> None:
    """Draw some curves, with a vertical range that a few outliers cannot stretch."""
    shown: list[Floats] = []
    lost: list[Floats] = []
    window = max(1, len(epochs) // 15)
    for curve in [curve for curve in curves if any(curve.terms[0] in record for record in records)] or curves:
        values = curve_values(records, curve)
        smooth = running_mean(values, window)
        finite = np.isfinite(values)
        dots = "o" if finite.sum() < 20 else None
        axes.plot(epochs, np.where(finite, values, np.nan), color=curve.color, alpha=0.25, linewidth=0.7)
        axes.plot(
            epochs,
            smooth,
            color=curve.color,
            linewidth=1.9,
            label=curve.label,
            marker=dots,
            markersize=3.5,
            clip_on=dots is None,
        )
        shown.append(values[finite])
        has = np.array([curve.terms[0] in record for record in records])
        lost.append(epochs[has & ~finite])
    low, high = _limits(np.concatenate(shown))
    crosses = np.unique(np.concatenate(lost))
    if len(crosses):
        axes.plot(crosses, np.full(len(crosses), low), "x", color="black", clip_on=False, label="not finite", zorder=5)
    axes.set_ylim(low, high)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", ncols=3, frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)


def _limits(values: Floats) -> tuple[float, float]:
    if not len(values):
        return 0.0, 1.0
    low, high = (float(limit) for limit in np.quantile(values, (0.005, 0.995)))
    low = min(0.0, low * 1.1)
    high = high + 0.22 * (high - low)  # room for the legend
    return (low, high) if high > low else (low, low + 1.0)


def _save_figure(figure: Figure, out: Path) -> None:
    """Write whole or not at all."""
    kind = out.suffix.lower().lstrip(".")
    allowed = sorted(figure.canvas.get_supported_filetypes())
    if kind not in allowed:
        raise InputError(
            f"{out}: cannot write a figure of type {kind or '(no suffix)'!r}; use one of {', '.join(allowed)}"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            figure.savefig(temporary, format=kind, dpi=200)
    except OSError as error:
        raise InputError(f"cannot write the figure {out}: {error.strerror or error}") from error
