"""The interpreter of these tests notices what a GPU would not forgive."""

from __future__ import annotations

import pytest
import torch

from cyclegan_fast.ops import _launch

if not _launch.INTERPRETED:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from triton.runtime.errors import InterpreterError

from cyclegan_fast.ops._launch import tl, triton


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(x, y, n, offset, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(y + at + offset, tl.load(x + at, mask=at < n, other=0.0), mask=at < 8)


def copy(n: int, offset: int, *, view: bool = False) -> torch.Tensor:
    x, y = torch.ones(8), torch.zeros(16)
    _copy_kernel[(1,)](x, y[:8] if view else y, n, offset, 16)
    return y


def test_masked_values_are_not_touched() -> None:
    assert copy(8, 8).tolist() == [0.0] * 8 + [1.0] * 8


@pytest.mark.parametrize(("n", "offset", "view"), [(9, 0, False), (8, 9, False), (8, -1, False), (8, 1, True)])
def test_an_access_outside_the_tensors_is_refused(n: int, offset: int, view: bool) -> None:
    """Reading past the end, writing past it, before the beginning, and past a view into its own storage."""
    with pytest.raises(InterpreterError, match="outside the launch's tensors"):
        copy(n, offset, view=view)
