"""Evaluations of generators whose answers are known, and what the command says, writes and refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import cyclegan_fast as cf
from cyclegan_fast.cli import main
from cyclegan_fast.config import Config, from_dict, to_dict
from cyclegan_fast.data.folder import DataError
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation import evaluate as module
from cyclegan_fast.evaluation import result
from cyclegan_fast.evaluation.evaluate import measure
from cyclegan_fast.evaluation.hallucination import hallucination, through_cycle
from cyclegan_fast.evaluation.metrics import Interval, checkerboard, ms_ssim, psnr, sliced_wasserstein, ssim
from cyclegan_fast.evaluation.photographic import depth_of_field, exposure, noise
from cyclegan_fast.evaluation.result import MEASURES, Evaluation
from cyclegan_fast.evaluation.sets import FEWEST, open_set
from cyclegan_fast.inference.translate import Translator
from cyclegan_fast.inference.weights import absent_generator
from cyclegan_fast.models import build_augmented, build_generators
from cyclegan_fast.training.checkpoint import step_path, write_checkpoint

SIZE = 48
COUNT = 6
EQUAL = 20 * math.log10(255) + 10 * math.log10(3 * SIZE**2)  # dB: one sample wrong by one level


def pixels(seed: int, channels: int = 3, size: int = SIZE) -> np.ndarray:
    """Smooth in places, rough in others, uint8 [size, size, channels]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, channels, 4, 4), generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    rough = torch.rand((1, channels, size, size), generator=generator) * torch.linspace(0, 1, size)
    return ((0.7 * smooth + 0.3 * rough)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def save(folder: Path, pictures: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(folder / name)


def domain(first: int, channels: int = 3, size: int = SIZE) -> dict[str, np.ndarray]:
    return {f"{first + i:03d}.png": pixels(first + i, channels, size) for i in range(COUNT)}


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """B is the negative of A's kind; the truth to a picture is its negative."""
    root = tmp_path / "flowers"
    A, B = domain(0), {name: 255 - picture for name, picture in domain(100).items()}
    save(root / "testA", A)
    save(root / "testB", B)
    save(root / "truthB", {name: 255 - picture for name, picture in A.items()})
    save(root / "truthA", {name: 255 - picture for name, picture in B.items()})
    return root


def config(**model: Any) -> Config:
    data = {"load_size": SIZE, "crop_size": SIZE, "workers": 1}
    data |= {"pairing": "aligned"} if model.get("method") == "pix2pix" else {}
    return from_dict({"data": data, "model": {"ngf": 4, "blocks": 1, **model}, "loss": {"identity": 0}})


class Mapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(4, 3, 1, 1))  # from which a translator guesses its memory

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def measured(
    root: Path, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], **options: Any
) -> Evaluation:
    translator = Translator(Mapped(forward), Mapped(backward), device="cpu", precision="fp32")
    return measure(translator, open_set(root, config(), **options), config())


def near(first: Interval, second: Interval) -> bool:
    """Equal but for rounding, which depends on how many pictures are measured at once."""
    return np.allclose(list(vars(first).values()), list(vars(second).values()), rtol=1e-9, atol=1e-12)


def run_folder(run: Path, made: Config | None = None) -> Path:
    made = made or config()
    torch.manual_seed(0)
    if made.model.method == "augmented":
        networks = {name: network.state_dict() for name, network in build_augmented(made.model).items()}
    else:
        networks = dict(zip(("G_A", "G_B"), (net.state_dict() for net in build_generators(made.model)), strict=True))
        if made.model.method == "pix2pix":
            del networks["G_B" if made.model.direction == "AtoB" else "G_A"]
    write_checkpoint(step_path(run, 7), {"config": to_dict(made), **networks, "position": {"step": 7, "epoch": 3.5}})
    return run


# Known answers


