"""Translation in bands of rows: equal to the whole picture, in bounded memory."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import noise, save_run, translator

from cyclegan_fast.cli import main
from cyclegan_fast.device import arithmetic
from cyclegan_fast.inference import memory, tiles
from cyclegan_fast.inference.tiles import Plan, plan_tiles, translate_tiled
from cyclegan_fast.inference.translate import TranslationError
from cyclegan_fast.models import PatchDiscriminator, ResnetGenerator

CPU = torch.device("cpu")
# Halvings of odd and even quarters, sides that are extended by reflection and by repeating, one pixel wide or high.
SIZES = [(40, 64), (37, 50), (9, 70), (70, 9), (1, 17), (33, 1), (3, 3)]
PLANS = [Plan(tile, kept, "device", 0) for tile, kept in ((1, 4), (3, 2), (8, 4), (13, 2), (30, 4), (1000, 2))]


def generator(preset: str = "original", channels: tuple[int, int] = (3, 3), **options: object) -> ResnetGenerator:
    torch.manual_seed(1)
    network = ResnetGenerator(*channels, 8, 2, preset=preset, init_gain=0.3, **options)
    return network.eval().requires_grad_(False)


def random_picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(noise(height, width, channels)).permute(2, 0, 1)[None]


def whole(network: ResnetGenerator, picture: torch.Tensor) -> torch.Tensor:
    weights = next(network.parameters())
    with torch.inference_mode():
        return network(tiles.as_input(picture, CPU, weights.dtype))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("preset", ["original", "keras"])
def test_bands_of_any_height_equal_the_whole_picture(preset: str, size: tuple[int, int]) -> None:
    network = generator(preset)
    picture = random_picture(*size)
    exact = whole(copy.deepcopy(network).double(), picture)
    for plan in PLANS:
        result = translate_tiled(network, picture, plan, device=CPU)
        assert result.shape == exact.shape
        assert result.dtype == torch.float32
        assert (result - exact).abs().max() < 5e-5, plan
    assert (whole(network, picture) - exact).abs().max() < 5e-5
    assert exact.std() > 0.1


def test_one_pixel_is_translated() -> None:
    """Its maps have no variance but rounding, so that there is nothing to compare with."""
    result = translate_tiled(generator(), random_picture(1, 1), PLANS[0], device=CPU)
    assert result.shape == (1, 3, 1, 1)
    assert result.abs().max() <= 1


@pytest.mark.parametrize("preset", ["original", "keras"])
def test_in_float64_they_are_the_same_to_its_rounding(preset: str) -> None:
    network = generator(preset).double()
    picture = random_picture(37, 50)
    for plan in PLANS:
        result = translate_tiled(network, picture, plan, device=CPU)
        assert (result - whole(network, picture)).abs().max() < 1e-12, plan


@pytest.mark.parametrize("preset", ["original", "keras"])
def test_doublings_by_resizing(preset: str) -> None:
    network = generator(preset, upsample="resize").double()
    picture = random_picture(37, 50)
    for plan in PLANS:
        result = translate_tiled(network, picture, plan, device=CPU)
        assert (result - whole(network, picture)).abs().max() < 1e-12, plan


@pytest.mark.parametrize("channels", [(1, 3), (3, 1), (4, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_other_channels_dropout_and_executions(channels: tuple[int, int], impl: str) -> None:
    network = generator("original", channels, dropout=True, impl=impl)
    picture = random_picture(25, 42, channels[0])
    result = translate_tiled(network, picture, Plan(7, 4, "device", 0), device=CPU)
    assert (result - whole(network, picture)).abs().max() < 1e-4


@pytest.mark.parametrize("storage", ["host", "file"])
def test_maps_on_the_host_or_in_files_give_the_same_bits(storage: str) -> None:
    network, picture = generator(), random_picture(41, 54)
    for kept in (2, 4):
        plan = Plan(8, kept, "device", 0)
        on_device = translate_tiled(network, picture, plan, device=CPU)
        assert torch.equal(translate_tiled(network, picture, replace(plan, storage=storage), device=CPU), on_device)


@pytest.mark.parametrize("storage", ["device", "file"])
def test_bf16_is_as_near_as_the_whole_picture_in_bf16(storage: str) -> None:
    network, picture = generator(), random_picture(40, 52)
    exact = whole(network, picture)
    with arithmetic("bf16", CPU):
        rounded = whole(network, picture).float()
        result = translate_tiled(network, picture, Plan(12, 4, storage, 0), device=CPU)
    error = (rounded - exact).abs().mean()
    assert 0 < (result - exact).abs().mean() < 1.3 * error


def test_there_are_no_seams() -> None:
    """The error at the borders of bands is that of any other row."""
    network, picture = generator(), random_picture(96, 40)
    error = translate_tiled(network, picture, Plan(16, 4, "device", 0), device=CPU) - whole(network, picture)
    rows = error.abs().amax((0, 1, 3))
    assert rows[15::16].max() < 1e-4
    assert rows.max() < 1e-4


def test_statistics_hold_beside_a_mean_far_above_the_deviation() -> None:
    """3 million positions, mean 1000 deviations: float32 sums of squares would have no digit left."""
    random = np.random.default_rng(0)
    statistics, parts = tiles._Statistics(2, CPU), []
    for _ in range(6):
        part = (random.standard_normal((1, 2, 500, 1000)) * [[[[0.1]], [[1.0]]]] + 1000).astype(np.float32)
        parts.append(part)
        statistics.add(torch.from_numpy(part).contiguous(memory_format=torch.channels_last))
    everything = np.concatenate(parts, 2)
    variance = (statistics.squares / statistics.count).numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), everything.mean((0, 2, 3), dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(variance, everything.var((0, 2, 3), dtype=np.float64), rtol=1e-4)


def test_statistics_hold_where_the_first_rows_are_unlike_the_rest() -> None:
    rows = torch.randn(1, 3, 60, 50)
    rows[:, :, :2] = 500.0
    statistics = tiles._Statistics(3, CPU)
    for top in range(0, 60, 7):
        statistics.add(rows[:, :, top : top + 7])
    variance, mean = torch.var_mean(rows.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(statistics.squares / statistics.count, variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-6, atol=0)


def test_a_nearly_flat_picture_is_as_accurate_as_whole() -> None:
    network = generator()
    torch.manual_seed(0)
    picture = 0.9 + 1e-3 * torch.randn(1, 3, 48, 64)
    exact = whole(copy.deepcopy(network).double(), picture)
    usual = (whole(network, picture) - exact).abs().mean()
    for kept in (2, 4):
        result = translate_tiled(network, picture, Plan(5, kept, "device", 0), device=CPU)
        assert (result - exact).abs().mean() < 2 * usual


def test_progress_reaches_the_end_in_even_steps() -> None:
    steps: list[tuple[int, int, float]] = []
    picture = random_picture(64, 64)
    translate_tiled(generator(), picture, Plan(8, 2, "device", 0), device=CPU, progress=lambda *a: steps.append(a))
    assert [done for done, _, _ in steps] == list(range(1, steps[-1][1] + 1))
    shares = [share for _, _, share in steps]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert shares[0] < 0.05


def test_layers_that_are_not_known_are_not_taken_for_those_they_derive_from() -> None:
    class Blurred(torch.nn.Conv2d):
        pass

    network = generator()
    assert tiles.can_tile(network)
    network.model[1] = Blurred(3, 8, 7)
    assert not tiles.can_tile(network)
    with pytest.raises(ValueError, match="of known layers"):
        translate_tiled(network, random_picture(16, 16), PLANS[0], device=CPU)


@pytest.mark.parametrize(
    ("network", "picture", "plan", "message"),
    [
        (PatchDiscriminator(ndf=4), (1, 3, 64, 64), PLANS[0], "only residual generators .* this PatchDiscriminator"),
        (generator().train(), (1, 3, 64, 64), PLANS[0], "training mode"),
        (generator(), (2, 3, 64, 64), PLANS[0], r"shape \[2, 3, 64, 64\], not \[1, 3, H, W\]"),
        (generator(), (1, 1, 64, 64), PLANS[0], r"shape \[1, 1, 64, 64\]"),
        (generator(), (1, 3, 0, 64), PLANS[0], r"shape \[1, 3, 0, 64\]"),
        (generator(), (1, 3, 64, 64), Plan(0, 2, "device", 0), "tile = 0"),
    ],
    ids=["network", "mode", "batch", "channels", "empty", "tile"],
)
def test_what_cannot_be_cut_is_refused(network: torch.nn.Module, picture: tuple, plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_tiled(network, torch.zeros(picture), plan, device=CPU)


def test_plans_spend_what_there_is() -> None:
    network = ResnetGenerator(blocks=1)
    size = (3024, 4032, "fp32")
    gigabytes = [plan_tiles(network, *size, limit=int(limit * 1e9)) for limit in (8, 3.5, 2.2, 0.6)]
    assert [(plan.kept, plan.storage) for plan in gigabytes] == [
        *((2, "device"), (2, "device"), (4, "device"), (4, "file"))
    ]
    for plan, limit in zip(gigabytes, (8, 3.5, 2.2, 0.6), strict=True):
        assert plan.bytes <= limit * 1e9
    assert plan_tiles(network, *size, limit=0).bytes < gigabytes[-1].bytes  # the least there is, for the error
    beside = plan_tiles(network, *size, limit=10**9, host_limit=3 * 10**9)  # a GPU's memory, and its host's
    assert beside.storage == "host"
    assert 2e9 < beside.host_bytes < 3e9
    assert plan_tiles(network, 12096, 16128, "fp32", limit=10**9, host_limit=10**9).storage == "file"


# A process for each limit, forked from one that has imported everything.
MEASURE = """
import json, os, pathlib, re, sys
import torch
from cyclegan_fast import ResnetGenerator
from cyclegan_fast.inference.tiles import whole_bytes
from cyclegan_fast.inference.translate import Translator
torch.set_num_threads(1)

