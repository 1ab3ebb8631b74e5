"""Checkpoint files: whole or not at all, verified, never unpickled."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cyclegan_fast.training import checkpoint as ckpt


def content(step: int = 1) -> dict[str, Any]:
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    state = {"w": weight, "b": torch.arange(3.0)}
    return {"config": {"name": "x"}, "G_A": state, "G_B": state, "position": {"step": step}, "best": float("inf")}


def write(run: Path, *steps: int) -> list[Path]:
    paths = [ckpt.step_path(run, step) for step in steps]
    for path, step in zip(paths, steps, strict=True):
        ckpt.write_checkpoint(path, content(step))
    return paths


def test_round_trip_keeps_values_and_strides(tmp_path: Path) -> None:
    saved = content(3)
    path = tmp_path / "checkpoints" / "a.ckpt"
    ckpt.write_checkpoint(path, saved)
    loaded = ckpt.read_checkpoint(path)
    assert loaded["position"] == {"step": 3}
    assert torch.equal(loaded["G_A"]["w"], saved["G_A"]["w"])
    assert loaded["G_A"]["w"].stride() == saved["G_A"]["w"].stride()
    assert [item.name for item in path.parent.iterdir()] == ["a.ckpt"]


def test_torch_reads_it_without_us(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    assert torch.load(path, weights_only=True)["config"] == {"name": "x"}


@pytest.mark.parametrize("where", [0.0, 0.25, 0.5, 0.75, 0.999999])
def test_a_flipped_bit_anywhere_is_seen(tmp_path: Path, where: float) -> None:
    (path,) = write(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * where), len(data) - 1)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ckpt.CheckpointError, match=str(path)):
        ckpt.read_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_seen(tmp_path: Path, keep: int) -> None:
    (path,) = write(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ckpt.CheckpointError, match="cut off"):
        ckpt.read_checkpoint(path)


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pth"
    torch.save({"w": torch.zeros(1)}, foreign)
    with pytest.raises(ckpt.CheckpointError, match="not a cyclegan_fast checkpoint"):
        ckpt.read_checkpoint(foreign)
    with pytest.raises(ckpt.CheckpointError, match="there is no checkpoint"):
        ckpt.read_checkpoint(tmp_path / "none.ckpt")
    incomplete = tmp_path / "incomplete.ckpt"
    ckpt.write_checkpoint(incomplete, {"config": {}})
    with pytest.raises(ckpt.CheckpointError, match="lacks G_A, G_B, position"):
        ckpt.read_checkpoint(incomplete)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt, "FORMAT", 99)
    (path,) = write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(ckpt.CheckpointError, match="format 99"):
        ckpt.read_checkpoint(path)


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    ckpt.write_checkpoint(path, {**content(), "extra": Evil(marker)})
    with pytest.raises(ckpt.CheckpointError, match="more than tensors and plain values"):
        ckpt.read_checkpoint(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # noqa: S301 - shows that the trap would have worked
    assert marker.exists()


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write(tmp_path, 1)
    before = path.read_bytes()

    def full(obj: Any, target: Path) -> None:
        Path(target).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ckpt.CheckpointError, match="No space left on device") as error:
        ckpt.write_checkpoint(path, content())
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_latest_passes_over_damaged_ones_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = write(tmp_path, 10, 9, 100_000_000)[:3]
    assert ckpt.find_checkpoint(tmp_path) == third
    third.write_bytes(third.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        found = ckpt.read_latest(tmp_path)
    assert found is not None
    assert found[0] == first
    assert third.name in caplog.text
    first.write_bytes(b"")
    second.write_bytes(b"")
    with pytest.raises(ckpt.CheckpointError, match="none of the 3 checkpoints"):
        ckpt.read_latest(tmp_path)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert ckpt.read_latest(tmp_path) is None
    with pytest.raises(ckpt.CheckpointError, match="none at all"):
        ckpt.find_checkpoint(tmp_path)
    with pytest.raises(ckpt.CheckpointError, match="no run folder"):
        ckpt.find_checkpoint(tmp_path / "nowhere")


def test_find_by_name_lists_what_there_is(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 5)
    ckpt.keep_also_as(path, ckpt.milestone_path(tmp_path, 10))
    assert ckpt.find_checkpoint(tmp_path, "epoch-10").name == "epoch-0010.ckpt"
    assert ckpt.find_checkpoint(path, "best") == path
    with pytest.raises(ckpt.CheckpointError, match=r"there is epoch-0010\.ckpt, step-00000005\.ckpt"):
        ckpt.find_checkpoint(tmp_path, "best")
    with pytest.raises(ckpt.CheckpointError, match="latest, best, epoch-N"):
        ckpt.find_checkpoint(tmp_path, "newest")


@pytest.mark.parametrize("links", [True, False])
def test_pruning_keeps_the_newest_and_the_named(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    paths = write(tmp_path, 1, 2, 3, 4)
    ckpt.keep_also_as(paths[0], ckpt.checkpoint_dir(tmp_path) / "best.ckpt")
    left_over = ckpt.checkpoint_dir(tmp_path) / ".step-00000009.ckpt.123.tmp"
    left_over.write_bytes(b"half")
    ckpt.prune(tmp_path, keep=2)
    assert sorted(item.name for item in ckpt.checkpoint_dir(tmp_path).iterdir()) == [
        "best.ckpt",
        "step-00000003.ckpt",
        "step-00000004.ckpt",
    ]
    assert ckpt.read_checkpoint(ckpt.find_checkpoint(tmp_path, "best"))["position"] == {"step": 1}
