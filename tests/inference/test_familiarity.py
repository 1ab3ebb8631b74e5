"""Telling pictures that are unlike the training pictures."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_generators, noise, save_run

from cyclegan_fast import cli
from cyclegan_fast.config import load_config
from cyclegan_fast.data.photo import open_photo
from cyclegan_fast.data.synthetic import render_phone, scene
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference import translate as translate_module
from cyclegan_fast.inference.demo.limits import Limits
from cyclegan_fast.inference.demo.markup import comparison
from cyclegan_fast.inference.demo.workbench import Workbench
from cyclegan_fast.inference.familiarity import (
    ASPECTS,
    LEAST_PICTURES,
    UNUSUAL,
    Familiarity,
    Features,
    Reference,
    _cells,
    _power,
    _upper_bound,
    distances_from,
    features,
)
from cyclegan_fast.inference.files import translate_files
from cyclegan_fast.inference.translate import Translator, load
from cyclegan_fast.models import build_augmented
from cyclegan_fast.training.checkpoint import CheckpointError, step_path, write_checkpoint

LOG = "cyclegan_fast.translate"


def smooth(count: int, seed: int, channels: int = 3, side: int = 24) -> torch.Tensor:
    """Blotches of warm colours, uint8 [N, C, side, side]: a stand-in for a domain."""
    rng = np.random.default_rng(seed)
    tint = np.array([200, 120, 60, 255])[[0, 1, 2, 3][:channels]]
    coarse = np.clip(tint + rng.normal(0, 30, (count, 5, 5, channels)), 0, 255).astype(np.float32)
    large = torch.nn.functional.interpolate(torch.from_numpy(coarse).permute(0, 3, 1, 2), (side, side), mode="bicubic")
    return large.clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.fit(features(smooth(60, 0)), features(smooth(40, 1)))


def part(found: Features, index: int) -> Features:
    return {name: values[index : index + 1] for name, values in found.items()}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64), (70, 50)])
def test_features_of_any_picture(channels: int, size: tuple[int, int]) -> None:
    pixels = torch.from_numpy(noise(*size, channels)).permute(2, 0, 1)[None]
    found, signed = features(pixels), features(pixels.double() / 127.5 - 1)
    for name in ASPECTS:
        assert np.isfinite(found[name]).all()
        np.testing.assert_allclose(found[name], signed[name], atol=0.05)  # bytes are resized to bytes


def test_features_of_one_colour() -> None:
    found = features(torch.tensor([255, 51, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 9, 30))
    luma = 0.299 + 0.587 * 0.2
    np.testing.assert_allclose(found["colours"][0, :3], [luma, -luma, 1 - luma], atol=1e-6)
    np.testing.assert_allclose(found["colours"][0, 3:6], np.log(0.01), atol=1e-6)
    np.testing.assert_allclose(found["structure"], np.log(1e-5), atol=1e-6)


def test_power_of_a_grating_is_in_its_ring_and_direction() -> None:
    x = torch.arange(64) / 64
    grating = 0.5 * torch.sin(2 * torch.pi * 10 * x).expand(1, 1, 64, 64)  # varies along the rows: direction 0
    power = _power(((grating + 1) / 2).double().numpy()).reshape(1, 1, -1)
    assert (power @ _cells((2, 6, 33), 4).T)[0, 0].argmax() == 4
    assert (power @ _cells((1, 2, 3, 5, 8, 13, 20, 33), 1).T)[0, 0].argmax() == 4
    upright = _power(((grating + 1) / 2).double().numpy().swapaxes(2, 3)).reshape(1, 1, -1)
    assert (upright @ _cells((2, 6, 33), 4).T)[0, 0].argmax() == 6


def test_the_size_of_a_picture_counts_for_little() -> None:
    small = smooth(1, 3, side=64)
    large = small.repeat_interleave(20, 2).repeat_interleave(36, 3)  # 1280 x 2304: more than is looked at
    reference = Reference.fit(features(smooth(60, 0, side=64)))
    distances = [reference.compare(features(picture)).distance for picture in (small, large, large / 127.5 - 1)]
    assert max(distances) - min(distances) < 0.1


def test_known_pictures_are_familiar_and_others_are_not(reference: Reference) -> None:
    assert share_flagged(reference, features(smooth(200, 99))) <= 3 * UNUSUAL  # others of their kind
    cold = reference.compare(features(255 - smooth(1, 5)))
    assert (cold.unfamiliar, cold.aspect, cold.nearer, cold.among) == (True, "colours", 40, 40)
    assert "further from them than all 40 test pictures" in str(cold)
    grainy = smooth(1, 6, side=64).float() + torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 12
    rough = reference.compare(features(grainy.clamp(0, 255).to(torch.uint8)))
    assert (rough.unfamiliar, rough.aspect) == (True, "structure")
    for far in (torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), float("nan")), torch.ones(1, 3, 300, 2)):
        assert reference.compare(features(far)).unfamiliar
    both = torch.cat([smooth(1, 7), 255 - smooth(1, 5)])
    assert reference.compare(features(both)).distance == pytest.approx(cold.distance)  # of a batch the furthest


@pytest.mark.parametrize(
    ("distance", "words"),
    [
        (0.345, "like the training pictures: in colours 0.3 times"),
        (2.04, "unlike the training pictures: in colours 2.0 times"),
        *[(99.6, "100 times"), (350.0, "350 times"), (1e5, "more than 999 times"), (math.nan, "more than 999 times")],
    ],
)
def test_how_far_is_said_in_plain_figures(distance: float, words: str) -> None:
    assert words in str(Familiarity(distance, "colours", 3, 40, "test"))


@pytest.mark.parametrize(("training", "test"), [(400, 100), (150, 30), (150, 0)])
def test_false_warnings_are_as_rare_as_they_should_be(training: int, test: int) -> None:
    """For features whose law is known, correlated and with tails: of some pictures everything is more extreme."""
    rng = np.random.default_rng(7)
    mixing = {name: rng.normal(size=(size, size)) for name, size in zip(ASPECTS, (32, 29), strict=True)}

    def drawn(count: int) -> Features:
        return {
            name: np.exp(rng.normal(0, 0.3, (count, 1))) * rng.normal(size=(count, len(mix))) @ mix
            for name, mix in mixing.items()
        }

    shares = []
    for _ in range(6):
        reference = Reference.fit(drawn(training), drawn(test) if test else None)
        assert reference.held_out == ("test" if test else "training")
        shares.append(share_flagged(reference, drawn(2000)))
    assert UNUSUAL / 3 < np.mean(shares) < 2 * UNUSUAL


def test_the_bound_is_the_prediction_interval_of_students_t() -> None:
    logs = np.linspace(-1, 1, 20)
    half_width = 2.861 * logs.std(ddof=1) * np.sqrt(21 / 20)  # t of 19 degrees of freedom, 99.5 %
    assert np.log(_upper_bound(np.exp(logs))) == pytest.approx(half_width, rel=2e-3)


def test_few_test_pictures_are_not_counted_on() -> None:
    training, test = features(smooth(30, 0)), features(smooth(LEAST_PICTURES - 1, 1))
    found = Reference.fit(training, test).compare(features(smooth(1, 2)))
    assert (found.held_out, found.among) == ("training", 30)
    with pytest.raises(ValueError, match="19 training pictures are too few"):
        Reference.fit(test)


def test_pictures_that_are_all_the_same() -> None:
    same = features(smooth(1, 0).expand(30, -1, -1, -1))
    reference = Reference.fit(same)
    assert not reference.compare(part(same, 0)).unfamiliar
    assert reference.compare(features(smooth(1, 1))).unfamiliar


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_state_comes_back_to_the_bit(channels: int, tmp_path: Path) -> None:
    found = features(smooth(30, 0, channels))
    state = Reference.fit(found).state_dict()
    torch.save(state, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 25_000
    read = Reference.from_state(torch.load(tmp_path / "a.pt", weights_only=True))
    assert read.channels == channels
    again = read.state_dict()
    for name in ASPECTS:
        assert again[name]["bound"] == state[name]["bound"]
        assert all(torch.equal(again[name][key], state[name][key]) for key in ("centre", "matrix"))
    assert torch.equal(again["scores"], state["scores"])


HOSTILE: list[tuple[Any, str]] = [
    (("version",), 2),
    (("version",), "1"),
    (("channels",), 1),
    (("channels",), True),
    (("channels",), 10**9),
    (("held_out",), ["test"]),
    (("colours",), None),
    (("colours", "centre"), torch.zeros(31)),
    (("colours", "matrix"), torch.full((32, 32), float("nan"))),
    (("colours", "matrix"), torch.zeros(32, 32, dtype=torch.int64)),
    (("structure", "matrix"), torch.zeros(29)),
    (("structure", "bound"), 0.0),
    (("structure", "bound"), float("nan")),
    (("structure", "bound"), torch.ones(1)),
    (("scores",), torch.zeros(0)),
    (("scores",), torch.full((3,), float("inf"))),
    (("scores",), torch.zeros(5000)),
    (("scores",), [1.0]),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), HOSTILE, ids=str)
def test_a_state_made_up_by_others_is_refused(reference: Reference, place: tuple[str, ...], value: Any) -> None:
    state = copy.deepcopy(reference.state_dict())
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match=r"version|channels|lacks|NaN|bound|scores|not what"):
        Reference.from_state(state)


def save_with(run: Path, familiarity: Any) -> Path:
    config, G_A, G_B = make_generators()
    content = {"config": config, "G_A": G_A.state_dict(), "G_B": G_B.state_dict(), "position": {"step": 7}}
    write_checkpoint(step_path(run, 7), {**content, "familiarity": familiarity})
    return run


def image(seed: int, far: bool = False) -> Image.Image:
    pixels = smooth(1, seed)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(255 - pixels if far else pixels)


@pytest.fixture
def run(tmp_path: Path, reference: Reference) -> Path:
    return save_with(tmp_path / "run", {"A": reference.state_dict()})


def test_a_checkpoint_tells_of_its_pictures(run: Path, tmp_path: Path, reference: Reference) -> None:
    model = load(run, device="cpu", precision="fp32")
    array = np.asarray(image(5, far=True))
    Image.fromarray(array).save(tmp_path / "a.png")
    want = reference.compare(features(torch.from_numpy(array.copy()).permute(2, 0, 1)[None])).distance
    signed = torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None]
    for kind in (tmp_path / "a.png", image(5, far=True), array, array.astype(np.uint16) * 257, signed):
        found = model.familiarity(kind)  # type: ignore[arg-type]
        assert found is not None
        assert found.unfamiliar
        assert found.distance == pytest.approx(want, rel=0.01)
    assert model.familiarity(array, "BtoA") is None
    with pytest.raises(InputError, match="direction"):
        model.familiarity(array, "AtoC")


def test_models_without_it_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(save_run(tmp_path / "run"), device="cpu", precision="fp32")
    assert model.familiarity(image(5, far=True)) is None
    model.translate(image(5, far=True))
    result = translate_files(model, [saved(tmp_path / "a.png", 5, far=True)], tmp_path / "out", progress=False)
    assert (len(result.done), result.unfamiliar, caplog.records) == (1, [], [])
    with pytest.raises(InputError, match=r"unfamiliar = 'skip' is not possible: the checkpoint does not say"):
        translate_files(model, [tmp_path / "a.png"], tmp_path / "out", unfamiliar="skip")


def test_what_cannot_be_used_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gray = Reference.fit(features(smooth(30, 0, 1))).state_dict()
    run = save_with(tmp_path / "run", {"A": gray, "B": {"version": 1}, "C": 3})
    model = load(run, device="cpu", precision="fp32")
    assert model.references == {}
    assert sorted(record.message.rpartition(": ")[2] for record in caplog.records) == [
        "channels must be 1 to 4, and held_out test or training",
        "it is of pictures with 1 channels, not 3",
    ]
    assert model.translate(image(0)).size == (24, 24)
    save_with(tmp_path / "other", [1])
    with pytest.raises(CheckpointError, match="its familiarity is not what was measured"):
        load(tmp_path / "other")


def test_translate_warns_once(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(run, device="cpu", precision="fp32")
    model.translate(image(0))
    model.translate(np.asarray(image(5, far=True)))  # of a program, which may ask
    assert not caplog.records
    model.translate(saved(tmp_path / "far.png", 5, far=True))
    model.translate(image(5, far=True))
    (record,) = caplog.records
    assert (record.name, record.levelno) == (LOG, logging.WARNING)
    assert f"{tmp_path / 'far.png'} is unlike the training pictures: in colours " in record.message


def test_no_translation_fails_of_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(pictures: torch.Tensor) -> Features:
        raise MemoryError

    monkeypatch.setattr(translate_module, "features", fails)
    model = load(run, device="cpu", precision="fp32")
    model.translate(image(5, far=True))
    result = translate_files(model, [saved(tmp_path / "a.png", 5, far=True)], tmp_path / "out", progress=False)
    assert (len(result.done), result.failed, result.unfamiliar, caplog.records) == (1, [], [], [])


def saved(path: Path, seed: int, far: bool = False) -> Path:
    path.parent.mkdir(exist_ok=True)
    image(seed, far).save(path)
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("handling", ["warn", "skip", "ignore"])
def test_batches_warn_skip_or_ignore(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, handling: str
) -> None:
    near, far = saved(tmp_path / "in" / "near.png", 0), saved(tmp_path / "in" / "far\n.png", 5, far=True)
    model = load(run, device="cpu", precision="fp32")
    result = translate_files(model, [tmp_path / "in"], tmp_path / "out", unfamiliar=handling, progress=False)
    assert files(tmp_path / "out") == [near.name] if handling == "skip" else [far.name, near.name]
    assert result.failed == []
    assert [path for path, _ in result.unfamiliar] == ([] if handling == "ignore" else [far])
    words = [record.message for record in caplog.records]
    if handling == "ignore":
        assert words == []
        return
    assert "far\\n.png is unlike the training pictures: in colours" in words[0]
    assert words[0].endswith("left out") == (handling == "skip")
    assert words[1].startswith("1 of 2 pictures are unlike the training pictures")
    assert len(words) == 2


def test_a_wrong_word_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unfamiliar = 'no' is not allowed: one of warn, skip, ignore"):
        translate_files(load(run), [tmp_path], tmp_path / "out", unfamiliar="no")


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "in" / "near.png", 0)
    saved(tmp_path / "in" / "far.png", 5, far=True)
    command = ["translate", str(run), str(tmp_path / "in"), "--device", "cpu", "--precision", "fp32", "-o"]
    assert cli.main([*command, str(tmp_path / "all")]) == 0
    said = capsys.readouterr()
    assert files(tmp_path / "all") == ["far.png", "near.png"]
    assert "far.png is unlike the training pictures: in colours" in said.err
    assert "1 of 2 pictures are unlike" in said.err
    assert cli.main([*command, str(tmp_path / "some"), "--unfamiliar", "skip"]) == 0
    assert files(tmp_path / "some") == ["near.png"]
    assert "1 pictures written" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "quiet"), "--unfamiliar", "ignore"]) == 0
    assert "unlike" not in capsys.readouterr().err


def test_the_demo_page_says_so(run: Path, tmp_path: Path) -> None:
    bench = Workbench(load(run, device="cpu", precision="fp32"), tmp_path, Limits(10_000_000, 1.0))
    near, far = (
        bench.translate(saved(bench.uploads / name, 5, name == "far.png"), "AtoB") for name in ("a.png", "far.png")
    )
    assert "unlike" not in comparison(near)
    assert "This photograph is unlike the training pictures: in colours" in comparison(far)


def test_styles_keep_it_and_warn_once(reference: Reference, caplog: pytest.LogCaptureFixture) -> None:
    networks = build_augmented(load_config(None, ["model.method=augmented", "model.ngf=4", "model.blocks=1"]).model)
    pair = networks["G_A"], networks["G_B"]
    model = Translator(*pair, device="cpu", precision="fp32", references={"A": reference})
    for seed in (1, 2):
        model.translate(image(5, far=True), seed=seed)
    assert len(caplog.records) == 1


def described(folder: Path, limit: int = 50) -> Features:
    found = [
        features(torch.from_numpy(np.array(open_photo(path, 3).image)).permute(2, 0, 1)[None])
        for path in sorted(folder.iterdir())[:limit]
    ]
    return {name: np.concatenate([each[name] for each in found]) for name in ASPECTS}


def share_flagged(reference: Reference, found: Features) -> float:
    """As ``compare`` does it, for all at once."""
    ratios = [distances_from(found[name], *reference.whitening[name]) / reference.bounds[name] for name in ASPECTS]
    assert reference.compare(part(found, 0)).distance == pytest.approx(max(ratio[0] for ratio in ratios))
    return float((np.maximum(*ratios) > 1).mean())


def test_synthetic_flowers() -> None:
    """With 20 training pictures and 2 x 20 that calibrate one another's warnings."""
    pictures = np.stack([render_phone(scene(3, index), 24) for index in range(60)])
    found = features(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    training, one, other = ({name: v[a:b] for name, v in found.items()} for a, b in ((0, 20), (20, 40), (40, 60)))
    assert share_flagged(Reference.fit(training, one), other) <= 0.05
    assert share_flagged(Reference.fit(training, other), one) <= 0.05
    reference = Reference.fit(training, one)
    for far in (torch.from_numpy(noise(24, 24)).permute(2, 0, 1)[None], smooth(20, 0), smooth(1, 0)[:, :, :1, :1]):
        assert share_flagged(reference, features(far)) == 1


def test_real_photographs(real_photos: Path) -> None:
    folder = real_photos / "facades"
    reference = Reference.fit(described(folder / "trainA", 100))
    assert share_flagged(reference, described(folder / "testB")) == 1  # label maps
    assert share_flagged(reference, described(folder / "testA")) <= 0.1
    assert share_flagged(reference, described(real_photos / "iphone2dslr_flower" / "testB")) > 0.5
