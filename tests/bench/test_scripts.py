"""The benchmarks run, at toy sizes: what they write has what the documents need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def run(script: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str, str]:
    """Its JSON, its Markdown, and what it said."""
    out, markdown = folder / "out.json", folder / "deeper" / "out.md"
    command = [sys.executable, script, "--small", "--out", out, "--markdown", markdown, "--rounds", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), markdown.read_text(), done.stderr


def test_step(bench: Path, tmp_path: Path) -> None:
    options = ("--match", "^.a. de-facto fp32 eager|^ours fp32 eager", "--batch", "2", "--identity", "0")
    content, markdown, said = run(bench / "step.py", tmp_path, *options)
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
    content, markdown, _ = run(bench / "step.py", tmp_path, "--seconds", "0")
    (group,) = content["batches"]
    assert len(group["rows"]) >= 6
    assert all(row["error"] == "not run: out of time" for row in group["rows"])
    assert "* ours fp32 eager: not run: out of time" in markdown


def test_translate(bench: Path, tmp_path: Path) -> None:
    options = ("--match", "^.a. de-facto fp32 eager|^ours fp32 (eager|translator)")
    content, markdown, _ = run(bench / "translate.py", tmp_path, *options)
    (group,) = content["sizes"]
    assert (group["height"], group["width"]) == (64, 64)
    assert group["flop"] > 0
    assert {row["name"] for row in group["rows"] if row["ms"]} == {
        *("(a) de-facto fp32 eager", "ours fp32 eager", "ours fp32 translator"),
    }
    assert "## A translation by ours fp32" in markdown


def test_photo_adds_to_what_was_measured(bench: Path, tmp_path: Path) -> None:
    out, markdown = tmp_path / "photo.json", tmp_path / "photo.md"
    command = [sys.executable, bench / "photo.py", "--small", "--add", "--sizes", "0.2", "--out", out]
    for ways in ("whole,bands", "least,scaled"):
        subprocess.run([*command, "--markdown", markdown, "--ways", ways], check=True, timeout=280)
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
    subprocess.run([*command, "--seconds", "0"], check=True, timeout=280)
    assert json.loads(out.read_text())["rows"][0]["error"] == "not run: out of time"


def test_overhead(bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    command = [sys.executable, str(bench / "overhead.py"), "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    rows = json.loads(out.read_text())["rows"]
    assert {row["op"].split()[0].rstrip(",") for row in rows} >= {
        "instance_norm",
        "reflect_conv2d",
        "crop_flip",
        "relu",
    }
    assert all(us > 0 for row in rows for us in row["microseconds"])
    assert "| relu | forward + backward |" in done.stdout


def test_ddp(bench: Path, tmp_path: Path) -> None:
    content, markdown, said = run(bench / "ddp.py", tmp_path, "--size", "32")
    assert content["task"]["processes"] == 2
    assert content["backend"] in ("gloo", "nccl")
    names = {row["name"] for row in content["rows"] if len(row["seconds"]) == 2 and row["ms"] > 0}
    assert {"no reduction", "one flat sum", "buckets, 25 MB", "buckets, 25 MB, bf16", "DDP"} <= names
    assert "| one flat sum |" in markdown
    assert "buckets, 25 MB: " in said


def test_export(bench: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, markdown = tmp_path / "out.json", tmp_path / "out.md"
    options = ("--ngf", "4", "--side", "32", "--rounds", "2", "--out", str(out), "--markdown", str(markdown))
    subprocess.run([sys.executable, str(bench / "export.py"), *options], capture_output=True, check=True, timeout=200)
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert {"ONNX Runtime, fp32", "ONNX Runtime, fp16", "torch.export program, fp32"} < set(rows)
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["ms"] > 0
    header, rule, *lines = [line for line in markdown.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == len(rows)
    assert {line.count("|") for line in (header, rule, *lines)} == {7}
