"""Files made to harm: each is refused with a clear error, inside bounded memory and time, and runs nothing."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cyclegan_fast import tensor_file
from cyclegan_fast.config import ConfigError, from_dict, load_config, to_dict
from cyclegan_fast.data import store as store_module
from cyclegan_fast.data.folder import DataError, list_images, report, scan_dataset, scan_folder
from cyclegan_fast.data.photo import MAX_PIXELS, PhotoError, open_photo, read_header, save_photo
from cyclegan_fast.data.store import Preprocess, open_store
from cyclegan_fast.errors import InputError, shown
from cyclegan_fast.inference.files import translate_files
from cyclegan_fast.inference.translate import Translator, load
from cyclegan_fast.inference.weights import WeightsError
from cyclegan_fast.models import build_generators
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

MB = 1e6

# Calls a function with each path under a limit on new memory, and says what came of it. What is neither a result nor
# an InputError ends the process.
CHILD = """
import importlib, json, resource, sys, time
from cyclegan_fast.errors import InputError
module, function, limit, *paths = sys.argv[1:]
call = getattr(importlib.import_module(module), function)
with open("/proc/self/statm") as file:
    virtual = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + int(limit), virtual + int(limit)))
for path in paths:
    peak, began, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), None
    try:
        call(path)
    except InputError as error:
        said = str(error)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    print(json.dumps([said, time.perf_counter() - began, grown]), flush=True)
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory as Linux tells it")


def measured(module: str, function: str, paths: list[Path], limit: float) -> list[tuple[str | None, float, float]]:
    """For each path: the error's words or None, seconds, and by how many bytes the process grew beyond its peak."""
    command = [sys.executable, "-W", "error", "-c", CHILD, f"cyclegan_fast.{module}", function, str(int(limit))]
    result = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def content(**more: Any) -> dict[str, Any]:
    """A small checkpoint with all its parts."""
    weights = {"w": torch.ones(4, 3), "b": torch.zeros(4)}
    moments = {index: {"step": torch.tensor(1.0), "exp_avg": w} for index, w in enumerate([*weights.values()] * 2)}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0, 1, 2, 3]}]}
    pool = {"size": 2, "count": 1, "images": torch.zeros(1, 3, 2, 2)}
    return {
        "config": to_dict(from_dict({})),
        **{name: dict(weights) for name in ("G_A", "G_B", "D_A", "D_B")},
        "optimizer_G": optimizer,
        "optimizer_D": optimizer,
        "scaler": {},
        "pools": {"A": pool, "B": {**pool, "images": [torch.zeros(1, 3, 2, 2)]}},
        "position": {"step": 3, "epoch": 0.5, "steps_per_epoch": 6, "pairs_per_step": 1},
        "best": float("inf"),
        "history": {"names": ["a", "b"], "rows": [torch.zeros(2)]},
        "data": {"count_A": 1, "count_B": 2, "names": "0" * 64},
        "provenance": {"version": "0.1.0"},
        **more,
    }


class Elements:
    """Stands for the elements of a tensor in a forged file."""

    def __init__(self, count: Any, record: str = "0") -> None:
        self.count, self.record = count, record

    def __repr__(self) -> str:
        return f"{self.count} of {self.record}"


class Forged:
    """A tensor described by whatever one likes."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (*self.args, False, {})


class Call:
    """Anything that a pickle could call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", torch.FloatStorage, obj.record, "cpu", obj.count) if isinstance(obj, Elements) else None


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def forged(
    path: Path,
    instructions: bytes,
    *,
    elements: bytes = bytes(16),
    compression: int = zipfile.ZIP_STORED,
    alter: Callable[[list[zipfile.ZipInfo]], object] = len,
    directory: int | None = None,
) -> Path:
    """A file whose container and checksum are right, whatever it holds."""
    buffer = io.BytesIO()
    records = {"data.pkl": instructions, "byteorder": sys.byteorder.encode(), "data/0": elements, "version": b"3\n"}
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
        alter(archive.filelist)
    data = buffer.getvalue()[:-22]
    length, start = struct.unpack("<II", buffer.getvalue()[-10:-2])
    count = len(records)
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, directory or length, start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, len(data), 1)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, length, start, ckpt._COMMENT_BYTES)
    digest = hashlib.sha256(data + end).hexdigest().encode()
    path.write_bytes(data + end + ckpt._COMMENT + digest)
    return path


def holding(value: Any) -> bytes:
    return pickled({"format": 1, **content(), "G_A": {"w": value}, "optimizer_G": {}, "history": {}} | PLAIN)


# Parts without tensors, for which the forged files have no records.
PLAIN: dict[str, Any] = {
    **{name: {} for name in ("G_B", "D_A", "D_B")},
    **{name: {"state": {}, "param_groups": []} for name in ("optimizer_G", "optimizer_D")},
    "pools": {name: {"size": 0, "count": 0, "images": None} for name in "AB"},
    "history": {"names": [], "rows": []},
}


