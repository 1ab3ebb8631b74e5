"""The compile gate fails where it must: on a kernel that really spills, and on each other fault it looks for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from cyclegan_fast import ops

pytest.importorskip("triton")
GATE = Path(__file__).resolve().parents[2] / "bench" / "kernel_gate.py"


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_gate", GATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_gate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, GATE, "--module", "planted_spill", "--arch", "80,90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT: planted spill on sm_80: spills registers" in done.stdout
    assert "FAULT: planted spill on sm_90: uses" in done.stdout
    assert "FAULT: planted shared memory on sm_80: needs 262144 bytes of shared memory of 166912" in done.stdout
    assert "FAULT: planted shared memory on sm_90: needs" in done.stdout
    assert "FAULT: planted plain product on sm_80: has no tensor-core instruction HMMA" in done.stdout
    assert "FAULT: planted plain product on sm_90: has no tensor-core instruction HGMMA" in done.stdout
    assert "6 kernels" in done.stdout


@pytest.mark.parametrize(
    ("arch", "expects", "changed", "fault"),
    [
        (90, False, {}, None),
        (90, False, {"spills": 3}, "spills registers: 3 instructions"),
        (90, False, {"local": 16}, "16 bytes of local memory"),
        (90, False, {"shared": 227 * 1024}, None),
        (90, False, {"shared": 227 * 1024 + 1}, "bytes of shared memory of 232448"),
        (120, False, {"shared": 100 * 1024}, "bytes of shared memory of 101376"),
        (100, False, {"tensor_memory": 512}, None),
        (100, False, {"tensor_memory": 513}, "513 columns of tensor memory of 512"),
        (80, False, {"registers": 255, "warps": 16}, "beyond the register file"),
        (80, True, {"matrix": {"HMMA": 4}}, None),
        (80, True, {}, "no tensor-core instruction HMMA, but none at all"),
        (90, True, {"matrix": {"HMMA": 4}}, "no tensor-core instruction HGMMA, but"),
        (90, "HMMA", {"matrix": {"HMMA": 4}}, None),
        (90, "HMMA", {}, "no tensor-core instruction"),
        (90, True, {"matrix": {"HGMMA": 4}}, None),
        (100, True, {"matrix": {"UTCHMMA": 4}}, None),
        (80, False, {"error": "CompilationError: no"}, "does not compile: CompilationError: no"),
    ],
)
def test_faults(gate: ModuleType, arch: int, expects: bool | str, changed: dict, fault: str | None) -> None:
    good = gate.Result(
        warps=4, registers=64, shared=0, local=0, spills=0, tensor_memory=0, matrix={}, loads={}, stores={}
    )
    case = gate.Case("module", 0, "kernel", arch, expects, "key")
    faults = gate.judge(case, replace(good, **changed))
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1
        assert fault in faults[0]


def test_machine_code_is_read_as_it_is_written(gate: ModuleType) -> None:
    sass = """
        Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;                /* 0x0000000402048981 */
        /*0020*/               @P1 LDG.E.U8.CONSTANT R4, desc[UR4][R2.64+0x10] ;   /* 0x0000000402048981 */
        /*0030*/                   LDG.E R5, desc[UR4][R2.64] ;                    /* 0x0000000402048981 */
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ;
        /*0050*/              @UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*0080*/                   STL.64 [R1+0x8], R8 ;
        /*0090*/             @!UPT UIADD3 URZ, URZ, URZ, URZ ;
    """
    found = [match[1] for line in sass.splitlines() if (match := gate._INSTRUCTION.match(line))]
    opcodes = Counter(found)
    assert len(found) == 10
    assert gate._widths(opcodes, ("LDG", "LDGSTS"), "UTMALDG") == {"16": 2, "1": 1, "4": 1, "TMA": 1}
    assert gate._widths(opcodes, ("STG",), "UTMASTG") == {"8": 1}
    assert gate._count(opcodes, gate.ANY_MATRIX) == {"HGMMA": 1}
    assert opcodes["STL.64"] == 1


def test_the_table_goes_between_its_markers(gate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "kernels.md"
    monkeypatch.setattr(gate, "DOCUMENT", document)
    document.write_text(f"before\n{gate.BEGIN}\nold\n{gate.END}\nafter\n")
    for _ in range(2):
        gate.write_table("| new |")
    text = document.read_text()
    assert text.startswith(f"before\n{gate.BEGIN}\n")
    assert text.endswith(f"{gate.END}\nafter\n")
    assert text.count("| new |") == 1
    assert "old" not in text
    document.write_text("no markers")
    with pytest.raises(SystemExit, match="no place for the table"):
        gate.write_table("| new |")


def test_the_hint_of_a_signature_becomes_what_a_launch_would_find_out(gate: ModuleType) -> None:
    class Function:
        arg_names = ("x", "odd", "n", "pitch", "C", "nothing")

    signature = {"x": "*bf16", "odd": "*bf16:1", "n": "i32", "pitch": "i32:16", "nothing": "constexpr"}
    types, attributes = gate._specialise(Function, signature, {"C": 3, "nothing": None})
    assert types == {"x": "*bf16", "odd": "*bf16", "n": "i32", "pitch": "i32", "C": "constexpr", "nothing": "constexpr"}
    assert attributes == {(0,): [["tt.divisibility", 16]], (3,): [["tt.divisibility", 16]]}


def test_a_row_stands_for_all_architectures_with_the_same_numbers(gate: ModuleType) -> None:
    result = gate.Result(4, 64, 2048, 0, 0, 0, {"HMMA": 4}, {"16": 2}, {"4": 1})
    cases = [gate.Case("module", 0, "kernel", arch, True, str(arch)) for arch in (80, 86, 90)]
    rows = gate.render(cases, {"80": result, "86": replace(result, registers=65), "90": result}).splitlines()[2:]
    assert rows[0] == "| kernel | 80, 90 | 4 | 64 | 2.0 | 0 | 0 | HMMA × 4 | 16 × 2 | 4 × 1 |"
    assert len(rows) == 2


def test_a_kept_result_depends_on_all_that_a_kernel_calls(gate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("cyclegan_fast.ops._reflect_conv_triton")
    gate._sources.cache_clear()
    before = gate._sources(module._thin_in_kernel)
    gate._sources.cache_clear()
    assert gate._sources(module._thin_in_kernel) == before
    borders = importlib.import_module("cyclegan_fast.ops._border_triton")
    monkeypatch.setitem(module._gather_thin.__globals__, "reflected", borders._source)
    gate._sources.cache_clear()
    assert gate._sources(module._thin_in_kernel) != before
    assert gate._sources(module._thin_weight_grad_kernel) != before


def test_every_kernel_has_a_case() -> None:
    """A kernel that no case names would pass the gate unseen."""
    modules = [importlib.import_module(f"{ops.__name__}.{info.name}") for info in pkgutil.iter_modules(ops.__path__)]
    kernels = {
        (module.__name__, name)
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    cases = [case for module in modules if hasattr(module, "gate_cases") for case in module.gate_cases()]
    compiled = {(case[1].fn.__module__, case[1].fn.__name__) for case in cases}
    assert len(kernels) >= 10
    assert compiled == kernels
    names = [case[0] for case in cases]
    assert len(names) == len(set(names))
