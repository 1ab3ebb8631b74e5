"""The compile gate: every Triton kernel at its real shapes, for every architecture, without a GPU.

    python bench/kernel_gate.py [--arch 90,100] [--only instance_norm] [--module planted_spill]

Each module of `cyclegan_fast.ops` that has kernels exports `gate_cases()`, a list of

    (name, jit function, signature, constexprs, num_warps, num_stages, tensor core expected)

signature: one entry per argument that is no constexpr. Pointers ("*bf16") count as aligned to 16 bytes, as PyTorch's
allocations are; an integer that launches with a multiple of 16 is written "i32:16", because that is what Triton
specialises on and what decides the width of an access. The last entry is False, True (the architecture's best unit is
expected: HGMMA on Hopper, tcgen05 on data-centre Blackwell, else HMMA) or "HMMA" (any tensor-core instruction will do).
An eighth entry, if there, lists the architectures the kernel is meant for.

The kernels are compiled by one process a core, disassembled with the tools that come with Triton, printed as one table
and written into docs/kernels.md between its markers (a full run only). Exit status 1 means that a kernel spills
registers, uses local memory, lacks an expected tensor-core instruction, or needs more shared memory, tensor memory or
registers than the architecture has. Results are kept in build/ by a hash of everything they depend on.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "kernel_gate.json"
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- kernel gate: begin -->", "<!-- kernel gate: end -->"
PROCESSES = max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)


@dataclass(frozen=True)
class Architecture:
    """What one thread block may use, and the best tensor-core instruction.

    Source: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute
    Capability": maximum amount of shared memory per thread block (opt-in), 32-bit registers per thread block, and for
    10.0 the 512 columns of tensor memory of PTX ISA 8.6, section "Tensor Memory".
    """

    shared: int  # bytes
    matrix: str  # a regular expression for the opcode
    registers: int = 65536
    tensor_memory: int = 0  # columns


ARCHITECTURES = {
    80: Architecture(shared=163 * 1024, matrix="HMMA"),
    86: Architecture(shared=99 * 1024, matrix="HMMA"),
    89: Architecture(shared=99 * 1024, matrix="HMMA"),
    90: Architecture(shared=227 * 1024, matrix="HGMMA"),
    100: Architecture(shared=227 * 1024, matrix="UTC[A-Z]*MMA", tensor_memory=512),
    120: Architecture(shared=99 * 1024, matrix="HMMA"),
}
ANY_MATRIX = "HMMA|HGMMA|UTC[A-Z]*MMA"

# Count again when this changes: it stands for the code below in the key of a kept result.
_COUNTING = 1

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape for one architecture; it is compiled where `module` can be imported."""

    module: str
    position: int
    name: str
    arch: int
    expects: bool | str
    key: str


@dataclass(frozen=True)
class Result:
    """What the compiler made of a case."""

    warps: int
    registers: int
    shared: int
    local: int  # bytes of stack and local memory a thread
    spills: int  # instructions that move a register to local memory or back
    tensor_memory: int
    matrix: dict[str, int]
    loads: dict[str, int]
    stores: dict[str, int]
    error: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for every architecture and judge it.")
    parser.add_argument("--arch", default="", help="only these, as in 80,90 (default: all)")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--module", default="", help="this module's gate_cases() instead of those of the ops")
    options = parser.parse_args(arguments)
    archs = [int(arch) for arch in options.arch.split(",") if arch] or list(ARCHITECTURES)
    unknown = set(archs) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"--arch: {sorted(unknown)} are not known: of {list(ARCHITECTURES)}")
    start = time.perf_counter()
    prepare()
    modules = [options.module] if options.module else kernel_modules()
    cases = [case for module in modules for case in cases_of(module, archs) if options.only in case.name]
    if not cases:
        print("no kernel has this name")
        return 1
    results = compile_all(cases)
    table = render(cases, results)
    print(table)
    faults = [f"{case.name} on sm_{case.arch}: {fault}" for case in cases for fault in judge(case, results[case.key])]
    print(f"\n{len(cases)} kernels in {time.perf_counter() - start:.0f} s, {len(faults)} faults")
    for fault in faults:
        print(f"FAULT: {fault}")
    if not (options.arch or options.only or options.module) and not faults:
        write_table(table)
    return 1 if faults else 0