def test_generators_that_change_nothing(flowers: Path) -> None:
    """Their translations are the untouched pictures; there and back nothing is lost."""
    found = measured(flowers, lambda x: x, lambda x: x)
    for direction in found.directions.values():
        metrics = direction.metrics
        for name in ("psnr", "ssim", "ms_ssim", "noise", "lightness", "separation", "checkerboard_2"):
            assert near(metrics[name].value, metrics[name].untouched), name
            assert near(metrics[name].difference, Interval(0, 0, 0)), name
        for name in ("swd", "swd_colour", "colour_distance"):
            assert near(metrics[name].value, metrics[name].untouched), name
            assert near(metrics[name].difference, Interval(0, 0, 0)), name
            assert metrics[name].verdict == "not clear"
        for name in ("cycle_l1", "identity_l1", "depth_of_field_gain", "hallucination", "hallucination_area"):
            assert metrics[name].value.value == pytest.approx(0, abs=1e-9), name
        assert metrics["cycle_ssim"].value.value == pytest.approx(1, abs=1e-9)
        assert metrics["cycle_psnr"].value.value == pytest.approx(EQUAL)


def test_generators_that_give_the_truth(flowers: Path) -> None:
    found = measured(flowers, torch.neg, torch.neg)
    for direction, (source, target) in {"AtoB": "AB", "BtoA": "BA"}.items():
        metrics = found.directions[direction].metrics
        assert metrics["ssim"].value.value == pytest.approx(1, abs=1e-9)
        assert metrics["ms_ssim"].value.value == pytest.approx(1, abs=1e-9)
        assert metrics["psnr"].value.value == pytest.approx(EQUAL)
        assert math.isfinite(metrics["psnr"].untouched.value)
        # Nothing is nearer to the real pictures than the truth is.
        for name in ("swd", "swd_colour", "colour_distance"):
            assert near(metrics[name].value, metrics[name].target), name
        assert metrics["swd_colour"].value.high < metrics["swd_colour"].untouched.low
        assert near(metrics["depth_of_field_gain"].value, metrics["depth_of_field_gain"].target)
        assert metrics["cycle_l1"].value.value == 0
        # A negative of the target's own pictures is far from them: |x - (255 - x)|.
        files = sorted((flowers / f"test{target}").iterdir())
        apart = [np.abs(2.0 * np.asarray(Image.open(file), dtype=np.float64) - 255).mean() for file in files]
        assert metrics["identity_l1"].value.value == pytest.approx(np.mean(apart), abs=1e-9)
        assert found.directions[direction].names == sorted(path.name for path in (flowers / f"test{source}").iterdir())


def test_set_distances_are_those_of_the_metrics(flowers: Path) -> None:
    metrics = measured(flowers, lambda x: x, lambda x: x).directions["AtoB"].metrics
    A, B = (pictures_of(flowers / name) for name in ("testA", "testB"))
    for name, statistics in (("swd", "own"), ("swd_colour", "reference")):
        expected = sliced_wasserstein(B, A, statistics=statistics)
        assert metrics[name].value.value == pytest.approx(expected.mean, rel=1e-5)


def test_a_cast_and_a_blur_are_measured_as_what_they_are(flowers: Path) -> None:
    """Brighter by 0.2 of [-1, 1], and blurred: lightness rises, sharpness falls, noise falls."""

    def blurred(x: Tensor) -> Tensor:
        return (nn.functional.avg_pool2d(nn.functional.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1) + 0.2).clamp(-1, 1)

    metrics = measured(flowers, blurred, lambda x: x, limit=None).directions["AtoB"].metrics
    assert metrics["lightness"].difference.low > 3
    for name in ("subject_sharpness", "background_sharpness", "noise"):
        assert metrics[name].difference.high < 0, name
    assert metrics["cycle_l1"].value.low > 0.2 * 127.5 - 1
    assert metrics["swd"].value.value > 0


