"""Loss curves and picture grids: what they show is read back from the drawn objects and the pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from cyclegan_fast.config import from_dict, to_dict
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation import figures
from cyclegan_fast.evaluation.figures import curves_figure, cycle_figure, grid, progress_figure, translation_figure
from cyclegan_fast.evaluation.records import running_mean
from cyclegan_fast.inference.translate import load
from cyclegan_fast.models import build_generators
from cyclegan_fast.training.checkpoint import CheckpointError, milestone_path, step_path, write_checkpoint

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def box(image: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom (exclusive) of the pixels of exactly this colour."""
    hit = (np.asarray(image) == np.array(color, np.uint8)).all(axis=2)
    if not hit.any():
        return None
    ys, xs = np.nonzero(hit)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def solid(color: tuple[int, ...], width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), color)


def size_of(image: Image.Image, color: tuple[int, int, int]) -> tuple[int, int]:
    found = box(image, color)
    assert found is not None
    return found[2] - found[0], found[3] - found[1]


def test_pictures_are_fitted_with_their_aspect_ratio() -> None:
    rows = [[solid(RED, 400, 300), solid(GREEN, 30, 60)], [solid(BLUE, 64, 64), solid((9, 9, 9), 640, 10)]]
    image = grid(rows, column_titles=["one", "two"], row_titles=["a", "b"], cell=64)
    assert image.mode == "RGB"
    assert size_of(image, RED) == (64, 48)
    assert size_of(image, GREEN) == (32, 64)
    assert size_of(image, BLUE) == (64, 64)
    assert size_of(image, (9, 9, 9)) == (64, 1)


def test_pictures_stand_in_their_cells_apart_from_each_other() -> None:
    rows = [[solid(RED, 8, 8), solid(GREEN, 8, 4)], [solid(BLUE, 4, 8), solid((9, 9, 9), 8, 8)]]
    image = grid(rows, column_titles=["one", "two"], cell=64)
    red, green, blue, dark = (box(image, color) for color in (RED, GREEN, BLUE, (9, 9, 9)))
    assert red
    assert green
    assert blue
    assert dark
    assert red[2] < green[0]
    assert red[3] < blue[1]
    assert green[0] == dark[0]
    assert (red[0] + red[2]) == (blue[0] + blue[2])  # centred in one column
    assert (red[1] + red[3]) == (green[1] + green[3])  # centred in one row


def ink(image: Image.Image, part: tuple[int, int, int, int]) -> bool:
    return bool((np.asarray(image.crop(part)) < 128).any())


def test_titles_are_written_where_they_belong() -> None:
    rows = [[solid(RED, 64, 64), solid(GREEN, 64, 64)]]
    titled = grid(rows, column_titles=["left", ""], row_titles=["row"], cell=64)
    red, green = box(titled, RED), box(titled, GREEN)
    assert red
    assert green
    assert ink(titled, (red[0], 0, red[2], red[1]))
    assert not ink(titled, (green[0], 0, green[2], green[1]))
    assert ink(titled, (0, red[1], red[0], red[3]))
    bare = grid(rows, column_titles=["", ""], cell=64)
    corner = box(bare, RED)
    assert corner
    assert not ink(bare, (0, 0, bare.width, corner[1]))
    assert bare.width < titled.width
    assert bare.height < titled.height
    headed = grid(rows, column_titles=["", ""], title="All of them", cell=64)
    corner = box(headed, RED)
    assert corner
    assert ink(headed, (corner[0], 0, headed.width, corner[1]))


@pytest.mark.parametrize("text", ["word " * 30, "x" * 300, "naïve → Größe " * 9], ids=["words", "one word", "accents"])
def test_long_titles_stay_inside(text: str) -> None:
    image = grid([[solid(RED, 64, 64)]], column_titles=[text], row_titles=[text], title=text, cell=64)
    assert image.height < 64 * 4
    red = box(image, RED)
    assert red
    assert not ink(image, (red[2] + 1, 0, image.width, image.height))
    assert size_of(image, RED) == (64, 64)