def prepare() -> None:
    """Settings for this process and those it starts, before Triton and the kernels are imported."""
    # Kernels are compiled here, not interpreted, and what is compiled belongs to this folder.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]


def kernel_modules() -> list[str]:
    """The modules of `cyclegan_fast.ops` that export gate_cases."""
    package = importlib.import_module("cyclegan_fast.ops")
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "gate_cases")]


def cases_of(module: str, archs: Iterable[int]) -> list[Case]:
    found = []
    for position, case in enumerate(importlib.import_module(module).gate_cases()):
        meant_for = case[7] if len(case) > 7 else tuple(ARCHITECTURES)
        found += [
            Case(module, position, case[0], arch, case[6], _key(case, arch)) for arch in archs if arch in meant_for
        ]
    return found


def _key(case: Sequence[Any], arch: int) -> str:
    import triton

    _, function, signature, constants, warps, stages, *_ = case
    parts = (
        function.__name__,
        _sources(function),
        signature,
        constants,
        warps,
        stages,
        arch,
        triton.__version__,
        _COUNTING,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.lru_cache
def _sources(function: Any) -> str:
    """Hash of a kernel's source, of the functions that it calls, and of the numbers that it names.

    Triton's own `cache_key` will not do: it depends on which kernels were hashed before it.
    """
    parts: dict[str, str] = {}

    def add(function: Any) -> None:
        parts[f"{function.__module__}.{function.__name__}"] = inspect.getsource(function)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            inner = getattr(value, "fn", value)
            if inspect.isfunction(inner) and f"{inner.__module__}.{inner.__name__}" not in parts:
                add(inner)
            elif isinstance(getattr(value, "value", value), (bool, int, float, str)):
                parts[name] = repr(value)

    add(function.fn)
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def compile_all(cases: Sequence[Case]) -> dict[str, Result]:
    """The result of each case by its key: the kept one, or by processes that compile."""
    results = _kept()
    missing = [case for case in cases if case.key not in results]
    # The slowest kernels are those with matrix products: they go first, so that all processes end together.
    missing.sort(key=lambda case: not case.expects)
    if missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
            for case, result in zip(missing, pool.map(compile_case, missing), strict=True):
                results[case.key] = result
                _keep(case.key, result)
                if result.error:
                    print(f"{case.name} on sm_{case.arch}: {result.error}", flush=True)
    return results


def compile_case(case: Case) -> Result:
    """Compile and disassemble one case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    described = importlib.import_module(case.module).gate_cases()[case.position]
    _, function, signature, constants, warps, stages, *_ = described
    if _key(described, case.arch) != case.key:
        return Result(warps, 0, 0, 0, 0, 0, {}, {}, {}, "its source changed while the gate ran")
    types, attributes = _specialise(function, signature, constants)
    try:
        compiled = triton.compile(
            ASTSource(function, types, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", case.arch, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    except Exception as error:  # any failure of the compiler is this kernel's fault, and the others go on
        return Result(warps, 0, 0, 0, 0, 0, {}, {}, {}, f"{type(error).__name__}: {str(error)[:300]}")
    usage, opcodes = _disassemble(compiled.asm["cubin"])
    return Result(
        warps=compiled.metadata.num_warps,
        registers=usage["REG"],
        shared=compiled.metadata.shared + usage["SHARED"],
        local=usage["STACK"] + usage["LOCAL"],
        spills=sum(count for opcode, count in opcodes.items() if opcode.split(".")[0] in ("LDL", "STL")),
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix=_count(opcodes, ANY_MATRIX),
        loads=_widths(opcodes, ("LDG", "LDGSTS"), "UTMALDG"),
        stores=_widths(opcodes, ("STG",), "UTMASTG"),
    )


def _specialise(function: Any, signature: dict[str, str], constants: dict[str, Any]) -> tuple[dict[str, str], Any]:
    """Types in the order of the arguments, and which of them are multiples of 16, as a launch would find out."""
    types: dict[str, str] = {}
    attributes = {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        kind, _, multiple = signature[name].partition(":")
        types[name] = kind
        if multiple == "16" or (kind.startswith("*") and not multiple):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, attributes


def _disassemble(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """Resource usage as the linker would see it, and how often each opcode stands in the machine code."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "--dump-sass", file], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in _USAGE.findall(usage)}
    if set(numbers) != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump answered something unknown: {usage!r}")
    opcodes = Counter(match[1] for line in sass.splitlines() if (match := _INSTRUCTION.match(line)))
    if not opcodes:
        raise RuntimeError("cuobjdump wrote no instruction that is understood")
    return numbers, opcodes


def _count(opcodes: Counter[str], pattern: str) -> dict[str, int]:
    """How often each opcode whose first part matches occurs, without its modifiers."""
    found: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        base = opcode.split(".")[0]
        if re.fullmatch(pattern, base):
            found[base] += count
    return dict(found)


def _widths(opcodes: Counter[str], names: tuple[str, ...], bulk: str) -> dict[str, int]:
    """How many accesses of how many bytes a thread: {"16": 24, "1": 8}, and "TMA" for bulk copies of tiles."""
    found: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        base, *modifiers = opcode.split(".")
        if base in names:
            found[str(next((_WIDTHS[m] for m in reversed(modifiers) if m in _WIDTHS), 4))] += count
        elif base == bulk:
            found["TMA"] += count
    return dict(found)


def judge(case: Case, result: Result) -> list[str]:
    """What is wrong with a result; empty if nothing is."""
    if result.error:
        return [f"does not compile: {result.error}"]
    architecture, faults = ARCHITECTURES[case.arch], []
    if result.spills:
        faults.append(f"spills registers: {result.spills} instructions read or write local memory")
    if result.local:
        faults.append(f"uses {result.local} bytes of local memory a thread")
    if result.shared > architecture.shared:
        faults.append(f"needs {result.shared} bytes of shared memory of {architecture.shared}")
    if result.tensor_memory > architecture.tensor_memory:
        faults.append(f"needs {result.tensor_memory} columns of tensor memory of {architecture.tensor_memory}")
    if result.registers * 32 * result.warps > architecture.registers:
        faults.append(f"needs {result.registers} registers in {32 * result.warps} threads, beyond the register file")
    wanted = ANY_MATRIX if isinstance(case.expects, str) else architecture.matrix
    if case.expects and not any(re.fullmatch(wanted, name) for name in result.matrix):
        faults.append(f"has no tensor-core instruction {wanted}, but {result.matrix or 'none at all'}")
    return faults


def render(cases: Sequence[Case], results: dict[str, Result]) -> str:
    """The table: a row for each kernel and for all architectures for which everything counted is the same."""
    lines = [
        "| kernel | sm | warps | registers | shared KB | local B | spills | tensor core | loads, B × count | "
        "stores, B × count |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str], list[int]] = {}
    for case in cases:
        r = results[case.key]
        cells: list[Any] = [r.warps, r.registers, f"{r.shared / 1024:.1f}", r.local, r.spills]
        cells += [_accesses(r.matrix), _accesses(r.loads), _accesses(r.stores)]
        rows.setdefault((case.name, " | ".join(map(str, cells))), []).append(case.arch)
    lines += [f"| {name} | {', '.join(map(str, archs))} | {cells} |" for (name, cells), archs in rows.items()]
    return "\n".join(lines)


def _accesses(counts: dict[str, int]) -> str:
    widest_first = sorted(counts.items(), key=lambda item: -int(item[0]) if item[0].isdigit() else 1)
    return ", ".join(f"{name} × {count}" for name, count in widest_first) or "none"


def write_table(table: str) -> None:
    """Put the table between the markers of docs/kernels.md."""
    import triton

    text = DOCUMENT.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"{DOCUMENT} has no place for the table: {BEGIN} ... {END}")
    note = f"Compiled with Triton {triton.__version__} by `make kernels`."
    new = f"{before}{BEGIN}\n\n{note}\n\n{table}\n\n{END}{after}"
    if new != text:
        DOCUMENT.write_text(new, encoding="utf-8")


def _kept() -> dict[str, Result]:
    try:
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))
        return {key: Result(**fields) for key, fields in kept.items()}
    except (OSError, ValueError, TypeError):
        return {}


def _keep(key: str, result: Result) -> None:
    """Add one result to the file; a failure is tried again. Two gates at once may lose one, which costs a compile."""
    if result.error:
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS.with_suffix(f".{os.getpid()}")
    kept = _kept() | {key: result}
    temporary.write_text(json.dumps({key: asdict(one) for key, one in kept.items()}), encoding="utf-8")
    temporary.replace(RESULTS)


if __name__ == "__main__":
    sys.exit(main())
