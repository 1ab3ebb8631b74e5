"""Tests of fused operations: Triton's interpreter where there is no GPU, and memory that is never clean by chance.

The interpreter refuses what a kernel reads or writes outside the tensors it was given, as compute-sanitizer does on a
GPU: it would otherwise read the memory of another tensor, or nothing wrong at all where memory happens to be mapped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks when it is first imported, parts of its own library included.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton came before its interpreter"
    )
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses deterministic mode


def _mend_interpreter() -> None:
    """Let Triton's interpreter convert between float32 and bfloat16 as GPUs do: rounding to the nearest, ties to even.

    It truncates otherwise, an error twice as large that always goes the same way (triton 3.6, 3.7).
    """
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def mended(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = mended


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one past the last byte of memory of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _guard_memory() -> None:
    """Let the interpreter check every access against the memory of the tensors that the launch was given."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    allowed: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max()) + pointers.get_element_ty().primitive_bitwidth // 8
        if not any(begin <= low and high <= end for begin, end in allowed):
            raise IndexError(f"an access to [{low:#x}, {high:#x}) outside the launch's tensors")

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def guarded_launch(self: Any, *arguments: Any, **options: Any) -> Any:
        given = [getattr(argument, "base", argument) for argument in (*arguments, *options.values())]  # descriptors'
        allowed[:] = [_extent(tensor) for tensor in given if isinstance(tensor, torch.Tensor) and tensor.numel()]
        return launch(self, *arguments, **options)

    builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
    executor.__call__ = guarded_launch


if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    _mend_interpreter()
    _guard_memory()

from cyclegan_fast.ops import _native  # noqa: E402 - after the environment that Triton looks at


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (the largest number, for integers), so that what a kernel forgets to write is seen.

    PyTorch does that itself in deterministic mode, in C++ as well as in Python.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16")


def _instruction_sets() -> tuple[str, ...]:
    if not _native.available():
        return ()
    return ISA_NAMES[: torch.ops.cyclegan_fast_native.best_isa() + 1]


@pytest.fixture(params=_instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, for the compiled kernels."""
    native = torch.ops.cyclegan_fast_native
    native.set_isa(ISA_NAMES.index(request.param))
    yield request.param
    native.set_isa(native.best_isa())


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Deterministic mode is here for its memory; that a library's kernel is not deterministic is not this test's matter.
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"))
