"""What is asked of the machine without torch."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys

import pytest

from cyclegan_fast import device
from cyclegan_fast.machine import cpu_name, keep_freed_memory, usable_cores


def test_usable_cores_are_those_of_the_affinity_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert usable_cores() == device.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)  # a platform that does not tell
    assert usable_cores() == 1


def test_the_cpu_has_a_name() -> None:
    assert cpu_name().strip()


def test_asking_loads_no_torch() -> None:
    """Neither do the processes that render and decode pictures, which ask for the cores too."""
    code = "import sys, cyclegan_fast.machine, cyclegan_fast.data.synthetic, cyclegan_fast.data.store\n"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


_TWICE = """
import ctypes, resource, sys
import numpy
from cyclegan_fast.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.empty(64 << 20, numpy.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

if not keep_freed_memory():
    sys.exit(3)
first, second, held = faults(), faults(), resident()
keep_freed_memory(False)
print(first, second, held - resident(), (faults(), faults())[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_while_asked_for() -> None:
    """64 MiB, allocated and freed twice: its pages are mapped once, go back at the end, and are mapped anew then."""
    run = subprocess.run([sys.executable, "-c", _TWICE], check=True, capture_output=True, text=True)
    first, second, returned, afterwards = map(int, run.stdout.split())
    pages = (64 << 20) // resource.getpagesize()
    huge = first < pages // 8  # transparent huge pages: a fault maps 512 of them
    assert huge or first > 0.9 * pages
    assert second <= 8
    assert returned > 0.9 * pages
    assert afterwards > 8


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
