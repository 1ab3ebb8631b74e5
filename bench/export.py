"""Size and latency of exported files of one full-size generator, beside the translator they come from.

`python bench/export.py --out bench/results/export-cpu.json --markdown bench/results/export-cpu.md`
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from tables import number, write_both

from cyclegan_fast.inference.export import PRECISIONS, export
from cyclegan_fast.inference.translate import Translator
from cyclegan_fast.models import ResnetGenerator

_EXPLANATION = (
    "A generator with random weights, one picture, on the CPU. Medians of rounds in which the contestants "
    "take turns; CPU ms: of all threads, which other programs on the same cores change little. Largest error: against "
    "the generator's own fp32 execution, in [-1, 1], where a level of 8 bits is 0.0078, at the sizes that the export "
    "checks."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--formats", default="onnx,pt2", help="comma-separated: onnx, pt2, pte (default: onnx,pt2)")
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    began = provenance()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(
            Path(folder), options.formats.split(","), options.ngf, options.blocks, options.side, options.rounds
        )
    task = f"{options.ngf} filters, {options.blocks} blocks, {options.side}x{options.side}, batch 1."
    lines = [
        f"{_EXPLANATION} {task}",
        "",
        "| what | MB | ms | of the fastest round | CPU ms | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["name"],
            row["mb"] and f"{row['mb']:.1f}",
            number(row["ms"]),
            number(row["best_ms"]),
            number(row["cpu_ms"]),
        )
        error = "" if row["error"] is None else f"{row['error']:.2g}"
        lines.append(f"| {' | '.join(str(cell or '') for cell in cells)} | {error} |")
    content = {"title": "Exported generators", "provenance": began, "task": task, "rows": rows}
    write_both(options.out, options.markdown, content, lines)
    print("\n".join(lines))


def measure(folder: Path, formats: list[str], ngf: int, blocks: int, side: int, rounds: int) -> list[dict[str, Any]]:
    """Export in every format and precision, then time all of them in turns."""
    torch.manual_seed(0)
    generators = [ResnetGenerator(ngf=ngf, blocks=blocks) for _ in "AB"]
    translator = Translator(*generators, device="cpu", precision="fp32")
    image = torch.rand(1, 3, side, side) * 2 - 1
    rows: list[dict[str, Any]] = [{"name": "Translator, fp32, this package", "mb": None, "error": None}]
    runs: list[Callable[[], object]] = [lambda: translator.translate(image)]
    engines = {"onnx": "ONNX Runtime", "pt2": "torch.export program", "pte": "ExecuTorch"}
    for file_format in formats:
        for precision in PRECISIONS:
            if (file_format, precision) == ("pt2", "fp16"):
                continue  # for GPUs: a CPU without fp16 arithmetic takes seconds
            size = (side, side) if file_format == "pte" else None
            made = export(translator, folder / f"{precision}.{file_format}", precision=precision, size=size)
            name = f"{engines[file_format]}, {precision}"
            rows.append({"name": name, "mb": made.size / 1e6, "error": max(made.errors.values())})
            runs.append(runner(made.path, image))
    seconds: list[list[float]] = [[] for _ in runs]
    cpu: list[list[float]] = [[] for _ in runs]
    for counted in range(-1, rounds):  # the first round warms up
        for run, times, busy in zip(runs, seconds, cpu, strict=True):
            start, used = time.perf_counter(), time.process_time()
            run()
            if counted >= 0:
                times.append(time.perf_counter() - start)
                busy.append(time.process_time() - used)
    for row, times, busy in zip(rows, seconds, cpu, strict=True):
        row.update(seconds=times, ms=1e3 * statistics.median(times), best_ms=1e3 * min(times))
        row.update(cpu_seconds=busy, cpu_ms=1e3 * statistics.median(busy))
    return rows


def runner(path: Path, image: torch.Tensor) -> Callable[[], object]:
    """What runs the file on the picture."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"image": image.numpy()})
    if path.suffix == ".pte":
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(str(path)).load_method("forward")
        return lambda: method.execute([image])
    module = torch.export.load(path).module()

    def run() -> object:
        with torch.no_grad():
            return module(image)

    return run


if __name__ == "__main__":
    main()
