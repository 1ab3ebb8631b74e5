"""Random and randomly damaged settings and checkpoints: their readers give a result or an InputError, nothing else.

The examples are the same in every run.
"""

from __future__ import annotations

import hashlib
import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cyclegan_fast.config import Config, ConfigError, describe, from_dict, load_config, to_dict, to_yaml
from cyclegan_fast.errors import InputError
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training.checkpoint import read_checkpoint, write_checkpoint

bounded = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

SETTINGS = [name for name, *_ in describe()]

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
some_settings = st.dictionaries(st.sampled_from(SETTINGS), plain, min_size=1, max_size=4)


def as_tree(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, last = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[last] = value
    return tree


def outcome(read_file: Callable[[Path], Any], path: Path) -> Any:
    """What is read, if anything; any exception but an InputError that names the file fails the test."""
    try:
        return read_file(path)
    except InputError as error:
        if str(path) not in str(error):
            raise
        return None


def checked(config: Config) -> None:
    """A configuration that was accepted survives being written and read."""
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


@bounded
@given(some_settings)
def test_settings_of_any_value(flat: dict[str, Any]) -> None:
    try:
        config = from_dict(as_tree(flat))
    except ConfigError:
        return
    checked(config)


@bounded
@given(plain)
def test_trees_of_any_shape(tree: Any) -> None:
    try:
        config = from_dict(tree)
    except ConfigError:
        return
    checked(config)


@bounded
@given(st.text(max_size=60) | st.text(alphabet="[]{}:,-&*!|>%@`'\"# \n\tab01.<?~", max_size=60))
def test_configuration_files_of_any_text(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    config = outcome(load_config, file)
    if config is not None:
        checked(config)


@bounded
@given(st.binary(max_size=80))
def test_configuration_files_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(data)
    config = outcome(load_config, file)
    if config is not None:
        checked(config)


@bounded
@given(st.sampled_from(SETTINGS), st.text(max_size=20))
def test_overrides_of_any_text(name: str, text: str) -> None:
    try:
        checked(load_config(None, [f"{name}={text}"]))
    except ConfigError:
        return


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small checkpoint."""
    path = tmp_path_factory.mktemp("fuzz") / "a.ckpt"
    weights = {"w": torch.arange(12.0).reshape(4, 3), "b": torch.zeros(4)}
    moments = {index: {"step": torch.tensor(1.0), "exp_avg": w} for index, w in enumerate([*weights.values()] * 2)}
    write_checkpoint(
        path,
        {
            "config": {"model": {"ngf": 4}},
            "G_A": weights,
            "G_B": weights,
            "position": {"step": 3, "steps_per_epoch": 6, "pairs_per_step": 1},
            "optimizer_G": {"state": moments, "param_groups": [{"params": [0, 1, 2, 3]}]},
            "pools": {name: {"size": 1, "count": 1, "images": torch.zeros(1, 1, 1, 1)} for name in "AB"},
            "best": 1.0,
        },
    )
    return path.read_bytes()


def signed(data: bytes | bytearray) -> bytes:
    """The file with a checksum that is right again."""
    body = bytes(data[: -ckpt._COMMENT_BYTES])
    return body + ckpt._COMMENT + hashlib.sha256(body).hexdigest().encode()


def read(path: Path) -> dict[str, Any] | None:
    return outcome(read_checkpoint, path)


damage = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=6)


@bounded
@given(damage)
def test_any_damage_to_a_checkpoint_is_seen(tmp_path: Path, whole: bytes, damage: list[tuple[int, int]]) -> None:
    data, path = bytearray(whole), tmp_path / "a.ckpt"
    for place, value in damage:
        data[place % len(data)] = value
    path.write_bytes(data)
    assert (read(path) is None) == (bytes(data) != whole)


@bounded
@given(damage)
def test_damage_under_a_right_checksum(tmp_path: Path, whole: bytes, damage: list[tuple[int, int]]) -> None:
    data, path = bytearray(whole), tmp_path / "a.ckpt"
    for place, value in damage:
        data[place % (len(data) - ckpt._COMMENT_BYTES)] = value
    path.write_bytes(signed(data))
    read(path)


def repacked(whole: bytes, instructions: bytes) -> bytes:
    """The checkpoint with other instructions; container, checksums and tensors are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            is_it = record.filename.endswith("data.pkl")
            new.writestr(record.filename, instructions if is_it else old.read(record))
        count = len(old.infolist())
    data = buffer.getvalue()[:-22]
    length, start = struct.unpack("<II", buffer.getvalue()[-10:-2])
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, len(data), 1)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, length, start, ckpt._COMMENT_BYTES)
    return signed(data + end + bytes(ckpt._COMMENT_BYTES))


def instructions_of(whole: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@bounded
@given(damage)
def test_damaged_instructions(tmp_path: Path, whole: bytes, damage: list[tuple[int, int]]) -> None:
    data, path = bytearray(instructions_of(whole)), tmp_path / "a.ckpt"
    path.write_bytes(repacked(whole, bytes(data)))
    assert read(path) is not None  # what follows is refused for the damage alone
    for place, value in damage:
        data[place % len(data)] = value
    path.write_bytes(repacked(whole, bytes(data)))
    read(path)


@bounded
@given(st.lists(st.sampled_from([opcode.code for opcode in pickletools.opcodes]), max_size=30), st.binary(max_size=30))
def test_any_instructions(tmp_path: Path, whole: bytes, codes: list[str], rest: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(repacked(whole, "".join(codes).encode("latin-1") + rest + b"."))
    assert read(path) is None


@bounded
@given(st.data())
def test_instructions_in_another_order(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    old, path = instructions_of(whole), tmp_path / "a.ckpt"
    starts = [position for _, _, position in pickletools.genops(old)]
    parts = [old[a:b] for a, b in zip(starts, [*starts[1:], len(old)], strict=True)]
    for _ in range(data.draw(st.integers(1, 4))):
        a, b = (data.draw(st.integers(0, len(parts) - 1)) for _ in range(2))
        parts[a], parts[b] = parts[b], parts[a]
    path.write_bytes(repacked(whole, b"".join(parts)))
    read(path)


@bounded
@given(st.binary(max_size=300))
def test_checkpoint_files_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(data)
    assert read(path) is None
    path.write_bytes(signed(data + bytes(ckpt._COMMENT_BYTES)))
    assert read(path) is None
