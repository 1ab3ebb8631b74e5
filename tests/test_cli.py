"""The command line: exit status and words, from the outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cyclegan_fast.cli import main

ROOT = Path(__file__).parents[1]
TINY = [
    "data.load_size=36", "data.crop_size=32", "data.workers=1", "model.ngf=4", "model.ndf=4", "model.blocks=1",
    "model.discriminator_layers=1", "training.epochs=1", "training.epochs_decay=1", "monitor.tensorboard=false",
    "monitor.progress=false", "monitor.samples=1", "monitor.log_every=2", "checkpoint.milestones=[1]",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Path:
    """A run folder, trained through the command line on rendered flowers."""
    monkeypatch.chdir(tmp_path)
    assert main(["data", "synth", "flowers", "--train", "3", "--test", "2", "--size", "40"]) == 0
    assert main(["train", "name=tiny", "data.root=flowers", *TINY]) == 0
    assert "done: runs/tiny" in capfd.readouterr().out
    return tmp_path / "runs" / "tiny"


def test_the_whole_path(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Render, train, translate both ways, draw the figures, train on; a bad file is listed, the others are done."""
    bad = run.parent / "bad.jpg"
    bad.write_bytes(b"not a picture")
    assert main(["translate", str(run), "flowers/testA", str(bad), "-o", "out"]) == 1
    captured = capfd.readouterr()
    assert "2 pictures written to out" in captured.out
    assert "bad.jpg" in captured.err
    outputs = sorted(Path("out").iterdir())
    inputs = sorted(Path("flowers/testA").iterdir())
    assert [path.name for path in outputs] == [path.name for path in inputs]
    for output, source in zip(outputs, inputs, strict=True):
        with Image.open(output) as after, Image.open(source) as before:
            assert after.size == before.size
            assert np.abs(np.asarray(after, float) - np.asarray(before, float)).mean() > 1

    assert main(["translate", str(run), str(inputs[0]), "-o", "back", "--direction", "BtoA", "--which", "best"]) == 0
    picture = str(inputs[0])
    assert main(["figures", "curves", str(run), "-o", "curves.png"]) == 0
    assert main(["figures", "progress", str(run), picture, "--epochs", "1", "-o", "figures/progress.png"]) == 0
    assert main(["figures", "cycle", str(run), picture, "-o", "figures/cycle.jpg"]) == 0
    assert main(["figures", "pairs", str(run), picture, "--direction", "BtoA", "-o", "pairs.png"]) == 0
    for figure in ("curves.png", "pairs.png", "figures/progress.png", "figures/cycle.jpg"):
        with Image.open(figure) as image:
            assert min(image.size) > 100

    # Resuming by the run folder.
    assert main(["train", "--resume", str(run), "training.epochs=2", "monitor.progress=false"]) == 0
    assert "resumed from" in capfd.readouterr().err
    assert main(["train", "--resume", str(run), "--config", "x.yaml"]) == 2
    assert "leave out --config x.yaml" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config", "none.yaml"], "cannot read the configuration none.yaml"),
        (["train", "data.rot=x"], "did you mean data.root?"),
        (["train", "data.root=nowhere"], "nowhere"),
        (["train", "training.device=cuda:7"], "cuda:7"),
        (["train", "--resume", "runs/none"], "runs/none"),
        (["translate", "nowhere", "a.jpg", "-o", "out"], "nowhere"),
        (["figures", "curves", "nowhere", "-o", "a.png"], "nowhere"),
        (["figures", "progress", "nowhere", "a.jpg", "-o", "a.png", "--epochs", "one"], "--epochs 'one'"),
        (["data", "scan", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line_with_status_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capfd.readouterr().err
    assert message.startswith("cyclegan-fast: ")
    assert words in message
    assert "Traceback" not in message


def test_scan_reports_and_tells_bad_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for split in ("trainA", "trainB"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (30, 20)).save(tmp_path / split / "a.png")
    assert main(["data", "scan", str(tmp_path)]) == 0
    assert "30" in capfd.readouterr().out
    (tmp_path / "trainA" / "b.png").write_bytes(b"")
    assert main(["data", "scan", str(tmp_path), "--full"]) == 1
    assert "b.png" in capfd.readouterr().out


def test_doctor_tells_what_is_here(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["doctor"]) == 0
    text = capfd.readouterr().out
    assert torch.__version__ in text
    assert ("none:" in next(line for line in text.splitlines() if "CUDA  " in line)) != torch.cuda.is_available()
    assert "gloo" in text
    assert "JPEG, PNG" in text


def test_doctor_measures_and_remembers(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cyclegan_fast import roofline

    monkeypatch.setattr(roofline, "_SIDES", (16,))
    monkeypatch.setattr(roofline, "_REPEATS", (1, 1))
    monkeypatch.setattr(roofline, "_COPY_BYTES", 2**16)
    assert main(["doctor"]) == 0
    assert "not measured: `cyclegan-fast doctor --measure cpu`" in capfd.readouterr().out
    assert main(["doctor", "--measure", "cpu"]) == 0
    text = capfd.readouterr().out
    assert text.startswith("measured cpu, ")
    assert "cannot be written to" not in text
    ceilings = text.partition(": fp32 ")[2].splitlines()[0]
    assert main(["doctor"]) == 0
    assert f"fp32 {ceilings}, measured 20" in capfd.readouterr().out  # the figures and the day
    assert main(["doctor", "--measure", "cuda:99"]) == 2
    assert "cuda:99" in capfd.readouterr().err


def test_help_config_is_the_page_of_the_docs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-config"]) == 0
    assert capfd.readouterr().out == (ROOT / "docs" / "config.md").read_text(encoding="utf-8")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m cyclegan_fast train --help-config | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stdout == "# Settings\n"
    assert "Traceback" not in done.stderr
