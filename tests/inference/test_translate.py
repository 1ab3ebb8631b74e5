"""Translation of pictures in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_generators, noise, save_run, translator

from cyclegan_fast.data.photo import PhotoError
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference import translate as module
from cyclegan_fast.inference.tiles import plan_tiles, whole_bytes
from cyclegan_fast.inference.translate import TranslationError, Translator, load
from cyclegan_fast.training.checkpoint import CheckpointError, step_path, write_checkpoint


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
def test_out_of_memory_falls_back_to_bands_and_then_names_the_size(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pixels = translator(), noise(8, 16)

    def fail(*_: object, **__: object) -> None:
        raise error

    wanted = model.translate(pixels)
    model.G_A.register_forward_pre_hook(fail)
    assert np.abs(model.translate(pixels).astype(int) - wanted).max() <= 1
    monkeypatch.setattr(module, "translate_tiled", fail)
    with pytest.raises(TranslationError, match="not enough memory on cpu for a 16 x 8 picture in fp32"):
        model.translate(pixels)


def test_other_errors_of_the_network_are_not_taken_for_a_lack_of_memory() -> None:
    model = translator()
    model.G_A.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        model.translate(noise(8, 16))


def test_a_picture_that_does_not_fit_takes_bands_or_is_refused_before_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = translator()
    whole = whole_bytes(model.G_A, 64, 16, "fp32", model.device)
    bands = plan_tiles(model.G_A, 64, 16, "fp32", limit=0).bytes
    assert bands < whole
    pixels, wanted = noise(64, 16), model.translate(noise(64, 16))
    monkeypatch.setattr(module, "available_memory", lambda _: int(whole / 0.85) + 1)
    np.testing.assert_array_equal(model.translate(pixels), wanted)
    model.G_A.register_forward_pre_hook(lambda *_: pytest.fail("the network ran whole"))
    monkeypatch.setattr(module, "available_memory", lambda _: int(whole / 0.85) - 1)
    assert np.abs(model.translate(pixels).astype(int) - wanted).max() <= 1
    monkeypatch.setattr(module, "available_memory", lambda _: int(bands / 0.85) - 1)
    with pytest.raises(TranslationError, match=r"16 x 64 picture in fp32: it takes at least .* may be used"):
        model.translate(pixels)
    assert np.abs(model.translate(pixels, max_memory=bands).astype(int) - wanted).max() <= 1


def test_networks_that_cannot_be_cut_run_whole_or_not_at_all() -> None:
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Tanh())
    model = Translator(other, other, device="cpu", precision="fp32")
    assert model.translate(noise(8, 16)).shape == (8, 16, 3)
    with pytest.raises(InputError, match="tile cannot be used with a Sequential"):
        model.translate(noise(8, 16), tile=4)
    with pytest.raises(TranslationError, match="not enough memory"):
        model.translate(noise(8, 16), max_memory=3000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 4}, "scale = 4 is not allowed: an integer >= 8"),
        ({"scale": "tiny"}, "scale = 'tiny' is not allowed"),
        ({"scale": "train"}, "scale 'train' is not known for these networks"),
        ({"tile": 0}, "tile = 0 is not allowed"),
        ({"max_memory": 0}, "max_memory = 0 is not allowed"),
    ],
    ids=str,
)
def test_options_that_are_not_allowed_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        translator().translate(noise(16, 16), **options)


def test_scale_translates_small_and_returns_to_full_size(tmp_path: Path) -> None:
    model = load(save_run(tmp_path / "run"), device="cpu", precision="fp32")
    assert model.short_side("train") == model.training_size == 286
    model.training_size = 16
    pixels, seen = noise(40, 64), []
    model.G_A.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    result = model.translate(pixels, scale="train")
    assert seen == [(16, 26)]
    assert result.shape == pixels.shape
    np.testing.assert_array_equal(result, model.translate(pixels, scale=16))
    np.testing.assert_array_equal(model.translate(pixels, scale=40), model.translate(pixels))
    assert seen[-1] == (40, 64)  # no smaller than asked for: as it is


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
