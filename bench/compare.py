"""Is this working tree faster than another revision? The same benchmark on both, in turns.

    python bench/compare.py REVISION [--bench step|translate|ops] [--times 3] [--seconds 120]
                            [--out FILE.json] [--markdown FILE.md] [-- OPTIONS OF THE BENCHMARK]

The revision is checked out into a temporary worktree and its native operations are built there, as they should be here
(`make native`). Then this tree's bench/step.py, bench/translate.py or microbenchmarks run on it and on this tree, our
contestants only, one after the other and the other way round the next time. What a revision lacks shows as missing.

The ratio is that of the medians, above 1 where this tree is faster; ± is the larger of both sides' half distances
between the extremes. A difference within it is none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provenance import ROOT, as_text, provenance
from rounds import say
from tables import number, write

BENCHES = ("step", "translate", "ops")
Times = dict[str, float]  # ms of each contestant, by a name that says at what, too


@dataclass
class Pair:
    """One contestant's times on both sides, ms, one a run."""

    there: list[float] = field(default_factory=list)
    here: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """How many times faster it is here; None unless both sides have it."""
        return statistics.median(self.there) / statistics.median(self.here) if self.there and self.here else None

    @property
    def spread(self) -> float:
        """Larger of both sides' half distances between the extremes, over the median; 0 of a single run."""
        sides = [side for side in (self.there, self.here) if side]
        return max((max(side) - min(side)) / 2 / statistics.median(side) for side in sides)

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.ratio is None:
            return "only here" if self.here else "only there"
        if len(self.here) < 2 or abs(self.ratio - 1) <= self.spread:
            return "no difference"
        return "faster" if self.ratio > 1 else "slower"


@contextlib.contextmanager
def checked_out(repository: Path, revision: str) -> Iterator[Path]:
    """The revision in a temporary worktree, which is removed again."""
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(repository), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def build(tree: Path) -> None:
    """Build the tree's native operations, if it has any and can."""
    script = tree / "setup.py"
    if script.exists() and "build_ext" in script.read_text(encoding="utf-8"):
        say("building the revision's native operations")
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        if subprocess.run(command, cwd=tree, check=False).returncode:
            say("they could not be built: that side runs without them")


def run(bench: str, tree: Path, seconds: float, extra: Sequence[str]) -> Times:
    """This tree's benchmark on the package of `tree`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if bench == "ops":
            command = ["-m", "pytest", str(ROOT / "bench"), "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
            command += ["-q", "-p", "no:cacheprovider", "-W", "default", "-k", "ours", "--budget", str(seconds)]
            command += ["--results", str(out), "--name", bench]
        else:
            command = [str(ROOT / "bench" / f"{bench}.py"), "--only", "ours", "--seconds", str(seconds)]
            command += ["--out", str(out / f"{bench}.json"), "--markdown", str(out / f"{bench}.md")]
        paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        # In the tree, since `python -m` looks there before all else.
        done = subprocess.run([sys.executable, *command, *extra], cwd=tree, env=environment, check=False)
        result = out / f"{bench}.json"
        if not result.exists():
            raise SystemExit(f"the benchmark wrote no result on {tree} (status {done.returncode})")
        return times_of(json.loads(result.read_text(encoding="utf-8")))


def times_of(content: dict[str, Any]) -> Times:
    """The times in a result of bench/step.py, bench/translate.py or the microbenchmarks."""
    found: Times = {}
    for group in content.get("batches", []):
        found |= {f"batch {group['batch']}, {row['name']}": row["ms"] for row in group["rows"]}
    for group in content.get("sizes", []):
        found |= {f"{group['width']}x{group['height']}, {row['name']}": row["ms"] for row in group["rows"]}
    for row in content.get("rows", []):
        what = f"{row['op']} {row['shape']}, batch {row['batch']}, {row['dtype']} {row['direction']}"
        found[f"{what}, {row['contestant']}"] = row["ms"]
    return {name: ms for name, ms in found.items() if ms is not None and "ours" in name}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("revision", help="whatever git understands: HEAD, a branch, a tag, a commit")
    parser.add_argument("--bench", choices=BENCHES, default="step")
    parser.add_argument("--times", type=int, default=3, help="runs of each side")
    parser.add_argument("--seconds", type=float, default=120.0, help="of one run of one side")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write (default: standard output)")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, extra = split_options(arguments)
    options = parser.parse_args(own)
    pairs: dict[str, Pair] = {}
    with checked_out(ROOT, options.revision) as tree:
        build(tree)
        for turn in range(options.times):
            sides = [("there", tree), ("here", ROOT)]
            for side, place in sides if turn % 2 == 0 else reversed(sides):
                say(f"run {turn + 1} of {options.times}, {side}")
                for name, ms in run(options.bench, place, options.seconds, extra).items():
                    getattr(pairs.setdefault(name, Pair()), side).append(ms)
    facts = provenance()
    rows = {name: {**vars(pair), "ratio": pair.ratio, "spread": pair.spread} for name, pair in pairs.items()}
    content = {"provenance": facts, "revision": options.revision, "bench": options.bench, "rows": rows}
    text = "\n".join(_table(options.revision, options.bench, facts, pairs)) + "\n"
    write(options.out, json.dumps(content, indent=1))
    write(options.markdown, text)
    if options.markdown is None:
        print(text)


def split_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--` and after it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _table(revision: str, bench: str, facts: dict[str, Any], pairs: dict[str, Pair]) -> list[str]:
    lines = [f"# {bench}: this tree against {revision}", "", as_text(facts), ""]
    lines += [f"| | {revision}, ms | here, ms | times faster | ± % | |", "|---" * 6 + "|"]
    for name, pair in pairs.items():
        there, here = (number(statistics.median(side), 4) if side else "" for side in (pair.there, pair.here))
        ratio = "" if pair.ratio is None else f"{pair.ratio:.3f}"
        lines.append(f"| {name} | {there} | {here} | {ratio} | {100 * pair.spread:.1f} | {pair.verdict} |")
    return lines


if __name__ == "__main__":
    main()
