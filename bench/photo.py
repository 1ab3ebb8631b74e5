"""How long a photograph of so many megapixels takes, and how much memory: whole, in bands of rows, and scaled.

    python bench/photo.py [--out FILE.json] [--markdown FILE.md] [--sizes 1,3,12] [--ways whole,bands,least,scaled]
                          [--seconds N] [--add] [--small]

`Translator.translate` of one 4:3 picture of random pixels, from a uint8 array to a uint8 array, with the full-size
generator (64 filters, 9 blocks), each in a process of its own. On CUDA in the device's own precision, the median of
five calls; on a CPU in fp32, one call after one of 64x64.

whole   at once.
bands   in bands of rows, half-resolution maps kept: what is taken where the whole does not fit.
least   in bands of rows, quarter-resolution maps kept and the rest computed again: what is taken where that does not
        fit either.
scaled  at a short side of 286 pixels, and back to full size with the picture's detail.

--add keeps what --out holds of other sizes and ways: a CPU takes minutes for all of them. A case that the time left is
too short for is listed without figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from rounds import Result, say, synchronise
from tables import Column, Section, number, report

import cyclegan_fast
from cyclegan_fast.inference.tiles import plan_tiles, whole_bytes

CUDA = torch.cuda.is_available()
WAYS = ("whole", "bands", "least", "scaled")
TRAINED_AT = 286


def sides(megapixels: float) -> tuple[int, int]:
    """(height, width) of a 4:3 picture, multiples of 16: 3024 x 4032 for 12."""
    unit = round((megapixels * 1e6 / 12) ** 0.5 / 16) * 16 if megapixels != 12 else 1008
    return 3 * unit, 4 * unit


def options(model: cyclegan_fast.Translator, way: str, height: int, width: int) -> dict[str, Any]:
    """What `translate` is given for a way."""
    if way == "scaled":
        return {"scale": TRAINED_AT}
    if way == "whole":
        return {"max_memory": 2**60}
    shape = (model.G_A, height, width, model.precision)
    limit = whole_bytes(*shape, model.device) - 1
    if way == "least":
        limit = plan_tiles(*shape, limit=limit).bytes - 1
    return {"max_memory": limit}


def case(megapixels: float, way: str, small: bool) -> dict[str, Any]:
    """Measured in this process: seconds of each call, and by how many bytes it raised the peak."""
    torch.manual_seed(0)
    height, width = sides(megapixels)
    G = cyclegan_fast.ResnetGenerator(ngf=8 if small else 64, blocks=2 if small else 9)
    model = cyclegan_fast.Translator(G, G, precision="auto" if CUDA else "fp32")
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    how = options(model, way, height, width)
    model.translate(picture[:64, :64])
    if CUDA:
        model.translate(picture, **how)
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if CUDA else _peak()
    seconds = [_timed(lambda: model.translate(picture, **how)) for _ in range(5 if CUDA else 1)]
    after = torch.cuda.max_memory_allocated() if CUDA else _peak()
    return {
        "megapixels": megapixels,
        "height": height,
        "width": width,
        "way": way,
        "precision": model.precision,
        "options": how,
        "seconds": seconds,
        "bytes": after - before,
        "process_bytes": _peak(),
    }


def _timed(call: Callable[[], Any]) -> float:
    synchronise()
    begin = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - begin


def _peak() -> int:
    """The most memory this process has held, bytes."""
    try:  # getrusage begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(megapixels: float, way: str, small: bool, left: float) -> dict[str, Any]:
    """`case` in a process of its own, in the time that is left."""
    wanted = json.dumps([megapixels, way, small])
    failed = {"megapixels": megapixels, "way": way, "seconds": []}
    if left <= 0:
        return {**failed, "error": "not run: out of time"}
    try:
        command = [sys.executable, __file__, "--case", wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
    except subprocess.TimeoutExpired:
        return {**failed, "error": "stopped: out of time"}
    if done.returncode:
        return {**failed, "error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    row: dict[str, Any] = json.loads(done.stdout)
    say(f"{megapixels:g} MP {way}: {statistics.median(row['seconds']):.3g} s, {row['bytes'] / 1e9:.2f} GB")
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--sizes", default="0.25,1,3,12", help="megapixels, comma-separated")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seconds", type=float, default=1800.0, help="for everything together")
    parser.add_argument("--add", action="store_true", help="keep what --out holds of other sizes and ways")
    parser.add_argument("--small", action="store_true", help="toy networks, for tests")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.case is not None:
        print(json.dumps(case(*json.loads(chosen.case))))
        return
    deadline = time.monotonic() + chosen.seconds
    content: dict[str, Any] = {"title": "Translation of one photograph", "provenance": provenance(), "rows": []}
    kept = json.loads(chosen.out.read_text()) if chosen.add and chosen.out and chosen.out.exists() else content
    content["runs"] = [*kept.get("runs", []), content["provenance"]]
    rows = {(row["megapixels"], row["way"]): row for row in kept["rows"]}
    for megapixels in map(float, chosen.sizes.split(",")):
        for way in chosen.ways.split(","):
            if way not in WAYS:
                parser.error(f"--ways: {way!r} is not one of {', '.join(WAYS)}")
            rows[megapixels, way] = measure(megapixels, way, chosen.small, deadline - time.monotonic())
            content["rows"] = [rows[key] for key in sorted(rows, key=lambda key: (key[0], WAYS.index(key[1])))]
            text = _write(chosen, content)
    if chosen.markdown is None:
        print(text)


_EXPLANATION = (
    "From a uint8 array to a uint8 array by `Translator.translate`, full-size generator (64 filters, 9 blocks), each "
    "in a process of its own: whole, in bands of rows that keep half-resolution maps, in bands that keep the least, "
    f"and at a short side of {TRAINED_AT} pixels with a guided return to full size. GB: by how much the call raised "
    "the peak of the device's memory, on a CPU of the process; process: the most it held in all, with Python, torch "
    "and weights."
)


def _write(chosen: argparse.Namespace, content: dict[str, Any]) -> str:
    sections = []
    for megapixels in sorted({row["megapixels"] for row in content["rows"]}):
        rows = {row["way"]: row for row in content["rows"] if row["megapixels"] == megapixels}
        height, width = sides(megapixels)
        results = [
            Result(way, "ours", row.get("precision", ""), row["seconds"], error=row.get("error", ""))
            for way, row in rows.items()
        ]
        sections.append(Section(f"{megapixels:g} MP, {width}x{height}", {}, _columns(rows), results, ""))
    # The rows are written as they were measured; the sections serve the tables alone.
    return report(_EXPLANATION, "", sections, content, chosen.out, chosen.markdown)


def _columns(rows: dict[str, dict[str, Any]]) -> list[Column]:
    def figure(value: Callable[[dict[str, Any]], float]) -> Callable[[Result], str]:
        return lambda result: number(value(rows[result.name]))

    return [
        ("way", lambda result: result.name),
        ("precision", lambda result: result.precision),
        ("s", figure(lambda row: statistics.median(row["seconds"]))),
        ("s per MP", figure(lambda row: statistics.median(row["seconds"]) / row["megapixels"])),
        ("GB", figure(lambda row: row["bytes"] / 1e9)),
        ("process, GB", figure(lambda row: row["process_bytes"] / 1e9)),
    ]


if __name__ == "__main__":
    main()
