"""The limited link between two hosts: it is as slow as asked, it is refused where it cannot be, and nothing stays."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import network
import pytest
from hosts import Host, Link, NoLinkError, two_hosts

# Passes so many bytes from one host to the other, both ways at once, and says how long a byte and how long all took.
TALK = """
import socket, sys, threading, time
first, size = sys.argv[1] == "first", int(sys.argv[2])
if first:
    server = socket.create_server(("10.77.0.1", 5577))
    line = server.accept()[0]
else:
    while True:
        try:
            line = socket.create_connection(("10.77.0.1", 5577))
            break
        except OSError:
            time.sleep(0.05)
line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

def receive(count):
    while count:
        count -= len(line.recv(min(count, 2**18)))

def both(count):
    sender = threading.Thread(target=line.sendall, args=(bytes(count),))
    begin = time.perf_counter()
    sender.start()
    receive(count)
    sender.join()
    return time.perf_counter() - begin

times = []
for _ in range(10):
    begin = time.perf_counter()
    if first:
        line.sendall(b"x")
        receive(1)
    else:
        receive(1)
        line.sendall(b"x")
    times.append(time.perf_counter() - begin)
print(min(times))
both(size)
print(min(both(size) for _ in range(2)))
"""


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if "cyclegan-net" in line]


@pytest.fixture(scope="module")
def allowed() -> None:
    """Skips where the machine does not let us make hosts."""
    try:
        with two_hosts(Link(1e9, 1e-3)):
            pass
    except NoLinkError as error:
        pytest.skip(str(error))


def talk(both: tuple[Host, Host], size: int) -> tuple[float, float]:
    """Seconds there and back of a byte, and of so many bytes both ways."""
    processes = [
        subprocess.Popen(host.command(sys.executable, "-c", TALK, name, str(size)), stdout=subprocess.PIPE, text=True)
        for host, name in zip(both, ("first", "second"), strict=True)
    ]
    try:
        said = [process.communicate(timeout=30)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return float(said[0][0]), float(said[0][1])


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("link", [Link(40e6, 0.0), Link(80e6, 0.015)], ids=str)
def test_a_link_is_as_slow_as_asked(link: Link) -> None:
    with two_hosts(link) as both:
        assert len([name for name in namespaces() if f"-{os.getpid()}-" in name]) == 2
        there_and_back, bulk = talk(both, 2**20)
    assert not [name for name in namespaces() if f"-{os.getpid()}-" in name]
    least = 8 * 2**20 / link.rate
    # Never faster, but for what may pass at once; slower on a busy machine.
    assert 2 * link.delay <= there_and_back < 2 * link.delay + 0.05
    assert least * 0.9 < bulk < least + 2 * link.delay + 1


@pytest.fixture
def running(allowed: None, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program with two hosts and something that runs in one of them, killed at last."""
    code = (
        "import subprocess, time\n"
        "from hosts import Link, two_hosts, leaving_in_order\n"
        "with leaving_in_order(), two_hosts(Link(1e9, 1e-3)) as both:\n"
        "    subprocess.Popen(both[0].command('sh', '-c', 'echo ready; exec sleep 60'))\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()
        hosts.sweep()


def own(process: subprocess.Popen[str]) -> list[str]:
    return [name for name in namespaces() if f"-{process.pid}-" in name]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(running: subprocess.Popen[str], signum: int) -> None:
    assert len(own(running)) == 2
    running.send_signal(signum)
    assert running.wait(timeout=20) != 0
    assert own(running) == []


def test_what_a_kill_leaves_the_next_run_clears(running: subprocess.Popen[str]) -> None:
    hosts.sweep()
    (first, _) = sorted(own(running))  # those of a living program stay
    inside = subprocess.run(["ip", "netns", "pids", first], capture_output=True, text=True, check=True).stdout
    running.kill()
    running.wait()
    with two_hosts(Link(1e9, 0.0)):
        assert own(running) == []
    (sleeper,) = inside.split()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{sleeper}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{sleeper}/stat").read_text().split()[2] == "Z":  # ended, and nobody asked for its status
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{sleeper}").exists()


def test_refused_without_rights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "platform", "linux")
    assert network.main(["--rate", "10mbit"]) == 2
    assert "needs root: run it by sudo" in capsys.readouterr().err


def test_refused_without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(NoLinkError, match="ip and tc not found: install iproute2"), two_hosts(Link(1e6, 0)):
        pass


def test_what_the_kernel_refuses_is_quoted() -> None:
    with pytest.raises(NoLinkError, match=r"`sh -c echo no; exit 3` was refused: 3"):
        hosts._call(["sh", "-c", "echo no; exit 3"])


def test_quantities() -> None:
    parse = network._quantities({"ms": 1e-3, "s": 1.0})
    assert parse("5ms, 0.5s") == pytest.approx([0.005, 0.5])
    for wrong in ("5", "ms", "5 km", "5ms,"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number with one of ms, s behind it"):
            parse(wrong)
    assert str(Link(2e9, 0.005)) == "2 Gbit/s, 5 ms"


@pytest.mark.slow
@pytest.mark.usefixtures("allowed")
def test_two_hosts_train(tmp_path: Path) -> None:
    """The whole program at a toy size: predicted, trained and written; the bytes that were sent are those counted."""
    out, page = tmp_path / "out.json", tmp_path / "out.md"
    options = ("--ngf", "4", "--size", "32", "--blocks", "1", "--steps", "15", "--rate", "20mbit", "--delay", "2ms")
    script = Path(network.__file__)
    command = [sys.executable, script, *options, "--out", out, "--markdown", page]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    (row,) = content["rows"]
    assert row["predicted_at"] < row["measured_at"]
    assert row["predicted"] > row["alone"] > 0
    assert row["measured"] > 0
    # Beside the gradients: acknowledgements, votes, and what starting and checking takes, which here counts for more.
    assert row["bytes"] < row["sent"] < 3 * row["bytes"]
    assert "| 20 Mbit/s, 2 ms |" in page.read_text()