def test_forged_files_are_read_when_nothing_is_wrong_with_them(tmp_path: Path) -> None:
    read = read_checkpoint(forged(tmp_path / "a.ckpt", holding(Forged(Elements(4), 1, (3, 1), (1, 3)))))
    assert read["G_A"]["w"].shape == (3, 1)
    read = read_checkpoint(forged(tmp_path / "a.ckpt", holding(Forged(Elements(4), 4, (0, 3), (3, 1)))))
    assert read["G_A"]["w"].shape == (0, 3)


@pytest.mark.parametrize(
    "view",
    [
        (Elements(4), 0, (4,), (-1,)),
        (Elements(4), -1, (2,), (1,)),
        (Elements(4), 3, (2,), (1,)),
        (Elements(4), 1 << 62, (2,), (1,)),
        (Elements(4), 0, (2, 2), (1 << 40, 1)),
        (Elements(4), 0, (1 << 40,), (0,)),
        (Elements(4), 0, (1 << 31, 1 << 31, 1 << 31), (0, 0, 0)),
        (Elements(4), 0, (0, 1 << 47), (0, 0)),
        (Elements(4), 0, (4, 1), (1,)),
        (Elements(4), 0, (2.0,), (1,)),
        (Elements(4), 0, (True,), (1,)),
        (Elements(4), None, (4,), (1,)),
        (Elements(4), 0, 4, 1),
        (Elements(1000), 0, (1000,), (1,)),
        (Elements(1 << 45), 0, (1 << 45,), (1,)),
        (Elements(-4), 0, (4,), (1,)),
        (Elements(4.0), 0, (4,), (1,)),
        (Elements(4, "1"), 0, (4,), (1,)),
        (Elements(4, "../../../etc/passwd"), 0, (4,), (1,)),
        ("storage", 0, (4,), (1,)),
        (),
    ],
    ids=str,
)
def test_tensors_that_do_not_lie_in_their_elements(tmp_path: Path, view: tuple[Any, ...]) -> None:
    path = forged(tmp_path / "a.ckpt", holding(Forged(*view)))
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt (is damaged: .*(tensor|record|elements|take)|has tensors that)"
    ):
        read_checkpoint(path)


def test_views_that_multiply_the_file_are_refused(tmp_path: Path) -> None:
    tensors = [Forged(Elements(250_000), 0, (250_000,), (1,)) for _ in range(50)]
    path = forged(tmp_path / "a.ckpt", holding(tensors), elements=bytes(1_000_000))
    with pytest.raises(CheckpointError, match="more than 4 times its own bytes"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "true"),
        Call(eval, "1"),
        Call(bytearray, 1 << 40),
        Call(torch.Tensor, 1 << 40),
        Call(torch.FloatStorage, 1 << 40),
        Call(torch.device, "cpu"),
        Call(torch._utils._rebuild_parameter, 1, True, {}),
        torch.Size([1]),
        torch.nn.Linear,
        complex(1, 2),
        {1, 2},
        b"bytes",
        np.float64(1.0),
    ],
    ids=lambda call: getattr(call.call[0], "__name__", "call") if isinstance(call, Call) else repr(call),
)
def test_nothing_is_called_or_imported(tmp_path: Path, call: Any) -> None:
    with pytest.raises(CheckpointError, match="more than tensors and plain values, which is never loaded"):
        read_checkpoint(forged(tmp_path / "a.ckpt", holding(call)))


def doubled(levels: int) -> Any:
    value: Any = "lol"
    for _ in range(levels):
        value = [value, value]
    return value


def nested(depth: int) -> bytes:
    """A list in a list in a list: too deep for pickle itself to write."""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def colliding(count: int) -> bytes:
    """A dictionary whose keys have one hash: adding them takes the square of their number."""
    keys = b"".join(b"\x8a\x0b" + (index * (2**61 - 1)).to_bytes(11, "little") + b"N" for index in range(1, count))
    return b"\x80\x02}(" + keys + b"u."


def lying_sizes(records: list[zipfile.ZipInfo]) -> None:
    for record in records:
        record.file_size = record.compress_size = 2_000_000_000


def containing_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@needs_proc
def test_checkpoint_bombs_take_neither_memory_nor_time(tmp_path: Path) -> None:
    def place(name: str) -> Path:
        return tmp_path / f"{name}.ckpt"

    zeros, deflated = bytes(500_000_000), zipfile.ZIP_DEFLATED
    huge = place("huge")
    with huge.open("wb") as file:
        file.seek(1 << 42)
        file.write(ckpt._COMMENT + b"0" * 64)
    cases = {
        forged(place("deflated"), holding(1), elements=zeros, compression=deflated): "compressed records",
        forged(place("lying"), holding(1), alter=lying_sizes): "more bytes than the file has",
        forged(place("directory"), holding(1), directory=1 << 33): "a directory of 8589934592 bytes",
        forged(place("elsewhere"), holding(1), directory=1000): "zip directory is not where",
        forged(place("laughs"), holding(doubled(60))): "more than 1000000 values",
        forged(place("itself"), holding(containing_itself())): "nests them more than 32 deep",
        forged(place("nested"), nested(1_000_000)): "nests them more than 32 deep",
        forged(place("colliding"), colliding(100_000)): "keys that are neither text nor small integers",
        forged(place("endless"), b"\x80\x02" + b"]" * 5_000_000): "more than 4000000 instructions",
        forged(place("no end"), b"\x80\x02]"): "damaged",
        forged(place("long text"), b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"abc."): "damaged",
        huge: "more than this machine's memory",
    }
    results = measured("training.checkpoint", "read_checkpoint", list(cases), limit=1.5e9)
    for (path, words), (said, seconds, grown) in zip(cases.items(), results, strict=True):
        assert said is not None, path
        assert words in said, path
        assert str(path) in said
        assert seconds < 20, path
        assert grown < 500 * MB, path


