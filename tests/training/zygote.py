"""Processes that are killed on purpose: forked from one that has imported everything, so that each starts at once.

A child runs in a session of its own, which is how what it leaves behind is found.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_SERVER = """
import json, os, sys, time, traceback
from cyclegan_fast.training import trainer
import torch.utils.tensorboard

def child(code, cwd, environment, out):
    os.setsid()
    os.chdir(cwd)
    os.environ.update(environment)
    with open(out, "wb") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        exec(compile(code, "<fault>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        child(*request)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Zygote:
    """The process that forks; one child at a time."""

    def __init__(self) -> None:
        self._running: Child | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, code: str, folder: Path) -> Child:
        """Run code in a child. Its output goes to a file in the folder, which is its working folder."""
        out = folder / f"output-{time.monotonic_ns()}.txt"
        environment = {"CYCLEGAN_FAST_CACHE": os.environ["CYCLEGAN_FAST_CACHE"]}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([code, str(folder), environment, str(out)]) + "\n")
        self._process.stdin.flush()
        self._running = Child(int(self._answer()), out, self)
        return self._running

    def run(self, code: str, folder: Path) -> Child:
        """Run code in a child to its end."""
        child = self.start(code, folder)
        child.wait()
        return child

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        if self._running is not None and self._running.status is None:  # its test has failed
            self._running.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


class Child:
    """A process that is expected to come to a bad end."""

    def __init__(self, pid: int, out: Path, zygote: Zygote) -> None:
        self.pid, self._out, self._zygote = pid, out, zygote
        self.status: int | None = None

    @property
    def output(self) -> str:
        return self._out.read_text()

    def wait(self, seconds: float = 60) -> int:
        """The exit status, or minus the signal. Whoever hangs is killed, and fails the test."""
        watch = subprocess.Popen(  # waiting is the zygote's; this only limits it
            [sys.executable, "-S", "-c", f"import time, os; time.sleep({seconds}); os.killpg({self.pid}, 9)"],
        )
        try:
            self.status = int(self._zygote._answer())
        finally:
            hung = watch.poll() is not None
            watch.kill()
            watch.wait()
        assert not hung, f"still running after {seconds} s:\n{self.output}"
        return self.status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


def session(pid: int) -> list[str]:
    """Commands of the processes of a session that are alive."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == pid and state not in "ZX":
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except (OSError, ValueError):  # it has ended meanwhile
                continue
    return found


def shared_memory() -> set[str]:
    """Names of the segments that no process has mapped or open: nobody will remove them."""
    folder = Path("/dev/shm")  # noqa: S108
    if not folder.is_dir():
        return set()
    names, used = {path.name for path in folder.iterdir()}, ""
    for process in Path("/proc").iterdir():
        if names and process.name.isdigit():
            try:
                used += (process / "maps").read_text()
                used += "\n".join(str(link.readlink()) for link in (process / "fd").iterdir())
            except OSError:
                continue
    return {name for name in names if str(folder / name) not in used}
