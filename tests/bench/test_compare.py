"""Two revisions are measured by the same script, each with its own package, and compared with their spreads."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import compare
import pytest
from compare import Pair

# Stands for a benchmark: how long "ours" takes is what the tree that it runs in says.
SCRIPT = """
import json, sys
from pathlib import Path
import speed
out = Path(sys.argv[sys.argv.index("--out") + 1])
times = {"ours fp32 eager": speed.MS, "(a) peer": 1.0, "ours, not measured": None}
rows = [{"name": name, "ms": ms} for name, ms in times.items()]
out.write_text(json.dumps({"batches": [{"batch": 1, "rows": rows}]}))
assert "--only" in sys.argv and sys.argv[-2:] == ["--size", "64"], sys.argv
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A first revision that takes 30 ms, and a working tree that takes 20."""
    root = tmp_path / "project"
    (root / "bench").mkdir(parents=True)
    (root / "bench" / "step.py").write_text(SCRIPT)
    (root / "speed.py").write_text("MS = 30.0\n")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    (root / "speed.py").write_text("MS = 20.0\n")
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return root


def test_both_sides_run_their_own_package(repository: Path, tmp_path: Path) -> None:
    out, markdown = tmp_path / "out.json", tmp_path / "out.md"
    files = ["--out", str(out), "--markdown", str(markdown)]
    compare.main(["HEAD", "--times", "2", *files, "--", "--size", "64"])
    row = json.loads(out.read_text())["rows"]["batch 1, ours fp32 eager"]
    assert (row["there"], row["here"]) == ([30.0, 30.0], [20.0, 20.0])
    assert row["ratio"] == 1.5
    assert "| batch 1, ours fp32 eager | 30 | 20 | 1.500 | 0.0 | faster |" in markdown.read_text()
    assert "(a) peer" not in markdown.read_text()
    listed = subprocess.run(["git", "-C", repository, "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1  # the temporary one is gone


def test_a_benchmark_that_fails_ends_the_comparison(repository: Path) -> None:
    (repository / "bench" / "step.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"wrote no result on .* \(status 3\)"):
        compare.main(["HEAD", "--times", "1"])
    assert not (repository / ".git" / "worktrees").exists()


@pytest.mark.parametrize(
    ("there", "here", "ratio", "verdict"),
    [
        ([30, 31, 29], [20, 21, 20], 1.5, "faster"),
        ([20, 21, 20], [30, 31, 29], 2 / 3, "slower"),
        ([20, 24, 21], [20, 20, 20], 1.05, "no difference"),
        ([30], [20], 1.5, "no difference"),  # once is no measurement
        ([], [20, 20], None, "only here"),
        ([20, 20], [], None, "only there"),
    ],
)
def test_verdicts(there: list[float], here: list[float], ratio: float | None, verdict: str) -> None:
    pair = Pair(there, here)
    assert pair.ratio == (None if ratio is None else pytest.approx(ratio))
    assert pair.verdict == verdict


def test_times_of_every_kind_of_result() -> None:
    ops = {"op": "norm", "shape": "64", "batch": 1, "dtype": "float32", "direction": "forward"}
    content = {
        "sizes": [{"width": 64, "height": 32, "rows": [{"name": "ours fp32 eager", "ms": 3.0}]}],
        "rows": [{**ops, "contestant": "ours, native", "ms": 2.0}, {**ops, "contestant": "eager NCHW", "ms": 9.0}],
    }
    assert compare.times_of(content) == {
        "64x32, ours fp32 eager": 3.0,
        "norm 64, batch 1, float32 forward, ours, native": 2.0,
    }


def test_options_after_the_dashes_belong_to_the_benchmark() -> None:
    assert compare.split_options(["HEAD", "--times", "2"]) == (["HEAD", "--times", "2"], [])
    assert compare.split_options(["HEAD", "--", "--small"]) == (["HEAD"], ["--small"])
