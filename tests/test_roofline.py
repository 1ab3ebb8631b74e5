"""Measuring a device's ceilings: the arithmetic, what is kept, and when it is not used."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cyclegan_fast import roofline
from cyclegan_fast.roofline import Roofline, measure, measured

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, few repetitions: the figures mean nothing, the way to them is the same."""
    monkeypatch.setattr(roofline, "_SIDES", (16, 32, 64))
    monkeypatch.setattr(roofline, "_REPEATS", (3, 5))
    monkeypatch.setattr(roofline, "_COPY_BYTES", 2**16)


def settings() -> tuple[Any, ...]:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precisions = torch.get_float32_matmul_precision(), cuda.fp32_precision, cpu.fp32_precision, cuda.allow_tf32
    return torch.get_num_threads(), torch.is_inference_mode_enabled(), *precisions


class TestMeasure:
    def test_finds_every_rate_and_changes_no_setting(self) -> None:
        before = settings()
        found = measure(CPU)
        assert set(found.matrix) == {"fp32", "bf16", "fp16"}  # a CPU has no TF32
        assert all(rate > 0 for rate in (*found.matrix.values(), found.copy))
        assert settings() == before

    def test_the_rate_is_that_of_the_median_at_the_largest_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One call takes far longer than the others, as when something else runs: it does not count."""
        times = itertools.cycle([0.001, 0.001, 0.5])
        monkeypatch.setattr(roofline, "_seconds", lambda device, work: next(times))  # noqa: ARG005
        assert roofline._matrix_rate(CPU, torch.float32) == pytest.approx(2 * 64**3 / 0.001)
        assert roofline._copy_rate(CPU) == pytest.approx(2 * 2**16 / 0.001)

    def test_stops_growing_where_one_product_takes_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(roofline, "_seconds", lambda device, work: 10.0)  # noqa: ARG005
        assert roofline._matrix_rate(CPU, torch.float32) == pytest.approx(2 * 16**3 / 10)

    def test_uses_the_last_size_that_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        product = roofline._product

        def limited(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], None]:
            if side > 32:
                raise torch.OutOfMemoryError("no memory")
            return product(device, dtype, side)

        monkeypatch.setattr(roofline, "_product", limited)
        monkeypatch.setattr(roofline, "_seconds", lambda device, work: 0.001)  # noqa: ARG005
        assert roofline._matrix_rate(CPU, torch.float32) == pytest.approx(2 * 32**3 / 0.001)

    def test_leaves_out_a_precision_without_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        product = roofline._product

        def without_half(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], None]:
            if dtype == torch.float16:
                raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
            return product(device, dtype, side)

        monkeypatch.setattr(roofline, "_product", without_half)
        assert set(measure(CPU).matrix) == {"fp32", "bf16"}

    def test_a_product_multiplies(self) -> None:
        """The function that is timed does the whole product, in the type asked for."""
        seen: list[torch.Tensor] = []
        original = torch.mm
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "mm", lambda a, b, out: seen.extend([a, b, original(a, b, out=out)]))
            roofline._product(CPU, torch.bfloat16, 16)()
        a, b, out = seen
        assert a.dtype == b.dtype == out.dtype == torch.bfloat16
        torch.testing.assert_close(out, (a.float() @ b.float()).bfloat16())

    @pytest.mark.parametrize(("precision", "inside"), [("fp32", "ieee"), ("tf32", "tf32")])
    def test_the_tf32_switch_is_put_back(self, precision: str, inside: str) -> None:
        """The switches exist without a GPU too."""
        before = settings()
        with roofline._fp32_products(precision, torch.device("cuda")):
            assert torch.backends.cuda.matmul.fp32_precision == inside
        assert settings() == before

    def test_the_newer_switch_alone_is_put_back(self) -> None:
        """Set by itself it is at odds with torch's older one, which then cannot be read."""
        matmul: Any = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        try:
            matmul.fp32_precision = "tf32"
            with roofline._fp32_products("fp32", torch.device("cuda")):
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == "tf32"
        finally:
            matmul.fp32_precision = before


class TestMeasured:
    def test_gives_what_was_kept(self) -> None:
        assert measured(CPU) is None
        found = measure(CPU)
        assert measured(CPU) == found

    def test_another_torch_or_number_of_cores_is_another_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = measure(CPU)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", "99.0")
            assert measured(CPU) is None
        with monkeypatch.context() as patch:
            patch.setattr(roofline, "usable_cores", lambda: 1000)
            assert measured(CPU) is None
        assert measured(CPU) == found

    def test_a_damaged_file_says_nothing(self) -> None:
        found = measure(CPU)
        file = roofline._file(found.environment)
        whole = file.read_text()
        record = json.loads(whole)
        for damaged in (
            *("", whole[:-20], "[]", "7", "{}", '{"matrix": 1}'),
            json.dumps(record | {"copy": 0}),
            json.dumps(record | {"copy": "fast"}),
            json.dumps(record | {"matrix": {"fp32": -1}}),
            json.dumps(record | {"matrix": None}),
            json.dumps(record | {"environment": {}}),
        ):
            file.write_text(damaged)
            assert measured(CPU) is None, damaged
        file.write_text(whole)
        assert measured(CPU) == found

    def test_a_folder_that_cannot_be_written_to_only_keeps_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("CYCLEGAN_FAST_CACHE", str(tmp_path / "file"))
        assert measure(CPU).copy > 0
        assert measured(CPU) is None

    def test_nothing_is_left_beside_the_file(self) -> None:
        file = roofline._file(measure(CPU).environment)
        measure(CPU)
        assert list(file.parent.iterdir()) == [file]


def test_in_words() -> None:
    found = Roofline("a GPU", {"fp32": 51.2e12, "bf16": 790e12}, 4.3e12, {}, 0)
    assert str(found) == "fp32 51.2, bf16 790 TFLOP/s, copy 4,300 GB/s"
    assert "0.118" in str(dataclasses.replace(found, matrix={"fp32": 0.1177e12}))
