"""Translation of photographs from files to files."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from tiny_models import noise, picture, translator

from cyclegan_fast.data.photo import Original, PhotoError, open_photo
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference import files as module
from cyclegan_fast.inference import translate
from cyclegan_fast.inference.files import Result, translate_files
from cyclegan_fast.inference.translate import Translator

EXIF_ORIENTATION, EXIF_MAKE = 0x0112, 0x010F


def run_files(inputs: list[str | Path], out: Path, model: Translator | None = None, **options: object) -> Result:
    return translate_files(model or translator(), inputs, out, progress=False, **options)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_keep_size_metadata_and_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION], exif[EXIF_MAKE] = 6, "Camera works"
    source = tmp_path / "in" / "side.jpg"
    source.parent.mkdir()
    Image.fromarray(noise(12, 20)).save(source, exif=exif)
    result = run_files([source], tmp_path / "out")
    assert result == Result([tmp_path / "out" / "side.jpg"], [])
    with Image.open(tmp_path / "out" / "side.jpg") as written:
        assert written.size == (12, 20)
        assert written.getexif()[EXIF_MAKE] == "Camera works"
        assert written.getexif().get(EXIF_ORIENTATION, 1) == 1


def test_files_hold_the_translation(tmp_path: Path) -> None:
    source = picture(tmp_path / "a.png")
    run_files([source], tmp_path / "out", truncate=True, direction="BtoA")
    written = np.asarray(open_photo(tmp_path / "out" / "a.png").image)
    want = translator().translate(np.asarray(Image.open(source)), "BtoA", truncate=True)
    np.testing.assert_array_equal(written, want)


def test_formats_are_kept_where_they_can_be(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a.JPG", "b.png", "c.webp", "d.tif", "e.bmp", "f.ppm"):
        picture(folder / name)
    pillow_heif.from_pillow(Image.fromarray(noise(12, 20))).save(folder / "g.HEIC")
    result = run_files([folder], tmp_path / "out", suffix="_B")
    assert result.failed == []
    assert names(tmp_path / "out") == ["a_B.JPG", "b_B.png", "c_B.webp", "d_B.tif", "e_B.bmp", "f_B.png", "g_B.jpg"]
    for path in result.done:
        with Image.open(path) as written:
            assert written.size == (20, 12)
    with Image.open(tmp_path / "out" / "g_B.jpg") as written:
        assert written.format == "JPEG"


def test_format_can_be_chosen(tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg")
    run_files([source], tmp_path / "out", format="png")
    with Image.open(tmp_path / "out" / "a.png") as written:
        assert written.format == "PNG"


def test_quality_reaches_the_file(tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg", 64, 64)
    for quality in (20, 95):
        run_files([source], tmp_path / str(quality), quality=quality)
    low, high = ((tmp_path / str(quality) / "a.jpg").stat().st_size for quality in (20, 95))
    assert low < 0.7 * high


def test_alpha_is_kept_in_a_format_that_has_it(tmp_path: Path) -> None:
    source = picture(tmp_path / "a.jpg")
    result = run_files([source], tmp_path / "out", translator(3, 4))
    assert result.done == [tmp_path / "out" / "a.png"]
    with Image.open(result.done[0]) as written:
        assert written.mode == "RGBA"


def test_bad_files_do_not_stop_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    picture(folder / "a.png")
    (folder / "b.jpg").write_text("no picture")
    (folder / "c.png").write_bytes(b"")
    whole = picture(folder / "d.png").read_bytes()
    (folder / "d.png").write_bytes(whole[: len(whole) // 2])
    picture(folder / "e.png")
    result = run_files([folder, tmp_path / "missing.jpg"], tmp_path / "out")
    assert names(tmp_path / "out") == ["a.png", "e.png"]
    assert sorted(path.name for path, _ in result.failed) == ["b.jpg", "c.png", "d.png", "missing.jpg"]
    reasons = {path.name: reason for path, reason in result.failed}
    assert reasons["missing.jpg"] == "no such file or folder"
    assert "0 bytes" in reasons["c.png"]
    assert str(folder) not in reasons["b.jpg"]  # the path stands beside the reason already


def test_a_picture_too_large_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = picture(tmp_path / "large.png", 40, 40), picture(tmp_path / "small.png", 8, 8)
    monkeypatch.setattr(translate, "available_memory", lambda _: 20_000)
    result = run_files([large, small], tmp_path / "out")
    assert names(tmp_path / "out") == ["small.png"]
    assert "40 x 40" in result.failed[0][1]


def test_options_of_size_reach_the_translation(tmp_path: Path) -> None:
    source = picture(tmp_path / "a.png", 40, 24)
    pixels = np.asarray(Image.open(source))
    for name, options in {"scale": {"scale": 12}, "tile": {"tile": 3}, "memory": {"max_memory": 100_000}}.items():
        assert run_files([source], tmp_path / name, **options).failed == []
        written = np.asarray(Image.open(tmp_path / name / "a.png"))
        np.testing.assert_array_equal(written, translator().translate(pixels, **options))
    too_little = run_files([source], tmp_path / "none", max_memory=1000)
    assert "not enough memory" in too_little.failed[0][1]


def test_folders_keep_their_sub_folders_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a.png", "rome/a.png", "rome/forum/b.png", ".trash/c.png", ".d.png"):
        picture(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    result = run_files([folder], tmp_path / "out")
    assert result.failed == []
    assert names(tmp_path / "out") == ["a.png", "rome/a.png", "rome/forum/b.png"]


def test_patterns_keep_what_is_below_their_fixed_part(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/rome/a.png", "in/rome/b.jpg", "other/z.png"):
        picture(tmp_path / name)
    run_files([str(tmp_path / "in" / "**" / "*.png")], tmp_path / "one")
    assert names(tmp_path / "one") == ["a.png", "rome/a.png"]
    run_files([str(tmp_path / "i*")], tmp_path / "two")  # a pattern may match folders
    assert names(tmp_path / "two") == ["in/a.png", "in/rome/a.png", "in/rome/b.jpg"]
    result = run_files([str(tmp_path / "*.gif")], tmp_path / "three")
    assert result.failed == [(tmp_path / "*.gif", "no picture matches this pattern")]


def test_names_with_brackets_are_names(tmp_path: Path) -> None:
    source = picture(tmp_path / "IMG[1].png")
    assert run_files([source], tmp_path / "out").done == [tmp_path / "out" / "IMG[1].png"]


def test_a_folder_without_pictures_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert run_files([tmp_path / "in"], tmp_path / "out").failed == [(tmp_path / "in", "no pictures in this folder")]


@pytest.mark.parametrize("pattern", [False, True], ids=["folder", "pattern"])
def test_outputs_of_an_earlier_run_are_not_taken_up(tmp_path: Path, pattern: bool) -> None:
    picture(tmp_path / "a.png")
    out = tmp_path / "translated"
    item = str(tmp_path / "**" / "*.png") if pattern else tmp_path
    for _ in range(2):
        result = run_files([item], out, overwrite=True)
        assert result.failed == []
    assert names(tmp_path) == ["a.png", "translated/a.png"]


def test_inputs_are_never_replaced(tmp_path: Path) -> None:
    source, other = picture(tmp_path / "a.png", seed=1), picture(tmp_path / "a_x.png", seed=2)
    before = source.read_bytes(), other.read_bytes()
    result = run_files([source], tmp_path, overwrite=True)
    assert "would replace the input itself" in result.failed[0][1]
    result = run_files([source, other], tmp_path, suffix="_x", overwrite=True)
    assert result.done == [tmp_path / "a_x_x.png"]
    assert [path for path, _ in result.failed] == [source]
    assert "would replace another input" in result.failed[0][1]
    assert (source.read_bytes(), other.read_bytes()) == before


def test_a_link_to_the_input_is_not_written_through(tmp_path: Path) -> None:
    source = picture(tmp_path / "in" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").hardlink_to(source)
    before = source.read_bytes()
    result = run_files([source], tmp_path / "out", overwrite=True)
    assert "would replace the input itself" in result.failed[0][1]
    assert source.read_bytes() == before


def test_two_inputs_with_one_output(tmp_path: Path) -> None:
    first, second = picture(tmp_path / "x" / "a.png", seed=1), picture(tmp_path / "y" / "a.png", seed=2)
    result = run_files([first, first, second], tmp_path / "out")
    assert result.done == [tmp_path / "out" / "a.png"]
    assert [path for path, _ in result.failed] == [second]
    assert str(first) in result.failed[0][1]
    want = translator().translate(np.asarray(Image.open(first)))
    np.testing.assert_array_equal(np.asarray(Image.open(result.done[0])), want)


def test_an_output_name_too_long_is_a_failure_of_its_file(tmp_path: Path) -> None:
    long, short = picture(tmp_path / f"{'x' * 240}.png"), picture(tmp_path / "a.png")
    result = run_files([long, short], tmp_path / "out", suffix="_" + "y" * 20)
    assert [path for path, _ in result.failed] == [long]
    assert "cannot be written" in result.failed[0][1]
    assert len(result.done) == 1


def test_existing_outputs_are_kept_unless_asked(tmp_path: Path) -> None:
    source, out = picture(tmp_path / "a.png"), tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_text("precious")
    result = run_files([source], out)
    assert "exists already" in result.failed[0][1]
    assert (out / "a.png").read_text() == "precious"
    assert run_files([source], out, overwrite=True).failed == []
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_output_that_cannot_be_written_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "rome/b.png", "c.png", "z.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rome").write_text("a file where a folder must be")
    really = module.save_photo

    def full_disk(image: Image.Image, path: Path, **options: object) -> None:
        if path.name == "c.png":
            raise PhotoError(path, "No space left on device")
        really(image, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "save_photo", full_disk)
    result = run_files([tmp_path / "in"], tmp_path / "out")
    assert [path.name for path in result.done] == ["a.png", "z.png"]
    assert {path.name: reason for path, reason in result.failed}["c.png"] == "No space left on device"
    assert {path.name for path, _ in result.failed} == {"c.png", "b.png"}


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    source = picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"cannot create the output folder .*a\.png"):
        run_files([source], source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gif"}, "format 'gif' is not one of jpg"),
        ({"quality": 0}, "quality = 0"),
        ({"suffix": "../x"}, "suffix '../x'"),
        ({"direction": "BA"}, "direction 'BA'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    source = picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        run_files([source], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_inputs_must_be_a_list_with_something_in_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="inputs is empty"):
        run_files([], tmp_path / "out")
    with pytest.raises(InputError, match="not the single 'photos'"):
        run_files("photos", tmp_path / "out")  # type: ignore[arg-type]


def test_progress_goes_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = picture(tmp_path / "a.png")
    translate_files(translator(), [source], tmp_path / "out")
    out, err = capfd.readouterr()
    assert out == ""
    assert "1/1" in err
    run_files([source], tmp_path / "out", overwrite=True)
    assert capfd.readouterr().err == ""


def test_reading_and_writing_run_beside_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a picture is translated, the next one is opened and the one before is saved, or this would time out."""
    for index in range(6):
        picture(tmp_path / "in" / f"{index}.png")
    opened, saved = ([threading.Event() for _ in range(6)] for _ in range(2))
    really_open, really_save = module.open_original, module.save_photo
    model = translator()
    really_translate, count = model.translate, iter(range(6))

    def seen_open(path: Path, *arguments: object, **options: object) -> Original:
        opened[int(path.stem)].set()
        return really_open(path, *arguments, **options)  # type: ignore[arg-type]

    def seen_save(image: np.ndarray, path: Path, **options: object) -> None:
        really_save(image, path, **options)  # type: ignore[arg-type]
        saved[int(path.stem)].set()

    def seen_translate(*arguments: object, **options: object) -> np.ndarray:
        index = next(count)
        assert opened[min(index + 1, 5)].wait(10)
        assert index == 0 or saved[index - 1].wait(10)
        return really_translate(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(module, "open_original", seen_open)
    monkeypatch.setattr(module, "save_photo", seen_save)
    monkeypatch.setattr(model, "translate", seen_translate)
    assert len(run_files([tmp_path / "in"], tmp_path / "out", model).done) == 6


def test_real_photographs(real_photos: Path, tmp_path: Path) -> None:
    names_of = [
        "iphone2dslr_flower/testA/0005.jpg",
        "awkward/orient_portrait_6.jpg",
        "awkward/png16_gray_alpha_small.png",
    ]
    result = run_files([real_photos / name for name in names_of], tmp_path / "out")
    assert result.failed == []
    for name, path in zip(names_of, result.done, strict=True):
        assert open_photo(path).image.size == open_photo(real_photos / name).image.size
