"""Translation of pictures in memory and of files, and the resolution of device and precision."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image

from cyclegan_fast import device
from cyclegan_fast.config import from_dict, to_dict
from cyclegan_fast.data.photo import Photo, PhotoError, open_photo
from cyclegan_fast.device import arithmetic, resolve_device, resolve_precision
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference import translate as module
from cyclegan_fast.inference.translate import TranslationError, Translator, load, translate_files
from cyclegan_fast.models import build_generators
from cyclegan_fast.training.checkpoint import CheckpointError, milestone_path, step_path, write_checkpoint

CPU = torch.device("cpu")
EXIF_ORIENTATION, EXIF_MAKE = 0x0112, 0x010F


def make_generators(
    channels_A: int = 3, channels_B: int = 3, seed: int = 0
) -> tuple[dict, torch.nn.Module, torch.nn.Module]:
    # A gain well above the usual one: with a network this small, outputs would all be nearly gray otherwise.
    model = {"ngf": 4, "blocks": 1, "init_gain": 0.3, "channels_A": channels_A, "channels_B": channels_B}
    config = from_dict({"model": model, "loss": {"identity": 0}})
    torch.manual_seed(seed)
    G_A, G_B = build_generators(config.model)
    return to_dict(config), G_A.eval(), G_B.eval()


def save_run(run: Path, channels_A: int = 3, channels_B: int = 3) -> Path:
    for path, seed in ((step_path(run, 7), 0), (milestone_path(run, 3), 1)):
        config, G_A, G_B = make_generators(channels_A, channels_B, seed)
        position = {"step": 7, "epoch": 3}
        content = {"config": config, "G_A": G_A.state_dict(), "G_B": G_B.state_dict(), "position": position}
        write_checkpoint(path, content)
    return run


def translator(channels_A: int = 3, channels_B: int = 3, precision: str = "fp32") -> Translator:
    _, G_A, G_B = make_generators(channels_A, channels_B)
    channels = {"channels_A": channels_A, "channels_B": channels_B}
    return Translator(G_A, G_B, **channels, device="cpu", precision=precision)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(path: Path, width: int = 20, height: int = 12, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, seed=seed)).save(path)
    return path


def expected(G: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Unrounded values in [0, 255], by plain arithmetic in NCHW order."""
    x = torch.tensor(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None].contiguous()
    with torch.no_grad():
        y = G(x)
    return (y[0].permute(1, 2, 0).double().numpy() + 1) * 127.5