RIGHT = [("best", 7.5), ("best_measure", "text")]


@pytest.mark.parametrize(
    ("part", "wrong"),
    [pair for pair in itertools.product(ckpt._PARTS, [None, "text", 7.5, [1, [2]]]) if pair not in RIGHT],
    ids=repr,
)
def test_every_part_of_the_wrong_kind_is_refused(tmp_path: Path, part: str, wrong: Any) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, content(**{part: wrong}))
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: its {part} is not a?.*, but "):
        read_checkpoint(path)


ONE = {"lr": 0.1, "params": [0]}


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("format", "1"),
        ("format", torch.ones(2)),
        ("position", {"step": "3"}),
        ("position", {"step": -1}),
        ("position", {"step": True}),
        ("position", {"step": 3, "steps_per_epoch": 0}),
        ("position", {}),
        ("best", torch.zeros(1)),
        ("best", float("nan")),
        ("config", {1: 2}),
        ("G_A", {"w": [1.0]}),
        ("G_A", {"w": torch.arange(3)}),
        ("G_A", {3: torch.zeros(1)}),
        ("pools", {"A": {"size": 1, "count": 0, "images": None}}),
        ("pools", {key: {"size": 1, "count": 1, "images": torch.zeros(3)} for key in "AB"}),
        ("pools", {key: {"size": -1, "count": 0, "images": None} for key in "AB"}),
        ("pools", {key: {"size": 1, "count": 1, "images": ["x"]} for key in "AB"}),
        ("pools", {key: {"size": 1, "count": 1} for key in "AB"}),
        ("history", {"names": ["a"], "rows": [torch.zeros(2)]}),
        ("history", {"names": [1], "rows": []}),
        ("data", {"count_A": 1, "count_B": 1, "names": 5}),
        ("optimizer_G", {"state": {0: {"exp_avg": 1.0}}, "param_groups": [ONE]}),
        ("optimizer_G", {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": [ONE]}),
        ("optimizer_G", {"state": {0: {"step": torch.zeros(4, 3)}}, "param_groups": [ONE]}),
        ("optimizer_D", {"state": {4: {"exp_avg": torch.zeros(4, 3)}}, "param_groups": [ONE]}),
        ("optimizer_D", {"state": {}, "param_groups": [1]}),
    ],
    ids=str,
)
def test_parts_with_wrong_values_inside_are_refused(tmp_path: Path, part: str, wrong: Any) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"format": 1, **content(**{part: wrong})}, path)
    ckpt._append_checksum(path)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt.* {part} "):
        read_checkpoint(path)


def test_a_whole_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, saved = tmp_path / "a.ckpt", content()
    write_checkpoint(path, saved)
    read = read_checkpoint(path)
    assert {**read, "G_A": 0, "G_B": 0, "D_A": 0, "D_B": 0}.keys() == {"format": 1, **saved}.keys()
    assert read["config"] == saved["config"]
    assert torch.equal(read["optimizer_G"]["state"][2]["exp_avg"], torch.ones(4, 3))
    assert torch.equal(read["pools"]["B"]["images"][0], torch.zeros(1, 3, 2, 2))
    assert read["best"] == float("inf")


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    base = torch.arange(24.0).reshape(2, 3, 4)
    views = {"all": base, "part": base[1, :, 1:], "turned": base.permute(2, 0, 1), "none": base[:0]}
    kinds = [torch.bfloat16, torch.float16, torch.float64]
    write_checkpoint(path, content(G_A={**views, **{str(kind): base.to(kind) for kind in kinds}}, optimizer_G=EMPTY))
    read = read_checkpoint(path)["G_A"]
    for name, view in views.items():
        assert torch.equal(read[name], view)
        assert read[name].stride() == view.stride()
    assert read["all"].untyped_storage().data_ptr() == read["part"].untyped_storage().data_ptr()
    for kind in kinds:
        assert torch.equal(read[str(kind)], base.to(kind))


EMPTY = {"state": {}, "param_groups": []}


def test_what_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, content())
    before = path.read_bytes()
    monkeypatch.setattr(tensor_file, "DIRECTORY_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*a\.ckpt: .* at most 1000"):
        write_checkpoint(path, content())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")  # opening it would wait for ever
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    for name, words in {
        "": "it is a folder",
        "pipe.ckpt": "it is no file",
        "loop.ckpt": "symbolic links",
        "zero\0byte": "null",
    }.items():
        with pytest.raises(CheckpointError, match=f"there is no checkpoint .*{words}"):
            read_checkpoint(tmp_path / name)
    run = tmp_path / "run"
    ckpt.step_path(run, 7).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        ckpt.read_latest(run)
    ckpt.step_path(run, 8).mkdir()
    ckpt.prune(run, keep=1)  # a folder is not removed, and no reason to stop