def test_every_figure_is_that_of_its_own_measure(flowers: Path) -> None:
    """Of a generator that changes all that is measured, each picture against the plain functions."""
    ramp = torch.linspace(-1, 1, SIZE)
    frame = torch.maximum(ramp.abs()[:, None], ramp.abs()) > 0.55
    checks = 0.06 * (-1.0) ** (torch.arange(SIZE)[:, None] + torch.arange(SIZE))
    stripes = 0.03 * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(SIZE // 4)

    def forward(x: Tensor) -> Tensor:
        soft = -nn.functional.avg_pool2d(nn.functional.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1)
        made = torch.where(frame, soft, checks + stripes - x)
        made[:, :, 8:14, 8:20] = torch.tensor([0.9, -0.8, 0.3])[:, None, None]  # invented
        made *= torch.tensor([1.0, 0.9, 0.8])[:, None, None]
        made[:, :, -4:] = torch.where(x[:, :1, -4:] > 0, 1.0, -1.0)  # blown here, black there
        return made.clamp(-1, 1)

    def backward(x: Tensor) -> Tensor:
        return (x + 0.1).clamp(-1, 1)

    def levels(x: Tensor) -> Tensor:
        return ((x + 1) * 127.5).round().to(torch.uint8)

    direction = measured(flowers, forward, backward).directions["AtoB"]
    A, truth = (pictures_of(flowers / name) for name in ("testA", "truthB"))
    exact = forward(A / 127.5 - 1)
    there, again = levels(exact), levels(backward(exact))
    light, depth, pattern = exposure(there), depth_of_field(there), checkerboard(there).contrast
    _, kept = through_cycle(lambda _: exact, backward, A / 127.5 - 1, seed=0)
    invented = hallucination(A, there, levels(kept))
    expected = {
        "psnr": psnr(there, truth),
        "ssim": ssim(there, truth),
        "ms_ssim": ms_ssim(there, truth, scales=3),
        "cycle_l1": (again.double() - A.double()).abs().mean(dim=(1, 2, 3)),
        "cycle_psnr": psnr(again, A),
        "cycle_ssim": ssim(again, A),
        "subject_sharpness": depth.subject,
        "background_sharpness": depth.background,
        "separation": depth.separation,
        "depth_of_field_gain": depth.separation - depth_of_field(A).separation,
        "noise": noise(there),
        "lightness": light.mean,
        "shadows": 100 * light.shadows,
        "highlights": 100 * light.highlights,
        "checkerboard_2": pattern[:, 0],
        "checkerboard_4": pattern[:, 1],
        "hallucination": 100 * invented.share,
        "hallucination_area": 100 * invented.area,
    }
    assert direction.values.keys() == expected.keys()
    for name, values in expected.items():
        assert direction.values[name] == pytest.approx(values.numpy(), rel=1e-6), name
        assert direction.metrics[name].value.value == pytest.approx(float(values.mean()), rel=1e-6), name
        assert len(values.unique()) > 1, name  # a constant would prove little
    assert direction.metrics["depth_of_field_gain"].value.low > 0
    assert direction.metrics["ms_ssim"].note == "3 scales; compare equal numbers only"
    for name, two in {"psnr": (A, truth), "ssim": (A, truth)}.items():
        plain = {"psnr": psnr, "ssim": ssim}[name](*two)
        assert direction.metrics[name].difference.value == pytest.approx(float((expected[name] - plain).mean()))


def test_differences_of_sets_are_narrower_than_their_parts(flowers: Path) -> None:
    """Nearly without the cast, where what differs from picture to picture stays: distances fall, and clearly."""
    for file in (flowers / "testB").iterdir():
        picture = np.asarray(Image.open(flowers / "testA" / f"{int(file.stem) - 100:03d}.png")).astype(float)
        Image.fromarray((0.6 * picture + 60).round().astype(np.uint8)).save(file)
    metrics = measured(flowers, lambda x: 0.65 * x + 0.05, lambda x: x).directions["AtoB"].metrics
    for name in ("swd_colour", "colour_distance"):
        found = metrics[name]
        assert found.difference.value == pytest.approx(found.value.value - found.untouched.value)
        assert found.verdict == "better"
        assert metrics["swd"].difference.value == pytest.approx(
            metrics["swd"].value.value - metrics["swd"].untouched.value
        )
        assert found.difference.high - found.difference.low < found.untouched.high - found.untouched.low


def pictures_of(folder: Path) -> Tensor:
    """uint8 [N, C, H, W], in order of the names."""
    arrays = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2).copy())


