"""Options of the benchmarks, their order, and the table they write.

    pytest bench [--results FOLDER] [--name NAME] [--budget SECONDS] [--small]

Results go to FOLDER/NAME.json and .md after every row (default: bench/results/ops-<device>). When the budget is used
up the rest is skipped. --small runs everything at toy sizes: a check of the benchmarks, whose figures mean nothing and
are not written.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
from measure import Row, Table

from cyclegan_fast.machine import keep_freed_memory

_START = time.monotonic()
# Contestants at one shape follow one another (the uppermost parameter of a test varies fastest), small batches come
# first, and what has to be compiled takes longest and comes last.
_LAST = "torch.compile"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cyclegan_fast benchmarks")
    group.addoption("--results", default=str(Path(__file__).parent / "results"), help="folder of the tables")
    group.addoption("--name", default="", help="name of the table (default: ops- and the device)")
    group.addoption("--budget", type=float, default=float("inf"), help="seconds after which the rest is skipped")
    group.addoption("--small", action="store_true", help="toy sizes: a check of the benchmarks themselves")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1: the interpreter's time means nothing")
    # As in training, and for all contestants alike: no page of a result has to be mapped anew.
    if not torch.cuda.is_available():
        keep_freed_memory()
    # Benchmarks compare; a library's remark about itself must not end them.
    config.addinivalue_line("filterwarnings", "ignore::UserWarning")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore::FutureWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> tuple[bool, int]:
        parameters = _parameters(item)
        return parameters.get("contestant") == _LAST, parameters.get("batch", 0)

    items.sort(key=rank)
    if config.getoption("--small"):
        items[:] = [item for item in items if _parameters(item).get("batch", 1) == 1]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    device = torch.cuda.get_device_name() if measure.DEVICE.type == "cuda" else "cpu"
    name = request.config.getoption("--name") or "ops-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Table(name, Path(request.config.getoption("--results")))


@pytest.fixture
def small(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--small"))


@pytest.fixture
def run(request: pytest.FixtureRequest, table: Table, small: bool, benchmark: Any) -> Iterator[Callable[..., Row]]:
    """run(row, make, must_move=..., flop=...) times a contestant and adds its row to the table.

    A contestant that is not there raises NotImplementedError in make() and is skipped with its reason in the table;
    one of ours that fails, fails.
    """
    if time.monotonic() - _START > request.config.getoption("--budget"):
        pytest.skip("out of time")

    def timer(call: Callable[[], Any], rounds: int) -> list[float]:
        benchmark.pedantic(call, rounds=rounds, iterations=1)
        return list(benchmark.stats.stats.data) if benchmark.stats is not None else [float("nan")] * 2

    def run(row: Row, make: Callable[[], Callable[[], Any]], **sizes: Any) -> Row:
        torch.manual_seed(0)
        try:
            measure.measure(row, make, timer=timer, seconds=0.01 if small else 0.4, **sizes)
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            row.error = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            row.ms = None
        benchmark.extra_info.update({key: value for key, value in vars(row).items() if value not in (None, "")})
        if not small:
            table.add(row)
        if row.error:
            pytest.skip(row.error)
        return row

    with measure.fresh_compiler():
        yield run
    if measure.DEVICE.type == "cuda":
        torch.cuda.empty_cache()
