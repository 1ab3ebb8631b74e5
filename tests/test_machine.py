"""What is asked of the machine without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cyclegan_fast import device
from cyclegan_fast.machine import cpu_name, usable_cores


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
