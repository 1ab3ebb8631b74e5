"""docs/reliability.md names tests; each of them exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"


def named(text: str) -> list[tuple[str, str]]:
    """File and function of every test that a page names."""
    return re.findall(r"\b(test_\w+\.py)::(\w+)", text)


@functools.cache
def written() -> set[tuple[str, str]]:
    """File and function of every test there is."""
    return {
        (path.name, node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }


def test_every_test_that_the_page_names_exists() -> None:
    names = named(PAGE.read_text(encoding="utf-8"))
    assert len(names) > 25
    assert [name for name in names if name not in written()] == []
    assert ("test_faults.py", "test_of_nothing") not in written()


def test_every_fault_has_a_test() -> None:
    """Rows of the tables with a column of tests name at least one."""
    tables = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    faults = [table.splitlines() for table in tables if table.splitlines()[0].endswith("| Test |")]
    assert faults
    rows = [row for table in faults for row in table[2:]]
    assert [row for row in rows if not named(row.split("|")[-2])] == []


def test_every_injected_fault_is_on_the_page() -> None:
    on_page = {name for _, name in named(PAGE.read_text(encoding="utf-8"))}
    inside = {name for file, name in written() if file == "test_faults.py" and name.startswith("test_")}
    assert inside - on_page == {"test_history_is_one_tensor_in_a_checkpoint"}