def test_text_is_shortened_in_the_middle() -> None:
    (short,) = figures._lines("IMG_20240101_flower_of_the_garden_0017", 120, 14, most=1)
    assert short.startswith("IMG")
    assert "…" in short
    assert short.endswith("17")
    assert figures._font(short, 14).getlength(short) <= 120
    assert figures._lines("After epoch 50", 300, 14, most=3) == ["After epoch 50"]
    assert figures._lines("Generated\nG_A(A)", 300, 14, most=3) == ["Generated", "G_A(A)"]


@pytest.mark.parametrize(
    ("picture", "color"),
    [
        (solid((77,), 8, 8, "L"), (77, 77, 77)),
        (solid((77, 255), 8, 8, "LA"), (77, 77, 77)),
        (solid((10, 20, 30, 255), 8, 8, "RGBA"), (10, 20, 30)),
        (solid((10, 20, 30), 8, 8).quantize(4), (10, 20, 30)),
        (np.full((8, 8), 77, np.uint8), (77, 77, 77)),
        (np.full((8, 8, 1), 77, np.uint8), (77, 77, 77)),
        (np.full((8, 8, 2), (77, 255), np.uint8), (77, 77, 77)),
        (np.full((8, 16, 3), (10, 20, 30), np.uint8)[:, ::2], (10, 20, 30)),
        (np.full((8, 8, 4), (10, 20, 30, 255), np.uint8), (10, 20, 30)),
    ],
    ids=["L", "LA", "RGBA", "P", "HW", "HW1", "HW2", "HW3 sliced", "HW4"],
)
def test_kinds_of_pictures(picture: Image.Image | np.ndarray, color: tuple[int, int, int]) -> None:
    assert size_of(grid([[picture]], column_titles=[""], cell=32), color) == (32, 32)


