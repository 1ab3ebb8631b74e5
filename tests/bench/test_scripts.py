"""The benchmarks run, at toy sizes: what they write has what the documents need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Script = Callable[..., None]


def outputs(folder: Path) -> list[object]:
    """Options for the two files, and for few rounds with toy networks."""
    return ["--small", "--rounds", 2, "--out", folder / "out.json", "--markdown", folder / "deeper" / "out.md"]


def written(folder: Path) -> tuple[dict[str, Any], str]:
    """A script's JSON and its Markdown."""
    return json.loads((folder / "out.json").read_text()), (folder / "deeper" / "out.md").read_text()


def test_step(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--match", "^.a. de-facto fp32 eager|^ours fp32 eager", "--batch", "2", "--identity", "0")
    script("step.py", *outputs(tmp_path), *options)
    (content, markdown), said = written(tmp_path), capsys.readouterr().err
    assert content["provenance"]["torch"]
    small = {"ngf": 8, "ndf": 8, "blocks": 2, "layers": 2}
    assert content["task"] == {"batch": 2, "size": 64, "identity": 0.0, **small}
    (group,) = content["batches"]
    assert group["flop"] > 0
    rows = {row["name"]: row for row in group["rows"]}
    assert set(rows) == {"(a) de-facto fp32 eager", "ours fp32 eager"}
    for row in rows.values():
        assert row["error"] == ""
        assert row["ms"] > 0
        assert len(row["seconds"]) == 2
        assert row["profile"]["kernels"] > 100
    assert "| ours fp32 eager |" in markdown
    assert "× (a)" in markdown
    assert "| 1.00 |" in markdown  # (a) against itself
    assert "## A step of ours fp32 eager, batch 2" in markdown
    assert "building" in said


def test_step_lists_what_there_was_no_time_for(bench: Path, tmp_path: Path) -> None:
    """As a program of its own, which finds what it imports."""
    command = [sys.executable, bench / "step.py", *map(str, outputs(tmp_path)), "--seconds", "0"]
    subprocess.run(command, check=True, timeout=280)
    content, markdown = written(tmp_path)
    (group,) = content["batches"]
    assert len(group["rows"]) >= 6
    assert all(row["error"] == "not run: out of time" for row in group["rows"])
    assert "* ours fp32 eager: not run: out of time" in markdown


def test_translate(script: Script, tmp_path: Path) -> None:
    options = ("--match", "^.a. de-facto fp32 eager|^ours fp32 (eager|translator)")
    script("translate.py", *outputs(tmp_path), *options)
    content, markdown = written(tmp_path)
    (group,) = content["sizes"]
    assert (group["height"], group["width"]) == (64, 64)
    assert group["flop"] > 0
    assert {row["name"] for row in group["rows"] if row["ms"]} == {
        *("(a) de-facto fp32 eager", "ours fp32 eager", "ours fp32 translator"),
    }
    assert "## A translation by ours fp32" in markdown


def test_photo_adds_to_what_was_measured(script: Script, tmp_path: Path) -> None:
    """Each way in a process of its own, whose memory is measured: the script's own doing."""
    out, markdown = tmp_path / "photo.json", tmp_path / "photo.md"
    options = ("--small", "--add", "--sizes", "0.2", "--out", out)
    for ways in ("whole,bands", "least,scaled"):
        script("photo.py", *options, "--markdown", markdown, "--ways", ways)
    content = json.loads(out.read_text())
    assert [row["way"] for row in content["rows"]] == ["whole", "bands", "least", "scaled"]
    assert len(content["runs"]) == 2
    for row in content["rows"]:
        assert (row["height"], row["width"]) == (384, 512)
        assert row["seconds"][0] > 0
        assert 0 <= row["bytes"] < row["process_bytes"]
    taken = {row["way"]: row["bytes"] for row in content["rows"]}
    assert taken["bands"] < taken["whole"]
    text = markdown.read_text()
    assert "## 0.2 MP, 512x384" in text
    assert "| least | fp32 |" in text
    script("photo.py", *options, "--seconds", "0")
    assert json.loads(out.read_text())["rows"][0]["error"] == "not run: out of time"


def test_overhead(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    script("overhead.py", "--small", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert {row["op"].split()[0].rstrip(",") for row in rows} >= {
        "instance_norm",
        "reflect_conv2d",
        "crop_flip",
        "relu",
    }
    assert all(us > 0 for row in rows for us in row["microseconds"])
    assert "| relu | forward + backward |" in capsys.readouterr().out


def test_ddp(script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script("ddp.py", *outputs(tmp_path), "--size", 32)
    (content, markdown), said = written(tmp_path), capfd.readouterr().err
    assert content["task"]["processes"] == 2
    assert content["backend"] in ("gloo", "nccl")
    names = {row["name"] for row in content["rows"] if len(row["seconds"]) == 2 and row["ms"] > 0}
    assert {"no reduction", "one flat sum", "buckets, 25 MB", "buckets, 25 MB, bf16", "DDP"} <= names
    assert "| one flat sum |" in markdown
    assert "buckets, 25 MB: " in said


def test_export(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, markdown = tmp_path / "out.json", tmp_path / "out.md"
    script("export.py", "--ngf", 4, "--blocks", 1, "--side", 32, "--rounds", 2, "--out", out, "--markdown", markdown)
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert {"ONNX Runtime, fp32", "ONNX Runtime, fp16", "torch.export program, fp32"} < set(rows)
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["ms"] > 0
    header, rule, *lines = [line for line in markdown.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == len(rows)
    assert {line.count("|") for line in (header, rule, *lines)} == {7}