@pytest.mark.parametrize("setting", [("blocks", 10**9), ("blocks", 3), ("ngf", 10**12), ("ngf", 10**30)], ids=str)
def test_a_model_that_the_weights_cannot_be_is_not_built(tmp_path: Path, setting: tuple[str, int]) -> None:
    config = from_dict({"model": {"ngf": 4, "blocks": 1}})
    G_A, G_B = build_generators(config.model)
    tree = to_dict(config)
    tree["model"][setting[0]] = setting[1]
    path = tmp_path / "a.ckpt"
    position = {"step": 1}
    write_checkpoint(path, {"config": tree, "G_A": G_A.state_dict(), "G_B": G_B.state_dict(), "position": position})
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        load(path, device="cpu")


# --- weights of others ------------------------------------------------------------------------------------------------


def legacy(
    path: Path, value: bytes, *, names: list[str] | None = None, elements: bytes = bytes(16), count: int = 4
) -> Path:
    """A file as PyTorch wrote it until 1.5, whatever it holds."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (tensor_file._LEGACY_MAGIC, 1001, machine))
    rest = pickle.dumps(["0"] if names is None else names, protocol=2) + struct.pack("<q", count) + elements
    path.write_bytes(head + value + rest)
    return path


class OldPickler(pickle.Pickler):
    """Describes the elements of a tensor as it was until PyTorch 1.5, by six values."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Elements):
            return None
        return ("storage", torch.FloatStorage, obj.record, "cpu", obj.count, None)


def old(value: Any) -> bytes:
    buffer = io.BytesIO()
    OldPickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def safetensors_header(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(16))
    return path


def test_legacy_files_are_read_when_nothing_is_wrong_with_them(tmp_path: Path) -> None:
    path = legacy(tmp_path / "a.pth", old({"w": Forged(Elements(4), 1, (3, 1), (1, 3))}), elements=bytes(range(16)))
    read, name = tensor_file.read_tensors(path)
    assert name == "torch.save before PyTorch 1.6"
    assert read["w"].shape == (3, 1)
    assert read["w"].numpy().tobytes() == bytes(range(4, 16))


@pytest.mark.parametrize(
    "value",
    [
        *(Call(os.system, "true"), Call(eval, "1"), Call(bytearray, 1 << 40), Call(torch.Tensor, 1 << 40)),
        *(torch.nn.Linear, complex(1, 2), {1, 2}, b"bytes", Call(torch._utils._rebuild_parameter, 1, True, {})),
    ],
    ids=lambda call: getattr(call.call[0], "__name__", "call") if isinstance(call, Call) else repr(call),
)
@pytest.mark.parametrize("write", [forged, legacy], ids=["zip", "legacy"])
def test_weights_run_nothing(write: Callable[..., Path], value: Any, tmp_path: Path) -> None:
    instructions = (pickled if write is forged else old)({"model.0.weight": value})
    path = (
        write(tmp_path / "a.pth", instructions)
        if write is forged
        else write(tmp_path / "a.pth", instructions, names=[])
    )
    if write is forged:
        path.write_bytes(path.read_bytes()[: -ckpt._COMMENT_BYTES - 2] + bytes(2))
    with pytest.raises(WeightsError, match=r"a\.pth holds more than tensors and plain values, which is never loaded"):
        load(path)


@needs_proc
def test_weights_bombs_take_neither_memory_nor_time(tmp_path: Path) -> None:
    def place(name: str, suffix: str = "pth") -> Path:
        return tmp_path / f"{name}.{suffix}"

    def zipped(name: str, *arguments: Any, **options: Any) -> Path:
        path = forged(place(name), *arguments, **options)
        path.write_bytes(path.read_bytes()[: -ckpt._COMMENT_BYTES - 2] + bytes(2))  # without a comment
        return path

    one = Forged(Elements(4), 0, (4,), (1,))
    wide = Forged(Elements(4), 0, (1 << 45, 3, 7, 7), (0, 0, 0, 0))
    huge, whole = Forged(Elements(1 << 40), 0, (4,), (1,)), place("whole")
    torch.save({"model.1.weight": torch.zeros(1000)}, whole)
    cut, huge_file = place("cut"), place("huge")
    cut.write_bytes(whole.read_bytes()[:-500])
    with huge_file.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(1 << 42)
        file.write(b"\0")
    os.mkfifo(place("pipe"))
    blocks = {
        f"model.{10 + i}.conv_block.1.weight": Forged(Elements(4), 0, (0, 0, 3, 3), (1, 1, 1, 1)) for i in range(3_000)
    }
    cases = {
        zipped("deflated", holding(1), elements=bytes(50_000_000), compression=zipfile.ZIP_DEFLATED): "compressed",
        zipped("laughs", pickled({"a": doubled(60)})): "more than 1000000 values",
        zipped("declared", pickled({"model.1.weight": huge})): "do not take 16 bytes",
        zipped("repeated", pickled({"model.0.weight": wide})): "does not lie",
        zipped("blocks", pickled(blocks)): "3000 residual blocks; at most 1000 are read",
        legacy(place("old declared"), old({"w": huge})): "do not lie at byte",
        legacy(place("old count"), old({"w": one}), count=1 << 50): "do not lie at byte",
        legacy(place("old names"), old({"w": one}), names=["0", "1"]): "does not list the storages",
        legacy(place("old cut"), old({"w": one}), elements=bytes(15)): "do not lie at byte",
        legacy(place("old laughs"), old(doubled(60))): "does not list the storages",
        safetensors_header(place("header", "safetensors"), b"{", 1 << 40): "a header of 1099511627776 bytes",
        safetensors_header(
            place("beyond", "safetensors"),
            json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode(),
        ): "is damaged",
        safetensors_header(place("no json", "safetensors"), b"{" * 100_000): "is damaged",
        cut: "is damaged",
        huge_file: "more than this machine's memory",
        place("pipe"): "it is no file",
    }
    if importlib.util.find_spec("safetensors") is None:
        cases = {path: words for path, words in cases.items() if path.suffix == ".pth"}
    results = measured("inference.translate", "load", list(cases), limit=1.5e9)
    for (path, words), (said, seconds, grown) in zip(cases.items(), results, strict=True):
        assert said is not None, path
        assert words in said, (path, said)
        assert str(path) in said
        assert seconds < 20, path
        assert grown < 500 * MB, path