def measure(limit):
    network = ResnetGenerator(ngf=32, blocks=1)
    model = Translator(network, network, device="cpu", precision="fp32")
    picture = torch.randint(0, 256, (768, 768, 3), dtype=torch.uint8).numpy()
    model.translate(picture[:64, :64], max_memory=limit)  # what libraries keep for themselves
    status = pathlib.Path("/proc/self/status")  # getrusage begins with the peak of the process that started this one
    peak = lambda: 1024 * int(re.search("VmHWM:[^0-9]*([0-9]+)", status.read_text())[1])
    before = peak()
    model.translate(picture, max_memory=limit)
    print(json.dumps([peak() - before, whole_bytes(network, 768, 768, "fp32", model.device)]), flush=True)

for limit in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        measure(limit)
        os._exit(0)
    os.waitpid(child, 0)
"""


def measured(*limits: int | None) -> list[list[int]]:
    """For each limit, bytes by which a translation raised its process's peak, and the estimate for a whole picture."""
    command = [sys.executable, "-c", MEASURE, json.dumps(limits)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_as_estimated_and_limits_hold() -> None:
    """Of a whole picture, and with maps in memory and in files."""
    (whole, estimate), *limited = measured(None, 100_000_000, 50_000_000)
    assert 0.7 * estimate < whole < 1.1 * estimate
    for limit, (taken, _) in zip((100_000_000, 50_000_000), limited, strict=True):
        assert taken < limit < estimate / 2


def test_a_full_disk_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model, pixels = translator(), noise(64, 64)
    limit = plan_tiles(model.G_A, 64, 64, "fp32", limit=0).bytes
    monkeypatch.setattr(tiles._FileMap, "write", full)
    with pytest.raises(TranslationError, match=r"temporary file in .* No space left on device; name another .* TMPDIR"):
        model.translate(pixels, max_memory=limit)


def test_available_memory_heeds_control_groups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    group = root / "a" / "b"
    group.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    for folder, limit in ((group, "max"), (group.parent, "5000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("4000\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 1500\n")
    assert memory._group_memory(root, own) == [2500]
    assert memory._group_memory(root, tmp_path / "nothing") == []
    assert memory.available_memory() is None or memory.available_memory() > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512 MiB", 2**29), ("1.5g", 15 * 10**8), ("2gi", 2**31), ("1000", 1000), ("8kB", 8000)],
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 XB", "-1GB", "0", "1e9", "4GBB", "9" * 400])
def test_other_words_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size of memory such as 4GB"):
        memory.parse_size(text)


def test_the_command_line_takes_the_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run")
    Image.fromarray(noise(40, 60)).save(tmp_path / "a.png")
    command = ["translate", str(run), str(tmp_path / "a.png"), "--device", "cpu", "--precision", "fp32", "--overwrite"]

    def written(*options: str) -> np.ndarray:
        assert main([*command, "-o", str(tmp_path / "out"), *options]) == 0
        return np.asarray(Image.open(tmp_path / "out" / "a.png")).astype(int)

    plain = written()
    assert np.abs(written("--tile", "5") - plain).max() <= 1
    assert np.abs(written("--max-memory", "145kB") - plain).max() <= 1
    scaled = written("--scale", "20")
    np.testing.assert_array_equal(scaled, translator().translate(noise(40, 60), scale=20))
    assert np.abs(scaled - plain).max() > 5
    np.testing.assert_array_equal(written("--scale", "train"), plain)  # trained at 286 pixels
    for wrong in (["--max-memory", "lots"], ["--scale", "half"], ["--tile", "-1"]):
        assert main([*command, "-o", str(tmp_path / "out"), *wrong]) == 2
        assert wrong[1] in capfd.readouterr().err


def test_the_bar_counts_bands(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_BAR_AFTER", 0)
    with tiles.band_bar("a\nb.jpg") as step:
        for done in (1, 4):
            time.sleep(0.15)  # it is drawn ten times a second at most
            step(done, 4, done / 4)
    said = capfd.readouterr().err
    assert "a\\nb.jpg: " in said
    assert "band 4/4" in said
    with tiles.band_bar("silent", shown=False) as step:
        step(1, 1, 1.0)
    assert capfd.readouterr().err == ""
