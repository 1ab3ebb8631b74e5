"""``train.py`` with planned faults; what it trains on and what it takes is written down. For tests and bench/soak.py.

The folder named by FAULTY holds ``plan.json``, a list of faults: what to do (`act`), at which step counted from 0
(`step`), on which rank (`rank`), and when: at the step's beginning, so many seconds later (`delay`), or, with
`saving`, when the next checkpoint from that step on is written but does not have its name yet. Each happens once: it
leaves a file ``fault-N`` there before it happens. Every process writes ``samples-PID.jsonl`` (step, rank, indices of A
and of B) and ``resources-PID.jsonl`` (step, rank, bytes of resident memory, open files, threads).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from cyclegan_fast import distributed
from cyclegan_fast.cli import main
from cyclegan_fast.training.trainer import Trainer

FOLDER = Path(os.environ["FAULTY"])
EVERY = 25  # steps between looks at the resources


def siblings() -> list[int]:
    """The processes that this one's launcher started, itself last."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == os.getppid():
            found.append(int(status.parent.name))
    return sorted(found, key=lambda pid: pid == os.getpid())


def act(name: str) -> None:
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "kill all":  # with the launcher, as when a machine fails
        everyone = [os.getppid(), *siblings()]
        for pid in everyone:
            os.kill(pid, signal.SIGKILL)
    elif name == "kill launcher":
        os.kill(os.getppid(), signal.SIGKILL)
    elif name == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    elif name == "terminate all":
        os.kill(os.getppid(), signal.SIGTERM)
    elif name == "terminate all twice":  # as a scheduler that signals every process of the job
        for pid in [os.getppid(), *siblings()]:
            os.kill(pid, signal.SIGTERM)
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "loop":
        while True:
            pass
    else:
        raise ValueError(name)


class Faults:
    """The plan, and what of it has happened."""

    def __init__(self) -> None:
        plan = FOLDER / "plan.json"
        self._plan: list[dict[str, Any]] = json.loads(plan.read_text()) if plan.exists() else []

    def _due(self, step: int, *, saving: bool) -> list[dict[str, Any]]:
        due = []
        for number, fault in enumerate(self._plan):
            reached = step >= fault["step"] if saving else step == fault["step"]
            mine = fault["rank"] == distributed.rank() and fault.get("saving", False) == saving
            if reached and mine and not (FOLDER / f"fault-{number}").exists():
                (FOLDER / f"fault-{number}").write_text(f"{step}\n")
                due.append(fault)
        return due

    def at_step(self, step: int) -> None:
        for fault in self._due(step, saving=False):
            if delay := fault.get("delay", 0):
                threading.Timer(delay, act, [fault["act"]]).start()
            else:
                act(fault["act"])

    def while_saving(self, step: int) -> None:
        for fault in self._due(step, saving=True):
            act(fault["act"])


def resources() -> tuple[int, int, int]:
    """Resident bytes, open files and threads of this process, without those of faults to come."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))  # noqa: PTH208
    waiting = sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    return pages * os.sysconf("SC_PAGE_SIZE"), files, threads - waiting


def install() -> None:
    """Put the faults and the records into the trainer."""
    faults = Faults()
    samples = (FOLDER / f"samples-{os.getpid()}.jsonl").open("a")
    looks = (FOLDER / f"resources-{os.getpid()}.jsonl").open("a")
    take_step, save = Trainer._take_step, torch.save
    step = 0

    def recorded_step(self: Trainer, batch: Any, lr: float) -> Any:
        nonlocal step
        step = self.step
        print(json.dumps([step, distributed.rank(), batch.index_A.tolist(), batch.index_B.tolist()]), file=samples)
        samples.flush()
        if step % EVERY == 0:
            print(json.dumps([step, distributed.rank(), *resources()]), file=looks, flush=True)
        faults.at_step(step)
        return take_step(self, batch, lr)

    def interrupted_save(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        faults.while_saving(step)

    Trainer._take_step = recorded_step  # type: ignore[method-assign]
    torch.save = interrupted_save


if __name__ == "__main__":
    install()
    sys.exit(main(["train", *sys.argv[1:]]))
