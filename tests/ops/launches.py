"""Two ways to look at launches of Triton kernels without a GPU: record them, or run their outermost programs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """What a launch would compile, as the cases of the compile gate say it, and its grid."""

    kernel: str
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int | None

    @property
    def programs(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count


class _Recorder:
    """Stands in for a kernel and runs nothing, so that tensors on the meta device will do."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches
        if hasattr(kernel, "kwargs"):  # interpreted
            self.plain = set(kernel.kwargs.get("do_not_specialize") or ())
        else:
            self.plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        self.constexprs = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, num_stages: int | None = None) -> None:
            signature, constants = {}, {}
            for name, value in zip(self.kernel.arg_names, arguments, strict=True):
                if name in self.constexprs or value is None or (self._specialises(name, value) and value == 1):
                    constants[name] = value
                else:
                    signature[name] = self._type(name, value)
            self.launches.append(Launch(self.kernel.__name__, grid, signature, constants, num_warps, num_stages))

        return launch

    def _specialises(self, name: str, value: Any) -> bool:
        return type(value) is int and name not in self.plain

    def _type(self, name: str, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"*{_TYPES[value.dtype]}"
        if hasattr(value, "block_shape"):
            return f"tensordesc<{_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
        if isinstance(value, float):
            return "fp32"
        return "i32:16" if self._specialises(name, value) and value % 16 == 0 else "i32"


@contextmanager
def recorded(*modules: Any) -> Iterator[list[Launch]]:
    """The launches of the kernels of `modules`, which do nothing meanwhile."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, _Recorder(getattr(module, name), launches))
        yield launches


class OutermostPrograms:
    """A kernel of which only the first and the last program run: those that reach the furthest into memory."""

    def __init__(self, kernel: Any, furthest: dict[str, int]) -> None:
        self.kernel, self.furthest = kernel, furthest

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        from triton.runtime.interpreter import interpreter_builder as builder

        whole = grid + (1,) * (3 - len(grid))

        def launch(*arguments: Any, **options: Any) -> None:
            for chosen in {(0, 0, 0), (whole[0] - 1, whole[1] - 1, whole[2] - 1)}:
                with pytest.MonkeyPatch.context() as patch:
                    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
                    patch.setattr(builder, "set_grid_dim", lambda *_, to=set_dim: to(*whole))
                    patch.setattr(builder, "set_grid_idx", lambda *_, to=set_index, index=chosen: to(*index))
                    self._watch(patch, arguments)
                    self.kernel[(1,)](*arguments, **options)

        return launch

    def _watch(self, patch: pytest.MonkeyPatch, arguments: tuple[Any, ...]) -> None:
        from triton.runtime.interpreter import interpreter_builder as builder

        tensors = [getattr(argument, "base", argument) for argument in arguments]
        begins = sorted((t.data_ptr(), t.element_size()) for t in tensors if isinstance(t, Tensor) and t.numel())
        name = self.kernel.__name__

        def watched(pointers: Any, mask: Any) -> None:
            addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
            if addresses.size:
                last = int(addresses.max())
                begin, size = max(one for one in begins if one[0] <= last)
                self.furthest[name] = max(self.furthest.get(name, 0), (last - begin) // size)

        load, store = builder.create_masked_load, builder.create_masked_store
        patch.setattr(builder, "create_masked_load", lambda p, m, *a, **k: (watched(p, m), load(p, m, *a, **k))[1])
        patch.setattr(
            builder, "create_masked_store", lambda p, v, m, *a, **k: (watched(p, m), store(p, v, m, *a, **k))[1]
        )


@contextmanager
def outermost_programs(*modules: Any) -> Iterator[dict[str, int]]:
    """Launches of the kernels of `modules` run two programs each.

    Gives how many elements from the beginning of a tensor each kernel has read or written, by its name.
    """
    from triton.runtime.interpreter import GridExecutor

    furthest: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        # The interpreter copies its tensors to the host and back, here onto themselves, which would touch all pages.
        patch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, OutermostPrograms(getattr(module, name), furthest))
        yield furthest
