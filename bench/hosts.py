"""Two hosts on one machine: network namespaces joined by a link of limited rate and delay. Needs Linux and root.

`tc tbf` limits what each host sends. Without delay the two are joined by a veth pair, with delay by two TUN devices and
bench/delay_line.py, which holds each packet back: the `netem` queue that would do it in the kernel is missing in many.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
_PREFIX = "cyclegan-net"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# Jumbo frames: a fifth of the packets, which a delay line in Python can carry at 1 Gbit/s.
_MTU = 9000
# Of a frame's bytes on the wire, which tbf counts, and those of the segment in it: IP, TCP with time stamps, Ethernet.
PAYLOAD = (_MTU - 52) / (_MTU + 14)
_SYSCTL = {
    # Nothing is lost on this link, so nothing but the window's first growth depends on it; one that every namespace may
    # choose. BBR, some kernels' default, empties its window every ten seconds to look at the delay.
    "net/ipv4/tcp_congestion_control": "reno",
    # As on hosts tuned for such links: no slow start after each pause for computing, windows as large as the link asks.
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_wmem": "4096 131072 33554432",
    "net/ipv4/tcp_rmem": "4096 131072 33554432",
}
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class NoLinkError(RuntimeError):
    """The machine does not let us make hosts and links; the message says what is missing."""


@dataclass(frozen=True)
class Link:
    """Bits/s each way, and seconds one way."""

    rate: float
    delay: float

    def __str__(self) -> str:
        rate = f"{self.rate / 1e9:g} Gbit/s" if self.rate >= 1e9 else f"{self.rate / 1e6:g} Mbit/s"
        return f"{rate}, {1e3 * self.delay:g} ms"


@dataclass(frozen=True)
class Host:
    """A network namespace and its one device."""

    namespace: str
    device: str
    address: str

    def command(self, *arguments: str | Path) -> list[str]:
        """Run inside."""
        return ["ip", "netns", "exec", self.namespace, *map(str, arguments)]


@contextlib.contextmanager
def two_hosts(link: Link) -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by the link; they are gone afterwards. Raises NoLinkError where that is not allowed."""
    _check_rights(link)
    sweep()
    hosts = tuple(
        Host(f"{_PREFIX}-{os.getpid()}-{side}", f"cg{os.getpid()}{side}", address)
        for side, address in zip("ab", ADDRESSES, strict=True)
    )
    with contextlib.ExitStack() as stack:
        for host in hosts:
            stack.callback(_delete, host.namespace)
            _ip("netns", "add", host.namespace)
        if link.delay:
            _join_by_delay_lines(stack, hosts, link.delay)
        else:
            one, other = hosts
            _ip("link", "add", one.device, "netns", one.namespace, "type", "veth",
                "peer", "name", other.device, "netns", other.namespace)  # fmt: skip
        for host in hosts:
            _configure(host, link)
        yield hosts[0], hosts[1]


def _configure(host: Host, link: Link) -> None:
    settings = "; ".join(f"echo '{value}' > /proc/sys/{name}" for name, value in _SYSCTL.items())
    _call(host.command("sh", "-ec", settings))
    inside = ("-n", host.namespace)
    _ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.device)
    _ip(*inside, "link", "set", host.device, "mtu", str(_MTU), "txqueuelen", "10000", "up")
    _ip(*inside, "link", "set", "lo", "up")
    # Four frames may pass at once after a pause; the queue is long enough that nothing is dropped.
    queue = ("tbf", "rate", f"{link.rate:.0f}bit", "burst", f"{4 * (_MTU + 14)}", "limit", "64mb")
    _call(["tc", *inside, "qdisc", "add", "dev", host.device, "root", *queue])


def _join_by_delay_lines(stack: contextlib.ExitStack, hosts: Sequence[Host], delay: float) -> None:
    """A TUN device in each host and a process for each direction between them."""
    descriptors = []
    for host in hosts:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        request = struct.pack("16sH22x", host.device.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
        _ip("link", "set", host.device, "netns", host.namespace)
        descriptors.append(descriptor)
    for source, sink in (descriptors, descriptors[::-1]):
        command = [sys.executable, "-S", ROOT / "bench" / "delay_line.py", str(source), str(sink), str(delay)]
        line = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(source, sink))  # ends when our end closes
        stack.callback(_end, line)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _check_rights(link: Link) -> None:
    if not sys.platform.startswith("linux"):
        raise NoLinkError(f"network namespaces are Linux's, and this is {sys.platform}")
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise NoLinkError(f"{' and '.join(missing)} not found: install iproute2")
    if os.geteuid() != 0:
        raise NoLinkError("making network namespaces needs root: run it by sudo")
    if link.delay and not Path("/dev/net/tun").exists():
        raise NoLinkError("/dev/net/tun is missing, which the delay needs: load the module tun, or use --delay 0ms")


def sweep() -> None:
    """Delete what a program that was killed could not."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name, pid in re.findall(rf"^({_PREFIX}-(\d+)-[ab])\b", listed, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            _delete(name)


def _delete(namespace: str) -> None:
    """End what runs in a namespace and delete it, if it is there."""
    inside = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in map(int, inside.stdout.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    _call(["ip", *arguments])


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoLinkError(f"`{' '.join(command)}` was refused: {done.stderr.strip() or done.returncode}")


def on_both(hosts: Sequence[Host], commands: Sequence[Sequence[str | Path]], timeout: float) -> None:
    """Run one command on each host at the same time. Raises RuntimeError with its output if one fails or is late."""
    with contextlib.ExitStack() as stack:
        started = []
        for host, command in zip(hosts, commands, strict=True):
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                host.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "GLOO_SOCKET_IFNAME": host.device, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
            stack.callback(_kill, process)
            started.append((process, log))
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process, _ in started):
            failed = any(process.poll() for process, _ in started)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for process, log in sorted(started, key=lambda one: one[0].poll() is None):  # the one that failed first
            if process.poll() != 0:
                log.seek(0)
                state = "did not end in time" if process.poll() is None else f"ended with {process.poll()}"
                raise RuntimeError(f"`{' '.join(map(str, process.args))}` {state}:\n{log.read()[-3000:]}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sent_bytes(host: Host) -> int:
    """Bytes that a host has sent."""
    lines = subprocess.run(host.command("cat", "/proc/net/dev"), capture_output=True, text=True, check=True).stdout
    fields = next(line.partition(":")[2] for line in lines.splitlines() if line.strip().startswith(host.device + ":"))
    return int(fields.split()[8])


@contextlib.contextmanager
def leaving_in_order() -> Iterator[None]:
    """Signals that would end the program on the spot, or that it was started deaf to, raise SystemExit instead."""

    def leave(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal handler
        sys.exit(128 + signum)

    previous = {signum: signal.signal(signum, leave) for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