# Layouts and the order of operations differ by a few float32 roundings, so values this near to a half may go both ways.
NEAR = 2e-3


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (5, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_array_is_rounded_and_keeps_its_size(size: tuple[int, int], direction: str) -> None:
    _, G_A, G_B = make_generators()
    pixels = noise(*size)
    result = translator().translate(pixels, direction)
    exact = expected(G_A if direction == "AtoB" else G_B, pixels)
    assert result.dtype == np.uint8
    assert result.shape == pixels.shape
    assert np.abs(result - exact).max() <= 0.5 + NEAR


def test_truncation_drops_the_fraction() -> None:
    _, G_A, _ = make_generators()
    pixels = noise(16, 24)
    rounded, truncated = translator().translate(pixels), translator().translate(pixels, truncate=True)
    fraction = expected(G_A, pixels) - truncated
    assert fraction.min() >= -NEAR
    assert fraction.max() <= 1 + NEAR
    assert 0 < (rounded != truncated).mean() < 1


def test_every_kind_of_picture_gives_the_same_values(tmp_path: Path) -> None:
    pixels = noise(14, 22)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.tensor(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    model = translator()
    array = model.translate(pixels)
    from_path, from_image = model.translate(str(path)), model.translate(Image.fromarray(pixels))
    assert isinstance(from_path, Image.Image)
    assert isinstance(from_image, Image.Image)
    np.testing.assert_array_equal(np.asarray(from_path), array)
    np.testing.assert_array_equal(np.asarray(from_image), array)
    np.testing.assert_array_equal(model.translate(pixels[:, ::-1][:, ::-1]), array)  # negative strides inside
    result = model.translate(tensor)
    assert result.shape == tensor.shape
    assert np.abs((result[0].permute(1, 2, 0).numpy() + 1) * 127.5 - array).max() <= 0.5 + NEAR


def test_tensors_keep_dtype_and_stay_usable_in_autograd() -> None:
    x = torch.rand(2, 3, 12, 16, dtype=torch.float64) * 2 - 1
    result = translator().translate(x)
    assert result.dtype == torch.float64
    assert result.shape == x.shape
    assert not result.is_inference()
    alone = translator().translate(x[1:])
    torch.testing.assert_close(result[1:], alone, rtol=0, atol=1e-5)  # pictures of a batch do not mix


def test_cycle_goes_there_and_back_without_rounding_between() -> None:
    _, G_A, G_B = make_generators()
    x = torch.rand(1, 3, 16, 20) * 2 - 1
    generated, reconstructed = translator().cycle(x, "BtoA")
    with torch.no_grad():
        torch.testing.assert_close(generated, G_B(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reconstructed, G_A(G_B(x)), rtol=1e-4, atol=1e-4)
    image = Image.fromarray(noise(10, 11))
    assert [type(item) for item in translator().cycle(image)] == [Image.Image, Image.Image]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_channels_of_both_sides(channels: int, mode: str) -> None:
    model = translator(channels_A=channels, channels_B=5 - channels)
    there = model.translate(Image.new("RGB", (9, 13), (200, 30, 60)), "AtoB")
    assert there.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[5 - channels]
    assert there.size == (9, 13)
    assert model.translate(there, "BtoA").mode == mode
    assert model.translate(noise(9, 13, channels)).shape == (9, 13, 5 - channels)


def test_gray_arrays_stay_flat_or_not() -> None:
    model = translator(1, 1)
    flat, deep = model.translate(noise(8, 12, 1)[:, :, 0]), model.translate(noise(8, 12, 1))
    assert flat.shape == (8, 12)
    assert deep.shape == (8, 12, 1)
    np.testing.assert_array_equal(flat, deep[:, :, 0])


def test_alpha_is_laid_over_white_when_the_network_takes_none() -> None:
    clear = np.zeros((12, 16, 4), np.uint8)
    clear[:6] = (10, 200, 30, 255)
    over_white = np.full((12, 16, 3), 255, np.uint8)
    over_white[:6] = (10, 200, 30)
    model = translator()
    result = np.asarray(model.translate(Image.fromarray(clear)))
    np.testing.assert_array_equal(result, model.translate(over_white))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (noise(8, 8, 4), r"\[8, 8, 4\]; this direction takes \[H, W, 3\]"),
        (noise(8, 8, 3)[:, :, 0], r"\[8, 8\]; this direction takes \[H, W, 3\]"),
        (noise(8, 0, 3), r"\[8, 0, 3\]"),
        (noise(8, 8, 3).astype(np.float32), "dtype float32; it must be uint8"),
        (torch.zeros(3, 8, 8), r"\[3, 8, 8\]; this direction takes \[N, 3, H, W\]"),
        (torch.zeros(1, 1, 8, 8), r"\[1, 1, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8; it must be floating point"),
        (Image.new("I;16", (8, 8)), "mode 'I;16'"),
        (42, "not a int"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_pictures_that_do_not_fit_are_refused(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translator().translate(wrong)  # type: ignore[call-overload]


def test_unknown_direction_is_refused() -> None:
    with pytest.raises(InputError, match="direction 'A2B' is not one of AtoB, BtoA"):
        translator().translate(noise(8, 8), "A2B")


def test_unusable_file_is_a_photo_error(tmp_path: Path) -> None:
    bad = tmp_path / "text.jpg"
    bad.write_text("no picture")
    with pytest.raises(PhotoError, match=r"text\.jpg"):
        translator().translate(bad)


def test_bf16_is_near_fp32_and_is_used() -> None:
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    full, half = translator().translate(x), translator(precision="bf16").translate(x)
    difference = (full - half).abs()
    assert difference.max() > 0
    # bf16 has 8 bits: a relative error of 2^-9 a layer, through a dozen layers with an amplifying head.
    assert difference.mean() < 0.02


def test_networks_run_in_evaluation_mode_and_channels_last() -> None:
    _, G_A, G_B = make_generators()
    model = Translator(G_A.train(), G_B.train(), device="cpu", precision="fp32")
    seen = {}
    handle = model.G_A.register_forward_pre_hook(
        lambda _, args: seen.update(
            last=args[0].is_contiguous(memory_format=torch.channels_last), inference=torch.is_inference_mode_enabled()
        )
    )
    model.translate(noise(16, 16))
    handle.remove()
    assert seen == {"last": True, "inference": True}
    assert not model.G_A.training
    weights = [weight for weight in model.G_A.parameters() if weight.ndim == 4 and weight.shape[1] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not any(weight.requires_grad for weight in model.G_A.parameters())


def test_a_result_that_is_not_finite_is_an_error() -> None:
    model = translator()
    next(model.G_A.parameters()).fill_(float("nan"))
    with pytest.raises(TranslationError, match=r"16 x 8 picture is not finite in fp32"):
        model.translate(noise(8, 16))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you tried")],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_the_size(error: Exception) -> None:
    model = translator()

    def fail(*_: object) -> None:
        raise error

    model.G_A.register_forward_pre_hook(fail)
    with pytest.raises(TranslationError, match="not enough memory on cpu for a 16 x 8 picture in fp32"):
        model.translate(noise(8, 16))


def test_other_errors_of_the_network_are_not_taken_for_a_lack_of_memory() -> None:
    model = translator()
    model.G_A.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        model.translate(noise(8, 16))


def test_a_picture_that_cannot_fit_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = translator()
    needed = 2 * 4 * 8 * 16 * 4  # two full-size maps of 4 filters, 8 x 16, float32
    monkeypatch.setattr(module, "_available_memory", lambda: needed)
    model.translate(noise(8, 16))
    monkeypatch.setattr(module, "_available_memory", lambda: needed - 1)
    model.G_A.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(TranslationError, match="16 x 8 picture in fp32: it takes at least"):
        model.translate(noise(8, 16))


def test_load_takes_runs_and_files(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    pixels = noise(12, 12)
    latest = load(run, device="cpu", precision="fp32").translate(pixels)
    milestone = load(run, which="epoch-3", device="cpu", precision="fp32").translate(pixels)
    file = load(step_path(run, 7), device="cpu", precision="fp32").translate(pixels)
    np.testing.assert_array_equal(latest, translator().translate(pixels))
    np.testing.assert_array_equal(latest, file)
    assert (latest != milestone).any()


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    before = torch.get_rng_state()
    load(run, device="cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_load_takes_the_channels_of_the_checkpoint(tmp_path: Path) -> None:
    model = load(save_run(tmp_path / "run", channels_A=1, channels_B=4), device="cpu", precision="fp32")
    assert model.channels("AtoB") == (1, 4)
    assert model.channels("BtoA") == (4, 1)
    assert model.translate(Image.new("RGB", (8, 8))).mode == "RGBA"


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config, G_A, G_B = make_generators()
    position = {"step": 1, "epoch": 1}
    content = {"config": config, "G_A": G_A.state_dict(), "G_B": G_B.state_dict(), "position": position}
    path = tmp_path / "x.ckpt"
    config["model"]["ngf"] = 5
    write_checkpoint(path, content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: the weights of G_A do not fit"):
        load(path, device="cpu")
    config["model"]["flavour"] = "vanilla"
    write_checkpoint(path, content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt holds a configuration .*flavour"):
        load(path, device="cpu")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        load(path, device="cpu")
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere", device="cpu")


def run_files(inputs: list[str | Path], out: Path, model: Translator | None = None, **options: object) -> module.Result:
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
    assert result == module.Result([tmp_path / "out" / "side.jpg"], [])
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
    monkeypatch.setattr(module, "_available_memory", lambda: 2 * 4 * 20 * 20 * 4)
    result = run_files([large, small], tmp_path / "out")
    assert names(tmp_path / "out") == ["small.png"]
    assert "40 x 40" in result.failed[0][1]


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


def test_reading_overlaps_and_few_pictures_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(8):
        picture(tmp_path / "in" / f"{index}.png")
    lock, held, most = threading.Lock(), 0, 0
    opened = [threading.Event() for _ in range(8)]
    really_open, really_save = module.open_photo, module.save_photo

    def count(change: int) -> None:
        nonlocal held, most
        with lock:
            held += change
            most = max(most, held)

    def counted_open(path: Path, channels: int) -> Photo:
        count(1)
        opened[int(path.stem)].set()
        return really_open(path, channels)

    def counted_save(image: Image.Image, path: Path, **options: object) -> None:
        # The picture after the next one is opened while this one is still to be written, or this would time out.
        ahead = min(int(path.stem) + 1, 7)
        assert opened[ahead].wait(10)
        really_save(image, path, **options)  # type: ignore[arg-type]
        count(-1)

    monkeypatch.setattr(module, "open_photo", counted_open)
    monkeypatch.setattr(module, "save_photo", counted_save)
    result = run_files([tmp_path / "in"], tmp_path / "out")
    assert len(result.done) == 8
    assert 2 <= most <= 3


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


def test_device_names() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "mps", "cuda:x", ""):
        with pytest.raises(ValueError, match="is not one of auto, cpu, cuda, cuda:N"):
            resolve_device(wrong)


def test_missing_cuda_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'cuda:1' is not there: torch .*; use `auto` or `cpu`"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="this machine has 2, cuda:0 to cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(("capability", "meaning"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], meaning: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert resolve_precision("auto", torch.device("cuda")) == meaning
    assert resolve_precision("tf32", torch.device("cuda")) == "tf32"


def test_auto_precision_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx, meaning in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx: value, raising=False)
        assert resolve_precision("auto", CPU) == meaning
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_that_cpus_lack(precision: str) -> None:
    with pytest.raises(ValueError, match=f"training.precision = '{precision}' needs a CUDA device, not cpu"):
        resolve_precision(precision, CPU)
    with pytest.raises(ValueError, match=r"training\.precision = 'int8' is not one of"):
        resolve_precision("int8", CPU)
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_arithmetic_sets_and_restores() -> None:
    x = torch.ones(2, 2)
    with arithmetic("bf16", CPU):
        assert (x @ x).dtype == torch.bfloat16
    with arithmetic("fp32", CPU):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("start", ["default", "older switch off", "at odds"])
def test_cudnn_is_switched_and_put_back(start: str) -> None:
    cudnn: Any = torch.backends.cudnn
    default = device._tf32_switches()
    if start == "older switch off":
        cudnn.allow_tf32 = False
    elif start == "at odds":
        cudnn.conv.fp32_precision = "ieee"
    before = device._tf32_switches()

    def fail_inside(precision: str) -> None:
        with arithmetic(precision, torch.device("cuda")):
            assert cudnn.conv.fp32_precision == {"fp32": "ieee", "tf32": "tf32"}[precision]
            assert cudnn.allow_tf32 == (precision == "tf32")  # torch's older switch can still be read
            raise KeyError

    try:
        for precision in ("fp32", "tf32"):
            with pytest.raises(KeyError):
                fail_inside(precision)
            assert device._tf32_switches() == before
    finally:
        device._set_tf32_switches(*default)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(precision: str) -> None:
    x = torch.rand(1, 3, 64, 48) * 2 - 1
    _, G_A, G_B = make_generators()
    on_gpu = Translator(G_A, G_B, device="cuda", precision=precision).translate(x)
    assert on_gpu.device == x.device
    # TF32 and fp16 carry 11 bits, bf16 carries 8; errors grow through a dozen layers.
    tolerance = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}[precision]
    assert (on_gpu - translator().translate(x)).abs().mean() < tolerance