def test_every_metric_has_the_form_of_the_file(flowers: Path) -> None:
    content = measured(flowers, lambda x: 0.9 * x, lambda x: x).to_dict()
    assert content["format"] == 1
    assert content["data"] | {"root": ""} == {
        "root": "",
        "split": "test",
        "count_A": COUNT,
        "count_B": COUNT,
        "pairs": True,
        "size": [SIZE, SIZE],
        "preparation": f"resized to {SIZE} x {SIZE} pixels, bicubic, then the centre of {SIZE} x {SIZE}",
        "left_out": [],
    }
    for direction in content["directions"].values():
        assert list(direction["metrics"]) == [name for name in MEASURES if name in direction["metrics"]]
        for name, metric in direction["metrics"].items():
            keys = {"title", "group", "unit", "better", "value", "low", "high"}
            assert metric.keys() == keys | {"untouched", "target", "difference", "note"}, name
            assert metric["better"] in (1, -1, 0)
            assert metric["group"] in ("truth", "set", "cycle", "photograph", "artefact")
            for interval in (metric, metric["untouched"], metric["target"], metric["difference"]):
                if interval is not None and interval["value"] is not None:
                    assert interval["low"] - 1e-9 <= interval["value"] <= interval["high"] + 1e-9, name
        for picture in direction["pictures"]:
            assert picture.keys() - {"name"} <= direction["metrics"].keys()
    assert {item["metric"] for item in content["missing"]} == set()


# Sets of pictures


def test_pictures_are_prepared_as_in_training(tmp_path: Path) -> None:
    save(tmp_path / "testA", domain(0, size=60))
    save(tmp_path / "testB", domain(9, size=80))
    cropped = from_dict({"data": {"load_size": 50, "crop_size": 40, "workers": 1}})
    side = open_set(tmp_path, cropped).sides["A"]
    whole = np.asarray(Image.open(tmp_path / "testA" / "000.png").resize((50, 50), Image.Resampling.BICUBIC))
    assert np.array_equal(side[:1][0].transpose(1, 2, 0), whole[5:45, 5:45])
    assert np.array_equal(side[[0]], side[:1])
    uncropped = from_dict({"data": {"preprocess": "none", "workers": 1}})
    found = open_set(tmp_path, uncropped)
    assert found.size == (60, 60)
    last = np.asarray(Image.open(tmp_path / "testB" / f"{9 + COUNT - 1:03d}.png"))
    assert np.array_equal(found.sides["B"][[COUNT - 1]][0].transpose(1, 2, 0), last[10:70, 10:70])


def test_partners_are_the_truth_where_pictures_are_pairs(flowers: Path) -> None:
    for folder in ("testA", "truthB"):
        for number, file in enumerate(sorted((flowers / folder).iterdir())):
            file.rename(flowers / folder / f"{number}.png")
    unpaired = open_set(flowers, config())
    assert not unpaired.paired
    assert len(unpaired.truth["A"].places) == COUNT
    save(flowers / "testB", {f"{i}.png": pixels(i) for i in range(COUNT)})
    paired = open_set(flowers, config(), pairs=True)
    assert paired.paired
    assert paired.truth["A"].side is paired.sides["B"]
    assert [paired.sides["B"].names[place] for place in paired.truth["A"].places.values()] == paired.sides["A"].names