def test_transparent_pixels_are_white() -> None:
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = (255, 0, 0, 255)
    image = grid([[clear]], column_titles=[""], cell=32)
    assert box(image, (0, 0, 0)) is None
    width, height = size_of(image, RED)
    assert width == 32
    assert 12 <= height <= 16  # the edge is blended by the enlargement


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {"column_titles": []}, "no pictures"),
        ([[]], {"column_titles": []}, "no pictures"),
        ([[solid(RED, 8, 8)]], {"column_titles": ["a", "b"]}, "row 0 has 1 pictures, but there are 2 column_titles"),
        ([[solid(RED, 8, 8)]], {"column_titles": ["a"], "row_titles": ["b", "c"]}, "1 rows, but 2 row_titles"),
        ([[solid(RED, 8, 8)]], {"column_titles": ["a"], "cell": 3}, "cell = 3"),
        ([[np.zeros((8, 8, 3))]], {"column_titles": ["a"]}, r"array float64 \[8, 8, 3\]"),
        ([[np.zeros((8, 8, 5), np.uint8)]], {"column_titles": ["a"]}, r"array uint8 \[8, 8, 5\]"),
    ],
)
def test_grids_that_make_no_sense_are_refused(rows: list, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(rows, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after epochs 1, 2 and 5, the last of them the latest, each with other weights."""
    folder = tmp_path_factory.mktemp("runs") / "flowers"
    config = from_dict({"model": {"ngf": 4, "blocks": 1, "init_gain": 0.3}})
    for epoch in (1, 2, 5):
        torch.manual_seed(epoch)
        G_A, G_B = build_generators(config.model)
        content = {"config": to_dict(config), "position": {"step": epoch, "epoch": epoch}}
        content |= {"G_A": G_A.state_dict(), "G_B": G_B.state_dict()}
        write_checkpoint(milestone_path(folder, epoch), content)
    write_checkpoint(step_path(folder, 5), content)
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What figures hand to ``grid``, which still draws it."""
    calls: list[dict[str, Any]] = []

    def recorded(rows: list, **options: Any) -> Image.Image:
        calls.append({"rows": rows, **options})
        return grid(rows, **options)

    monkeypatch.setattr(figures, "grid", recorded)
    return calls


def flower(path: Path, width: int = 24, height: int = 16) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


EXACT = {"device": "cpu", "precision": "fp32", "cell": 32}


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_progress_figure(run: Path, tmp_path: Path, shown: list, direction: str) -> None:
    path = flower(tmp_path / "rose.png")
    memory = Image.open(path).rotate(90, expand=True)
    image = progress_figure(run, [1, 5], [path, memory], direction, title="So far", **EXACT)
    assert isinstance(image, Image.Image)
    (call,) = shown
    assert call["column_titles"] == ["Input", "After epoch 1", "After epoch 5"]
    assert call["row_titles"] == ["rose", ""]
    assert call["title"] == "So far"
    for row, source in zip(call["rows"], (Image.open(path), memory), strict=True):
        assert row[0].tobytes() == source.tobytes()
        for picture, epoch in zip(row[1:], (1, 5), strict=True):
            want = load(run, which=f"epoch-{epoch}", device="cpu", precision="fp32").translate(source, direction)
            assert picture.tobytes() == want.tobytes()


def test_cycle_and_translation_figures(run: Path, tmp_path: Path, shown: list) -> None:
    path = flower(tmp_path / "rose.png")
    cycle_figure(run, "latest", [path], "BtoA", **EXACT)
    translation_figure(run, "epoch-2", [path], "AtoB", **EXACT)
    cycle, translation = shown
    assert cycle["column_titles"] == ("Input\nB", "Generated\nG_B(B)", "Reconstructed\nG_A(G_B(B))")
    generated, reconstructed = load(run, device="cpu", precision="fp32").cycle(Image.open(path), "BtoA")
    assert [item.tobytes() for item in cycle["rows"][0][1:]] == [generated.tobytes(), reconstructed.tobytes()]
    assert translation["column_titles"] == ("Input\nA", "Generated\nG_A(A)")
    want = load(run, which="epoch-2", device="cpu", precision="fp32").translate(Image.open(path))
    assert translation["rows"][0][1].tobytes() == want.tobytes()


def test_large_inputs_are_shrunk_unless_told(run: Path, tmp_path: Path, shown: list) -> None:
    path = flower(tmp_path / "wide.png", 64, 32)
    cycle_figure(run, "latest", [path], size=16, **EXACT)
    cycle_figure(run, "latest", [path], size=None, **EXACT)
    cycle_figure(run, "latest", [path], size=64, **EXACT)
    assert [call["rows"][0][1].size for call in shown] == [(16, 8), (64, 32), (64, 32)]


def test_figures_of_what_is_not_there(run: Path, tmp_path: Path) -> None:
    path = flower(tmp_path / "rose.png")
    with pytest.raises(CheckpointError, match="epoch-3"):
        progress_figure(run, [1, 3], [path], **EXACT)
    with pytest.raises(CheckpointError, match="is not a run folder"):
        progress_figure(step_path(run, 5), [1], [path], **EXACT)
    with pytest.raises(InputError, match="epochs is empty"):
        progress_figure(run, [], [path], **EXACT)
    with pytest.raises(InputError, match="inputs is empty"):
        cycle_figure(run, "latest", [], **EXACT)
    with pytest.raises(InputError, match="direction 'A'"):
        cycle_figure(run, "latest", [path], "A", **EXACT)
    with pytest.raises(ValueError, match=r"gone\.jpg"):
        cycle_figure(run, "latest", [tmp_path / "gone.jpg"], **EXACT)


LOSSES = {"G_A": 0.25, "G_B": 0.5, "cycle_A": 2.0, "cycle_B": 1.0, "idt_A": 0.125, "idt_B": 4.0, "D_A": 0.2, "D_B": 0.3}


def write_scalars(path: Path, records: list[dict[str, Any]], rest: str = "") -> Path:
    lines = [json.dumps({"time": 0.0, "lr": 2e-4, **record}) + "\n" for record in records]
    path.write_text("".join(lines) + rest, encoding="utf-8")
    return path


def record(step: int, factor: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, **{name: value * factor for name, value in LOSSES.items()}, **more}


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Figure]:
    """Draws the curves of a file and gives the matplotlib figure."""
    made: list[Figure] = []

    class Recorded(Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figures, "Figure", Recorded)

    def draw(path: Path) -> Figure:
        curves_figure(path, tmp_path / "curves.png")
        return made[-1]

    return draw


def raw_curves(figure: Figure) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(epochs, raw values) by network: raw lines are unlabelled and precede their labelled means."""
    result = {}
    for axes in figure.axes:
        lines = axes.get_lines()
        for raw, mean in zip(lines[::2], lines[1::2], strict=False):
            name = str(mean.get_label()).partition("$")[2].partition("$")[0]
            result[name] = (np.asarray(raw.get_xdata()), np.asarray(raw.get_ydata()))
    return result


def test_curves_are_the_losses_of_each_network(tmp_path: Path, drawn: Callable[[Path], Figure]) -> None:
    figure = drawn(write_scalars(tmp_path / "s.jsonl", [record(10), record(20, 2.0)]))
    curves = raw_curves(figure)
    assert list(curves) == ["G_A", "G_B", "D_A", "D_B"]
    assert curves["G_A"][0].tolist() == [1.0, 2.0]
    sums = {"G_A": 0.25 + 1.0 + 0.125, "G_B": 0.5 + 2.0 + 4.0, "D_A": 0.2, "D_B": 0.3}
    for name, value in sums.items():
        assert curves[name][1] == pytest.approx([value, 2 * value])
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert labels == [
        r"$G_A$  ($G$: A → B)",
        r"$G_B$  ($F$: B → A)",
        r"$D_A$  ($D_Y$: judges B)",
        r"$D_B$  ($D_X$: judges A)",
    ]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1440, 1040)


def test_later_lines_count_after_a_resume(tmp_path: Path, drawn: Callable[[Path], Figure]) -> None:
    # Killed after step 40, resumed from step 20 with other steps between the records, killed again at once.
    records = [record(10), record(20), record(30), record(40), record(20, 3.0), record(25, 3.0)]
    epochs, values = raw_curves(drawn(write_scalars(tmp_path / "s.jsonl", records)))["D_A"]
    assert epochs.tolist() == [1.0, 2.0, 2.5]
    assert values == pytest.approx([0.2, 0.6, 0.6])


def test_measures_on_lines_of_their_own_leave_no_gaps(tmp_path: Path, drawn: Callable[[Path], Figure]) -> None:
    measured = [{"step": step, "epoch": step / 10, "test_cycle": 0.1} for step in (10, 15)]
    records = [record(10), *measured, record(20)]
    epochs, values = raw_curves(drawn(write_scalars(tmp_path / "s.jsonl", records)))["G_A"]
    assert epochs.tolist() == [1.0, 2.0]
    assert np.isfinite(values).all()


@pytest.mark.parametrize("rest", ['{"step": 30, "epoch": 3.0, "G_', "\x00\x00", "[1, 2]\n", '{"G_A": 1}\n', "\n\n"])
def test_lines_that_are_no_records_are_passed_over(tmp_path: Path, drawn: Callable[[Path], Figure], rest: str) -> None:
    epochs, _ = raw_curves(drawn(write_scalars(tmp_path / "s.jsonl", [record(10), record(20)], rest)))["D_B"]
    assert epochs.tolist() == [1.0, 2.0]


def test_terms_that_a_run_lacks(tmp_path: Path, drawn: Callable[[Path], Figure]) -> None:
    records = [record(step) for step in (10, 20)]
    for item in records:
        del item["idt_A"], item["idt_B"]
    figure = drawn(write_scalars(tmp_path / "s.jsonl", records))
    assert raw_curves(figure)["G_A"][1] == pytest.approx([1.25, 1.25])
    assert figure.axes[0].get_ylabel() == "Generator loss\nadversarial + cycle"
    whole = drawn(write_scalars(tmp_path / "s.jsonl", [record(10)]))
    assert whole.axes[0].get_ylabel() == "Generator loss\nadversarial + cycle + identity"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_values_that_are_not_finite_leave_a_gap_and_a_cross(
    tmp_path: Path, drawn: Callable[[Path], Figure], value: float | None
) -> None:
    records = [record(10), record(20, cycle_B=value), record(30)]
    figure = drawn(write_scalars(tmp_path / "s.jsonl", records))
    curves = raw_curves(figure)
    assert np.isfinite(curves["G_A"][1]).tolist() == [True, False, True]
    assert np.isfinite(curves["G_B"][1]).all()
    crosses = [line for line in figure.axes[0].get_lines() if line.get_label() == "not finite"]
    assert [line.get_xdata().tolist() for line in crosses] == [[2.0]]  # type: ignore[union-attr]
    assert all(line.get_label() != "not finite" for line in figure.axes[1].get_lines())


def test_runs_of_every_length(tmp_path: Path, drawn: Callable[[Path], Figure]) -> None:
    for count in (1, 2, 19, 400):
        figure = drawn(write_scalars(tmp_path / "s.jsonl", [record(step) for step in range(1, count + 1)]))
        assert figure.axes[1].get_xlim() == (0, pytest.approx(count / 10))
    broken = {name: float("nan") for name in LOSSES}
    drawn(write_scalars(tmp_path / "s.jsonl", [{**record(1), **broken}]))


def test_one_outlier_does_not_flatten_the_rest(tmp_path: Path, drawn: Callable[[Path], Figure]) -> None:
    records = [record(step, 1e6 if step == 500 else 1.0) for step in range(1, 1001)]
    figure = drawn(write_scalars(tmp_path / "s.jsonl", records))
    low, high = figure.axes[1].get_ylim()
    assert low == 0
    assert 0.3 < high < 0.6


def test_running_mean() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.5, 1.5, np.nan, 6.5, 6.5])
    np.testing.assert_allclose(running_mean(values, 1), values)
    np.testing.assert_allclose(running_mean(values[:2], 9), [1.5, 1.5])


def test_vector_formats_and_folders_are_made(tmp_path: Path) -> None:
    scalars = write_scalars(tmp_path / "s.jsonl", [record(10)])
    curves_figure(scalars, tmp_path / "new" / "curves.pdf")
    assert (tmp_path / "new" / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["curves.pdf"]


def test_curves_that_cannot_be_drawn_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the scalars .*gone\.jsonl"):
        curves_figure(tmp_path / "gone.jsonl", tmp_path / "c.png")
    empty = write_scalars(tmp_path / "empty.jsonl", [{"step": 1, "epoch": 0.1, "test_cycle": 1.0}])
    with pytest.raises(InputError, match=r"empty\.jsonl holds no losses"):
        curves_figure(empty, tmp_path / "c.png")
    scalars = write_scalars(tmp_path / "s.jsonl", [record(10)])
    with pytest.raises(InputError, match=r"c\.xyz: cannot write a figure of type 'xyz'"):
        curves_figure(scalars, tmp_path / "c.xyz")
    with pytest.raises(InputError, match=r"cannot write the figure .*s\.jsonl.c\.png"):
        curves_figure(scalars, scalars / "c.png")


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    curves_figure(write_scalars(tmp_path / "s.jsonl", [record(10)]), tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before


def test_real_photographs(run: Path, real_photos: Path) -> None:
    inputs: list[Any] = [real_photos / name for name in ("iphone2dslr_flower/testA/0005.jpg", "awkward/gray.jpg")]
    image = cycle_figure(run, "latest", inputs, device="cpu", precision="fp32")
    colors = image.getcolors(1 << 24)
    assert colors is not None
    assert len(colors) > 1000
