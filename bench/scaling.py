"""What 1 to 1,024 GPUs should reach: the predictions of bench/communication.py as tables and a plot.

    python bench/scaling.py              # prints the tables
    python bench/scaling.py --write      # puts them into docs/scaling.md, docs/scaling.svg and bench/results/

Everything here is a prediction: the step of one GPU comes from bench/model.py, links from data sheets. What was
measured stands in bench/results/scaling-gloo*.json, by bench/network.py, and is shown in the same page.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from communication import CLUSTERS, Plan, Timeline, computed, timeline
from model import Task
from network import table as measured_table

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.svg"
RESULTS = ROOT / "bench" / "results"
# Results of bench/network.py, by their place in the page.
MEASURED = {
    "measured": RESULTS / "scaling-gloo.json",
    "measured, one reduction": RESULTS / "scaling-gloo-one-reduction.json",
}

PROCESSES = tuple(2**exponent for exponent in range(11))
BATCHES = (1, 2, 4, 8, 16)
TRAINER = Plan("discriminators", "forward")
PLANS = {
    "one reduction": Plan(),
    "buckets": Plan("backward", "forward"),
    "D beside": TRAINER,
    "bf16": replace(TRAINER, half=True),
    "fakes beside": replace(TRAINER, half=True, gather="beside"),
    "own pools, rare votes": replace(TRAINER, half=True, shared=False, vote_every=50),
}
# The efficiency that is worth its GPUs, in the tables of what to choose.
_ENOUGH = 0.9
_SHOWN = (1, 2, 4, 8, 16, 64, 256, 1024)


@functools.lru_cache(maxsize=4096)
def predicted(cluster: str, processes: int, batch: int, plan: str) -> Timeline:
    """The step on so many GPUs of a cluster of `CLUSTERS`, by a plan of `PLANS`."""
    compute = computed(Task(batch), CLUSTERS[cluster].device)
    return timeline(compute, CLUSTERS[cluster], processes, PLANS[plan])


def efficiency(cluster: str, processes: int, batch: int, plan: str) -> float:
    """Pairs/s for each GPU, as a share of those of a single one at the same batch."""
    return predicted(cluster, 1, batch, plan).total / predicted(cluster, processes, batch, plan).total


def pairs(cluster: str, processes: int, batch: int, plan: str) -> float:
    """Pairs/s of all GPUs."""
    return processes * batch / predicted(cluster, processes, batch, plan).total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/ and bench/results/ instead of printing")
    options = parser.parse_args(arguments)
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        (RESULTS / "scaling-model.md").write_text(full(), encoding="utf-8")
        (RESULTS / "scaling-model.json").write_text(as_json(), encoding="utf-8")
        plot(PLOT)
    else:
        print(full())
        for lines in blocks().values():
            print("\n".join(lines), end="\n\n")


def page(text: str) -> str:
    """The page with its blocks made anew; raises ValueError if it lacks the place for one."""
    for name, lines in blocks().items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise ValueError(f"{PAGE} has no place for {name!r}: {begin.strip()} {end}")
        before, _, rest = text.partition(begin)
        text = before + begin + "\n".join(["", *lines, ""]) + "\n" + end + rest.partition(end)[2]
    return text


def blocks() -> dict[str, list[str]]:
    """What docs/scaling.md shows, by the name of its place."""
    measured = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in MEASURED.items()}
    return {
        **{name: measured_table(content["rows"]) for name, content in measured.items()},
        "predicted": list(_overview()),
        "losses": list(_losses()),
        "choice": list(_choice()),
    }


def _overview() -> Iterator[str]:
    """Pairs/s and efficiency by cluster, GPUs and batch."""
    shown = (1, 4, 16)
    for index, name in enumerate(CLUSTERS):
        if index:
            yield ""
        yield f"**{name}**"
        yield ""
        yield "| GPUs | " + " | ".join(f"batch {batch}: pairs/s | one reduction | overlapped" for batch in shown) + " |"
        yield "|---" * (1 + 3 * len(shown)) + "|"
        for processes in _SHOWN:
            cells = []
            for batch in shown:
                speed = pairs(name, processes, batch, "D beside")
                shares = [efficiency(name, processes, batch, plan) for plan in ("one reduction", "D beside")]
                cells.append(f"{speed:,.0f} | " + " | ".join(f"{share:.0%}" for share in shares))
            yield f"| {processes:,} | {' | '.join(cells)} |"


def _losses() -> Iterator[str]:
    """Where the time goes on the first cluster."""
    name = next(iter(CLUSTERS))
    yield "| GPUs | batch | step alone | step | of it for G | fakes | D | vote | readings | copies |"
    yield "|---" * 10 + "|"
    for processes in (8, 64, 256, 1024):
        for batch in (1, 16):
            step = predicted(name, processes, batch, "D beside")
            alone = predicted(name, 1, batch, "D beside").total
            times = [alone, step.total, *step.waits.values(), step.copies]
            yield f"| {processes:,} | {batch} | " + " | ".join(f"{1e3 * seconds:.2f}" for seconds in times) + " |"


def _choice() -> Iterator[str]:
    """The least batch that keeps GPUs busy, by plan."""
    yield f"| cluster | GPUs | {' | '.join(PLANS)} |"
    yield "|---" * (2 + len(PLANS)) + "|"
    for name in CLUSTERS:
        for processes in (2, 8, 64, 1024):
            cells = []
            for plan in PLANS:
                shares = {batch: efficiency(name, processes, batch, plan) for batch in BATCHES}
                enough = [batch for batch, share in shares.items() if share >= _ENOUGH]
                cells.append(f"**{enough[0]}**" if enough else f"({max(shares.values()):.0%})")
            yield f"| {name} | {processes:,} | {' | '.join(cells)} |"


def full() -> str:
    """Efficiency and pairs/s of all plans, clusters, sizes and batches."""
    lines = ["# Predicted efficiency of training on many GPUs", "", " ".join((__doc__ or "").split("\n\n")[2].split())]
    for name, cluster in CLUSTERS.items():
        alone = ", ".join(f"{1e3 * predicted(name, 1, batch, 'buckets').total:.1f} at {batch}" for batch in BATCHES)
        lines += ["", f"## {name}", "", f"One {cluster.device}, ms a step by batch: {alone}. Below, efficiency in %."]
        lines += ["", f"| GPUs | batch | {' | '.join(PLANS)} | pairs/s by the last |", "|---" * (3 + len(PLANS)) + "|"]
        for processes in PROCESSES[1:]:
            for batch in BATCHES:
                shares = [f"{100 * efficiency(name, processes, batch, plan):.0f}" for plan in PLANS]
                speed = pairs(name, processes, batch, list(PLANS)[-1])
                lines.append(f"| {processes:,} | {batch} | {' | '.join(shares)} | {speed:,.0f} |")
    return "\n".join(lines) + "\n"


def as_json() -> str:
    """Milliseconds of a step, as clusters, plans, batches and then a list by number of GPUs."""
    tree: dict[str, Any] = {"processes": PROCESSES, "milliseconds": {}}
    for name in CLUSTERS:
        tree["milliseconds"][name] = {
            plan: {
                batch: [round(1e3 * predicted(name, processes, batch, plan).total, 3) for processes in PROCESSES]
                for batch in BATCHES
            }
            for plan in PLANS
        }
    return json.dumps(tree, indent=1) + "\n"


def plot(path: Path) -> None:
    """Efficiency over the number of GPUs, a panel for each cluster."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    styles = {"one reduction": ":", "D beside": "-", "own pools, rare votes": "--"}
    with mpl.rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.5, 6.4), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
        for panel, name in zip(panels, CLUSTERS, strict=True):
            for colour, batch in (("C0", 1), ("C1", 4), ("C2", 16)):
                for plan, style in styles.items():
                    shares = [100 * efficiency(name, processes, batch, plan) for processes in PROCESSES]
                    panel.plot(PROCESSES, shares, style, color=colour, label=f"batch {batch}, {plan}")
            panel.set_xscale("log", base=2)
            panel.set_xticks(PROCESSES, [f"{processes:,}" for processes in PROCESSES])
            panel.set_ylim(0, 104)
            panel.set_title(name)
            panel.grid(alpha=0.3)
        figure.supxlabel("GPUs")
        figure.supylabel("predicted efficiency, %")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