def test_side_by_side_pictures_are_pairs(tmp_path: Path) -> None:
    A, B = domain(0), domain(50)
    both = [np.concatenate(pair, axis=1) for pair in zip(A.values(), B.values(), strict=True)]
    save(tmp_path / "val", dict(zip(A, both, strict=True)))
    found = open_set(tmp_path, config())
    assert found.paired
    assert np.array_equal(found.sides["B"][:], np.stack(list(B.values())).transpose(0, 3, 1, 2))


def test_a_limit_chooses_the_same_pictures_again(flowers: Path) -> None:
    first, again = (open_set(flowers, config(), limit=5) for _ in range(2))
    assert first.sides["A"].names == again.sides["A"].names
    assert len(first.sides["A"]) == 5
    assert len(first.truth["A"].places) == 5


def test_truth_that_is_known_of_some_pictures_only(flowers: Path) -> None:
    for file in sorted((flowers / "truthB").iterdir())[:2]:
        file.unlink()
    direction = measured(flowers, lambda x: 0.9 * x, lambda x: x).directions["AtoB"]
    assert np.isnan(direction.values["psnr"]).tolist() == [True, True] + [False] * (COUNT - 2)
    assert direction.metrics["psnr"].note == f"of {COUNT - 2} pictures; for 2 it is not known"
    assert direction.metrics["swd"].target is None


def test_sets_that_are_refused(flowers: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"testA: 4 pictures of A are too few to measure: at least {FEWEST}"):
        open_set(flowers, config(), limit=4)
    with pytest.raises(DataError, match="no folder trainA and no folder trainB"):
        open_set(flowers, config(), split="train")
    with pytest.raises(DataError, match="does not exist"):
        open_set(tmp_path / "nothing", config())
    with pytest.raises(DataError, match="'val' is not one of test, train"):
        open_set(flowers, config(), split="val")
    small = from_dict({"data": {"load_size": 24, "crop_size": 24, "workers": 1}})
    with pytest.raises(DataError, match="24 x 24 pixels are too small to measure: both sides must have 32"):
        open_set(flowers, small)


# Models of every kind


def test_pix2pix_has_one_direction(flowers: Path) -> None:
    save(flowers / "testB", {name: 255 - picture for name, picture in domain(0).items()})
    for number in range(100, 100 + COUNT):
        (flowers / "testB" / f"{number}.png").unlink()
    made = config(method="pix2pix")
    translator = Translator(Mapped(torch.neg), absent_generator(flowers, "G_B"), device="cpu", precision="fp32")
    found = measure(translator, open_set(flowers, made, pairs=True), made)
    assert list(found.directions) == ["AtoB"]
    assert found.directions["AtoB"].metrics["ssim"].value.value == pytest.approx(1, abs=1e-9)
    assert found.directions["AtoB"].metrics["swd"].target is None  # the truth is the target
    missing = {item["metric"]: item["why"] for item in found.missing}
    assert missing.keys() == {
        *("cycle_l1", "cycle_psnr", "cycle_ssim", "hallucination", "hallucination_area", "identity_l1")
    }
    assert "direction AtoB only" in missing["cycle_l1"]
    with pytest.raises(InputError, match="AtoB only"):
        measure(translator, open_set(flowers, made), made, directions=["BtoA"])
    with pytest.raises(InputError, match="directions is empty"):
        measure(translator, open_set(flowers, made), made, directions=[])