def test_every_damage_to_weights_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Bytes changed and files cut at many places: an error of ours, or a file that is still read."""
    G_A, _ = build_generators(from_dict({"model": {"ngf": 1, "blocks": 1}}).model)
    rng = np.random.default_rng(0)
    for modern in (True, False):
        torch.save(G_A.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=modern)
        whole = (tmp_path / "a.pth").read_bytes()
        for trial in range(150):
            data = bytearray(whole)
            if trial % 3:
                # Where instructions stand: at the beginning, and in a zip file at the end too.
                for place in rng.integers(0, 2000, 4) * (-1 if modern and trial % 2 else 1):
                    data[int(place)] = int(rng.integers(256))
            else:
                del data[int(rng.integers(len(data))) :]
            (tmp_path / "b.pth").write_bytes(data)
            with contextlib.suppress(InputError):
                load(tmp_path / "b.pth", device="cpu")


# --- settings ---------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{n}: &{n} [*{m}, *{m}]\n" for m, n in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{n}: &{n} {{<<: [*{m}, *{m}]}}\n" for m, n in zip("abcdefghij", "bcdefghijk", strict=True)
)
SETTINGS: dict[str, tuple[str | bytes, str]] = {
    "laughs": (LAUGHS + "training: {lr: *n}\n", "not valid YAML.*aliases are not read"),
    "merges": (MERGES, "not valid YAML.*aliases are not read"),
    "merge": ("training: {<<: {lr: 1}}", "not valid YAML.*merge keys are not read"),
    "nested": ("[" * 90_000, "not valid YAML.*more than 16 levels"),
    "nested blocks": ("- " * 45_000, "not valid YAML.*more than 16 levels"),
    "nested in fields": ("a: " + "{a: " * 20_000, "not valid YAML.*more than 16 levels"),
    "twice": ("training:\n  lr: 1\n  batch: 2\n  lr: 3\n", "not valid YAML.*the field lr is given twice"),
    "twice, quoted": ("name: a\n'name': b\n", "not valid YAML.*the field name is given twice"),
    "month": ("seed: 2001-13-45", "not valid YAML.*month must be in"),
    "digits": ("seed: " + "9" * 90_000, "not valid YAML.*(limit|digits)"),
    "hexadecimal": ("seed: 0x" + "f" * 90_000, "seed = a int too long to write is not allowed"),
    "a large number": ("model: {blocks: 1000000000000}", "model.blocks = 1000000000000 is not allowed.*to 1000"),
    "a large float": ("training: {batch: 1e300}", "training.batch = .*is not allowed"),
    "infinite": ("training: {batch: .inf}", "training.batch = inf is not allowed"),
    "sixty": ("seed: 1" + ":59" * 20_000, "seed = .* is not allowed|not valid YAML"),
    "object": ("name: !!python/object/apply:os.system [exit]", "not valid YAML.*could not determine a constructor"),
    "name": ("!!python/name:os.system ''", "not valid YAML.*could not determine a constructor"),
    "binary": ("name: !!binary aGFsbG8=", "name = b'hallo' is not allowed"),
    "set": ("? name\n? seed\n", "name = None is not allowed"),
    "list as key": ("[a]: b", "not valid YAML.*unhashable key"),
    "number as key": ("1: b", "unknown field 1"),
    "long key": ("x" * 120 + ": 1", "unknown field xxx"),
    "zero byte": ('name: "a\\0b"', "name = 'a.x00b' is not allowed"),
    "raw zero byte": (b"name: a\0b", "not valid YAML.*special characters"),
    "two documents": ("name: a\n---\nname: b\n", "not valid YAML.*single document"),
    "not UTF-8": (b"name: \xff\xfe", "not a text file in UTF-8"),
    "UTF-16": ("name: a".encode("utf-16"), "not a text file in UTF-8"),
    "long": (b"#" * 100_001, "has 100001 bytes; a configuration has at most 100000"),
    "outside": ("name: ../../etc", "one folder name"),
    "absolute": ("name: /etc", "one folder name"),
}


@needs_proc
def test_settings_made_to_harm_take_neither_memory_nor_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.yaml" for index in range(len(SETTINGS))]
    for path, (text, _) in zip(paths, SETTINGS.values(), strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(1 << 36)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    special = {
        tmp_path / "sparse.yaml": "at most 100000",
        tmp_path / "pipe.yaml": "it is not a regular file",
        tmp_path / "folder.yaml": "it is a folder",
        Path("/dev/zero"): "it is not a regular file",
    }
    expected = {**dict(zip(paths, (words for _, words in SETTINGS.values()), strict=True)), **special}
    results = measured("config", "load_config", list(expected), limit=1e9)
    for (path, words), (said, seconds, grown) in zip(expected.items(), results, strict=True):
        assert said is not None, words
        assert re.search(words, said, re.DOTALL), said
        assert str(path) in said
        assert len(said) < 1000
        assert seconds < 5, words
        assert grown < 100 * MB, words


@pytest.mark.parametrize("text", ["2001-13-45", "[" * 5000, "&a [*a]", "9" * 5000, '"a\\0"', "{a: 1, a: 2}"], ids=str)
def test_overrides_made_to_harm(text: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        load_config(None, [f"name={text}"])


def test_a_configuration_of_shared_parts_has_a_short_message() -> None:
    with pytest.raises(ConfigError, match=r"training\.lr = ") as error:
        from_dict({"training": {"lr": doubled(60)}})
    assert len(str(error.value)) < 1000


# --- pictures ---------------------------------------------------------------------------------------------------------


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def picture(path: Path, width: int = 20, height: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="PNG" if path.suffix == ".png" else "JPEG")
    return path


def jpeg_of_many_scans(path: Path, side: int, scans: int) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x05\x01"  # of no data: the decoder goes over all blocks nevertheless
    return written(path, buffer.getvalue()[:-2] + scan * scans + b"\xff\xd9")


def tiff_of_pages(path: Path, pages: int) -> Path:
    """Pages of 4 x 4 pixels, all but the first said to be smaller versions of it."""
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for page in range(pages):
        tags = [(254, 1)] if page else []
        tags += [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 8), (278, 4), (279, 16)]
        data += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        data += struct.pack("<I", len(data) + 4 if page < pages - 1 else 0)
    return written(path, bytes(data))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in (header, *chunks)]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def of_size(path: Path, head: bytes, size: int) -> Path:
    with written(path, head).open("r+b") as file:
        file.truncate(size)
    return path


@needs_proc
def test_pictures_made_to_harm_take_neither_memory_nor_time(tmp_path: Path) -> None:
    bmp = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0)
    tiff_size = struct.pack("<H", 2) + struct.pack("<HHIIHHII", 256, 4, 1, 2**31, 257, 4, 1, 2**31) + bytes(4)
    heif = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    late_exif = png(4, 4, (b"IDAT", zlib.compress(bytes(52)))) + struct.pack(">I", 2**31 - 1) + b"eXIfabcd"
    cases = {
        jpeg_of_many_scans(tmp_path / "scans.jpg", 4000, 50_000): "more than 100 scans",
        tiff_of_pages(tmp_path / "pages.tif", 50_000): "document of more than 100 pages",
        written(tmp_path / "huge.bmp", bmp): "2147483647x2147483647 is .* above the limit",
        written(tmp_path / "huge.ppm", b"P6\n100000 100000\n255\n"): "100000x100000 is .* above the limit",
        written(tmp_path / "huge.tif", b"II*\0\x08\0\0\0" + tiff_size): ".",
        written(tmp_path / "huge.png", png(2**31 - 1, 2**31 - 1, (b"IDAT", b""))): "above the limit",
        written(tmp_path / "empty.ppm", b"P6\n17000 17000\n255\n"): ".",
        written(tmp_path / "late.png", late_exif): ".",
        of_size(tmp_path / "sparse.heic", heif, 1 << 36): "a HEIF file of 68719 MB, above the limit of 400",
        of_size(tmp_path / "sparse.webp", b"RIFF\0\0\0\0WEBPVP8 ", 1 << 36): "a WEBP file of 68719 MB",
        of_size(tmp_path / "sparse.jpg", b"\xff\xd8\xff\xe0", 1 << 36): "a JPEG file of 68719 MB",
        of_size(
            tmp_path / "sparse.tif", b"II*\0\x08\0\0\0", 1 << 36
        ): "a TIFF file of 68719 MB, above the limit of 4000",
    }
    results = measured("data.photo", "open_photo", list(cases), limit=2.5e9)
    for (path, words), (said, seconds, grown) in zip(cases.items(), results, strict=True):
        assert said is not None, path
        assert re.search(words, said), said
        assert str(path) in said
        assert seconds < 5, path
        assert grown < 200 * MB, path


def test_usual_progressive_pictures_and_pyramids_are_read(tmp_path: Path) -> None:
    assert open_photo(jpeg_of_many_scans(tmp_path / "a.jpg", 64, 20)).image.size == (64, 64)
    assert read_header(tiff_of_pages(tmp_path / "a.tif", 20)).width == 4
    with pytest.raises(PhotoError, match="document of more than 100 pages"):
        read_header(tiff_of_pages(tmp_path / "b.tif", 101))
    # What looks like scans in the data that a phone appends to its picture is none of its own.
    path = jpeg_of_many_scans(tmp_path / "motion.jpg", 64, 0)
    path.write_bytes(path.read_bytes() + b"\xff\xda" * 5000)
    assert open_photo(path).image.size == (64, 64)


@needs_proc
def test_memory_of_the_largest_pictures_is_bounded_by_their_pixels(tmp_path: Path) -> None:
    pixels = 3000 * 2500
    paths = []
    for mode in ("F", "I", "I;16", "RGB", "RGBA", "CMYK", "LAB"):
        paths.append(tmp_path / f"{mode.replace(';', '')}.tif")
        Image.new(mode, (3000, 2500)).save(paths[-1], compression="tiff_adobe_deflate")
    for path in paths:
        ((said, _, grown),) = measured("data.photo", "open_photo", [path], limit=2e9)
        assert said is None
        assert grown < 20 * pixels + 120 * MB, path  # and the bands and the tables of the colour conversion


def test_an_enormous_profile_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "a.tif", icc_profile=bytes(17_000_000))
    assert open_photo(tmp_path / "a.tif").image.getpixel((0, 0)) == (9, 8, 7)
    assert "its colour profile is ignored: it has 17 MB, above the limit of 16" in caplog.text


# --- names and links --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translator() -> Translator:
    G_A, G_B = build_generators(from_dict({"model": {"ngf": 4, "blocks": 1}}).model)
    return Translator(G_A, G_B, device="cpu", precision="fp32")


def run(translator: Translator, inputs: list[Any], out: Path, **options: Any) -> Any:
    return translate_files(translator, inputs, out, progress=False, **options)


def test_outputs_never_leave_the_output_folder(tmp_path: Path, translator: Translator) -> None:
    inside, secret, out = tmp_path / "in", tmp_path / "secret", tmp_path / "out"
    picture(inside / "sub" / "a.png")
    picture(inside / "b.png")
    secret.mkdir()
    out.mkdir()
    (out / "sub").symlink_to(secret)
    result = run(translator, [inside], out)
    assert [path.name for path in result.done] == ["b.png"]
    assert "lies outside of" in result.failed[0][1]
    assert list(secret.iterdir()) == []


def test_patterns_cannot_climb(tmp_path: Path, translator: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "in" / "x" / "a.png")
    picture(tmp_path / "other" / "a.png")
    for pattern in (tmp_path / "in" / "x*" / ".." / ".." / "other" / "*.png", tmp_path / "i*" / ".." / "other" / "*"):
        result = run(translator, [pattern], tmp_path / "deep" / "out")
        assert result.done == []
        assert "`..` cannot follow a wildcard" in result.failed[0][1]
    monkeypatch.chdir(tmp_path / "in")
    result = run(translator, ["../other/a.png", "../in/x/*.png", tmp_path / "other"], tmp_path / "out")
    assert all(path.parent == tmp_path / "out" for path in result.done)
    assert len(result.done) == 1
    assert all("is that of" in reason for _, reason in result.failed)


def test_links_to_their_own_folder_end(tmp_path: Path, translator: Translator) -> None:
    picture(tmp_path / "in" / "a.png")
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(".")
    (tmp_path / "in" / "self.png").symlink_to("self.png")
    for pattern in ("in", "in/**/*.png", "in/**/**/**/*.png", "in/**"):
        result = run(translator, [tmp_path / pattern], tmp_path / f"out{len(pattern)}")
        assert [path.name for path in result.done] == ["a.png"]
    assert [path.name for path in list_images(tmp_path / "in")] == ["a.png", "self.png"]


def test_strange_names_are_files_like_others(tmp_path: Path, translator: Translator) -> None:
    names = ["-rf.png", "new\nline.png", "bell\x07.png", "\x1b[2J.png", "x" * 251 + ".png", "花" * 83 + ".png"]
    names += [os.fsdecode(b"caf\xe9.png"), " .png", "..png", "a..png", "%s.png", "{x}.png", "~.png"]
    for name in names:
        picture(tmp_path / "in" / name)
    result = run(translator, [tmp_path / "in"], tmp_path / "out")
    expected = {name for name in names if name[0] != "."}
    assert {path.name for path in result.done} == expected, result.failed
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected


@pytest.mark.parametrize(
    "name",
    ["zero\0byte", "~nobody-of-this-name/*.png", "x" * 5000, "/dev/zero", "[" * 2000, "\udcff", "", "."],
    ids=repr,
)
def test_inputs_that_cannot_be_are_failures_of_their_own(tmp_path: Path, translator: Translator, name: str) -> None:
    good = picture(tmp_path / "good.png")
    (tmp_path / "empty").mkdir()
    os.chdir(tmp_path / "empty")
    result = run(translator, [name, good], tmp_path / "out")
    assert [path.name for path in result.done] == ["good.png"]
    assert len(result.failed) == 1


def test_an_output_folder_that_cannot_be(tmp_path: Path, translator: Translator) -> None:
    for name in ("zero\0byte", "x" * 5000):
        with pytest.raises(InputError, match="cannot create the output folder"):
            run(translator, [picture(tmp_path / "a.png")], tmp_path / name)


def test_messages_do_not_repeat_what_a_terminal_would_obey(tmp_path: Path) -> None:
    name = "\x1b[2J\u202e" + os.fsdecode(b"\xff") + "\n.jpg"
    path = written(tmp_path / "trainA" / name, b"no picture")
    with pytest.raises(PhotoError) as error:
        open_photo(path)
    picture(tmp_path / "trainA" / "a.jpg")
    picture(tmp_path / "trainB" / "a.jpg")
    with pytest.raises(DataError) as refusal:
        scan_dataset(tmp_path)
    for text in (str(error.value), str(refusal.value), report(scan_dataset(tmp_path, unreadable="skip"))):
        assert r"\x1b[2J\u202e\udcff\n.jpg" in text
        assert all(character.isprintable() or character == "\n" for character in text)
        text.encode("utf-8")
    assert str(InputError("one\ntwo\x1b")) == "one\ntwo\\x1b"
    assert shown("Blüte 花.jpg") == "Blüte 花.jpg"


def test_saving_is_not_led_astray_by_links(tmp_path: Path) -> None:
    victim = written(tmp_path / "victim", b"precious")
    (tmp_path / "a.png").symlink_to(victim)
    save_photo(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "a.png").is_symlink()


# --- data folders and stores ------------------------------------------------------------------------------------------

PREPROCESS = Preprocess("resize_and_crop", 16, 8, "bicubic", 3)


def test_folders_deeper_than_python_recurses(tmp_path: Path) -> None:
    home, depth = Path.cwd(), 1200
    os.chdir(tmp_path)
    try:
        for _ in range(depth):
            Path("d").mkdir()
            os.chdir("d")
        picture(Path("a.png"))
    finally:
        os.chdir(home)
    assert len(list_images(tmp_path)) == 1
    for _ in range(2):  # shutil.rmtree recurses too
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_narrow_pictures_that_would_become_enormous(tmp_path: Path) -> None:
    Image.new("L", (1, 20_000)).save(tmp_path / "a.png")
    entries = scan_folder(tmp_path, split="trainA").entries
    with pytest.raises(DataError, match=r"a\.png: 1 x 20000 becomes 286 x 5720000"):
        open_store(entries, Preprocess("scale_width", 286, 256, "bicubic", 3), cache=tmp_path / "cache", split="trainA")
    assert MAX_PIXELS < 286 * 5_720_000


def change(key: str, value: Any) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, key: value}))

    return apply


def as_pipe(name: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


@pytest.mark.parametrize(
    "poison",
    [
        change("sizes", [[-16, -16], [16, 16]]),
        change("sizes", [[2**32, 2**32], [16, 32]]),
        change("sizes", [[1, 256], [16, 16]]),
        change("sizes", [[512, 1]]),
        change("sizes", "many"),
        change("names", ["b.png", "a.png"]),
        change("names", ["a.png"]),
        change("names", ["../../etc/passwd", "b.png"]),
        change("names", 5),
        change("channels", -3),
        change("channels", 1),
        change("channels", "3"),
        change("bytes", -1),
        change("left_out", 7),
        change("left_out", [["c.png"]]),
        change("left_out", [["a.png", "was never there"]]),
        change("key", None),
        lambda folder: (folder / "index.json").write_text("[" * 100_000),
        lambda folder: (folder / "index.json").write_text("[1]"),
        lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe"),
        lambda folder: os.truncate(folder / "index.json", 1 << 36),
        as_pipe("index.json"),
        as_pipe("data.bin"),
    ],
)
def test_a_poisoned_store_is_built_again(
    tmp_path: Path, poison: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    picture(tmp_path / "trainA" / "a.png")
    picture(tmp_path / "trainA" / "b.png")
    entries = scan_folder(tmp_path / "trainA", split="trainA").entries
    first = open_store(entries, PREPROCESS, cache=tmp_path / "cache", split="trainA", workers=1)
    right = [np.array(first[index]) for index in (0, 1)]
    poison(first.path)
    again = open_store(entries, PREPROCESS, cache=tmp_path / "cache", split="trainA", workers=1)
    assert "is damaged and will be built again" in caplog.text
    assert again.names == ["a.png", "b.png"]
    for index in (0, 1):
        assert (again[index] == right[index]).all()


def test_only_folders_of_builders_are_cleared_away(tmp_path: Path) -> None:
    for name in ("work.tmp", "trainA-notes.tmp", f"x-{'g' * 32}-{'0' * 8}.tmp"):
        written(tmp_path / name / "thesis.txt", b"years")
    left = tmp_path / f"trainA-{'0' * 32}-{'1' * 8}.tmp"
    written(left / "data.bin", b"half")
    target = tmp_path / "elsewhere"
    written(target / "thesis.txt", b"years")
    link = tmp_path / f"trainA-{'0' * 32}-{'2' * 8}.tmp"
    link.symlink_to(target)
    store_module._remove_leftovers(tmp_path, mine="other")
    assert not left.exists()
    assert (target / "thesis.txt").exists()
    assert len(list(tmp_path.glob("*.tmp/thesis.txt"))) == 4