def test_augmented_runs_have_no_way_back(flowers: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", config(method="augmented", latent=2))
    found = cf.evaluate(run, flowers, device="cpu", precision="fp32", directions=["AtoB"])
    assert "cycle_l1" not in found.directions["AtoB"].metrics
    assert math.isfinite(found.directions["AtoB"].metrics["psnr"].value.value)
    why = {item["metric"]: item["why"] for item in found.missing}
    assert "encoders" in why["hallucination"]
    assert "augmented is not trained" in why["identity_l1"]


def test_domains_of_different_channels(tmp_path: Path) -> None:
    save(tmp_path / "testA", domain(0, channels=1))
    save(tmp_path / "testB", domain(50))
    made = config(channels_A=1)
    translator = Translator(
        Mapped(lambda x: x.expand(-1, 3, -1, -1)),
        Mapped(lambda x: x[:, :1]),
        channels_A=1,
        device="cpu",
        precision="fp32",
    )
    found = measure(translator, open_set(tmp_path, made), made)
    metrics = found.directions["AtoB"].metrics
    assert metrics["cycle_l1"].value.value == 0
    assert metrics["noise"].untouched is None
    assert metrics["swd"].untouched is None
    assert metrics["noise"].target is not None
    missing = {item["metric"]: item["why"] for item in found.missing}
    assert "the domains differ in channels" in {missing["hallucination"], missing["identity_l1"]}
    assert "(A to B)" in missing["psnr"] or "(B to A)" in missing["psnr"]


def test_weights_of_the_de_facto_implementation(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._DEFACTO_SIZE == 256
    monkeypatch.setattr(module, "_DEFACTO_SIZE", SIZE)
    folder = tmp_path / "latest"
    folder.mkdir()
    for name, network in zip(("G_A", "G_B"), build_generators(config(blocks=6).model), strict=True):
        torch.save(network.state_dict(), folder / f"latest_net_{name}.pth")
    found = cf.evaluate(folder, flowers, device="cpu", precision="fp32", directions=["AtoB"], limit=5)
    assert found.data["size"] == [SIZE, SIZE]
    assert found.data["preparation"].startswith(f"resized to {SIZE} x {SIZE} pixels")
    assert found.provenance["checkpoint"] == "latest"
    assert found.provenance["step"] is None


@pytest.mark.parametrize("pairs", [False, True])
def test_a_truth_of_another_size_is_refused(flowers: Path, pairs: bool) -> None:
    """Without a resize their middles show different things."""
    other = "testB" if pairs else "truthB"
    if pairs:
        for number, file in enumerate(sorted((flowers / "testB").iterdir())):
            file.rename(flowers / "testB" / f"{number:03d}.png")
    save(flowers / other, {"002.png": pixels(2, size=2 * SIZE)})
    uncropped = from_dict({"data": {"preprocess": "none", "workers": 1}})
    with pytest.raises(DataError, match=r"002\.png has 48 x 48 pixels and its truth 96 x 96: they must show the same"):
        open_set(flowers, uncropped, pairs=pairs)


def test_names_that_do_not_tell_the_truth(flowers: Path) -> None:
    Image.open(flowers / "truthB" / "001.png").save(flowers / "truthB" / "001.jpg")
    with pytest.raises(DataError, match=r"001\.jpg and 001\.png have one name, suffix apart"):
        open_set(flowers, config())


# The command


def test_the_command_prints_a_table_and_writes_the_file(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run")
    command = ["evaluate", str(run), "--data", str(flowers), "--device", "cpu", "--precision", "fp32"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    content = json.loads((run / "evaluation.json").read_text())
    assert content["provenance"]["checkpoint"] == "step-00000007.ckpt"
    assert (content["provenance"]["step"], content["provenance"]["epoch"]) == (7, 3.5)
    assert content["provenance"]["seconds"] > 0
    assert f"A to B: {COUNT} pictures of A, {COUNT} of B, {SIZE} x {SIZE} pixels" in printed
    psnr = content["directions"]["AtoB"]["metrics"]["psnr"]
    line = next(line for line in printed.splitlines() if "PSNR to the truth" in line)
    figures = [psnr["untouched"]["value"], psnr["value"], psnr["low"], psnr["high"]]
    cells = line.replace("PSNR to the truth, dB", "").replace(" to ", " ").split()
    assert [float(cell) for cell in cells[:4]] == pytest.approx(figures, rel=1e-3)
    assert cells[4:6] == ["-", "more"]
    assert [float(cell.strip("(),")) for cell in cells[6:9]] == pytest.approx(
        list(psnr["difference"].values()), rel=1e-3
    )
    assert cells[9:] == ["better"]  # gray is nearer to a negative than its positive
    assert "not measured: FID; KID: not asked for (--fid)" in printed


def test_a_part_is_kept_only_where_it_is_told_to(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run")
    (run / "evaluation.json").write_text("whole")
    command = ["evaluate", str(run), "--data", str(flowers), "--device", "cpu", "--direction", "AtoB"]
    assert main(command) == 0
    assert (run / "evaluation.json").read_text() == "whole"
    assert "-o FILE keeps this one" in capsys.readouterr().err


def test_a_table_is_shown_before_the_file_fails(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run")
    (run / "evaluation.json").mkdir()
    assert main(["evaluate", str(run), "--data", str(flowers), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert "PSNR to the truth" in printed.out
    assert "evaluation.json cannot be written" in printed.err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.0, "0.000"), (0.0123, "0.0123"), (1.234, "1.234"), (23.456, "23.46"), (1234.6, "1235"), (9.9996, "10.00")],
        *[(2.1e-5, "2.1e-05"), (-0.00031, "-3.1e-04"), (-0.5, "-0.5000"), (math.nan, "-")],
    ],
)
def test_figures_in_tables(value: float, text: str) -> None:
    assert result._figure(value) == text


def test_the_command_leaves_out_bad_files_by_name(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (flowers / "testA" / "bad.png").write_bytes(b"not a picture")
    run, out = run_folder(tmp_path / "run"), tmp_path / "new" / "found.json"
    command = ["evaluate", str(run), "--data", str(flowers), "--device", "cpu", "--precision", "fp32"]
    command += ["--direction", "BtoA", "--limit", "5", "--format", "markdown", "--embedding", "random", "-o", str(out)]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "left out: " in printed.err
    assert "bad.png" in printed.err
    assert "| *against the truth* |" in printed.out
    content = json.loads(out.read_text())
    assert not (run / "evaluation.json").exists()
    assert list(content["directions"]) == ["BtoA"]
    assert content["data"]["left_out"][0][0].endswith("bad.png")
    metrics = content["directions"]["BtoA"]["metrics"]
    assert metrics["frechet_random"]["value"] > 0
    assert "no FID" in metrics["frechet_random"]["title"]
    assert "64 features of 5 and 5 pictures" in metrics["frechet_random"]["note"]


def test_the_command_says_what_is_wrong(flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    for arguments, message in (
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(run), "--data", str(tmp_path / "nowhere")], "nowhere does not exist"),
        ([str(run), "--data", str(flowers), "--limit", "3"], "3 pictures of A are too few to measure: at least 5"),
        ([str(run), "--data", str(flowers), "--which", "epoch-9"], "epoch-9"),
        ([str(run), "--data", str(flowers), "--embedding", "missing.pt2"], "missing.pt2 cannot be read"),
    ):
        assert main(["evaluate", "--device", "cpu", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_without_the_library_fid_is_missing_and_the_rest_is_measured(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    run = run_folder(tmp_path / "run")
    found = cf.evaluate(run, flowers, directions=["AtoB"], fid=True, limit=5, device="cpu", precision="fp32")
    missing = {item["metric"]: item["why"] for item in found.missing}
    assert missing["fid"] == missing["kid"]
    assert 'pip install "cyclegan_fast[fid]"' in missing["fid"]
    assert "swd" in found.directions["AtoB"].metrics


def test_its_own_pictures_are_those_of_the_run(flowers: Path, tmp_path: Path) -> None:
    """Without --data the configuration says which: its root, and its limit of test pictures."""
    own = from_dict({**to_dict(config()), "data": {**to_dict(config())["data"], "root": str(flowers), "limit_test": 5}})
    run = run_folder(tmp_path / "run", own)
    found = cf.evaluate(run, device="cpu", precision="fp32", directions=["AtoB"])
    assert found.data["count_A"] == 5
    assert found.data["root"] == str(flowers)
