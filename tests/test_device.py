"""The resolution of device and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cyclegan_fast import device
from cyclegan_fast.device import arithmetic, resolve_device, resolve_precision

CPU = torch.device("cpu")


def test_device_names() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "mps", "cuda:x", ""):
        with pytest.raises(ValueError, match="is not one of auto, cpu, cuda, cuda:N"):
            resolve_device(wrong)


def test_missing_cuda_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'cuda:1' is not there: torch .*; use `auto` or `cpu`"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="this machine has 2, cuda:0 to cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(("capability", "meaning"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], meaning: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert resolve_precision("auto", torch.device("cuda")) == meaning
    assert resolve_precision("tf32", torch.device("cuda")) == "tf32"


def test_auto_precision_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx, meaning in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx: value, raising=False)
        assert resolve_precision("auto", CPU) == meaning
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_that_cpus_lack(precision: str) -> None:
    with pytest.raises(ValueError, match=f"training.precision = '{precision}' needs a CUDA device, not cpu"):
        resolve_precision(precision, CPU)
    with pytest.raises(ValueError, match=r"training\.precision = 'int8' is not one of"):
        resolve_precision("int8", CPU)
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_arithmetic_sets_and_restores() -> None:
    x = torch.ones(2, 2)
    with arithmetic("bf16", CPU):
        assert (x @ x).dtype == torch.bfloat16
    with arithmetic("fp32", CPU):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("start", ["default", "older switch off", "at odds"])
def test_cudnn_is_switched_and_put_back(start: str) -> None:
    cudnn: Any = torch.backends.cudnn
    default = device._tf32_switches()
    if start == "older switch off":
        cudnn.allow_tf32 = False
    elif start == "at odds":
        cudnn.conv.fp32_precision = "ieee"
    before = device._tf32_switches()

    def fail_inside(precision: str) -> None:
        with arithmetic(precision, torch.device("cuda")):
            assert cudnn.conv.fp32_precision == {"fp32": "ieee", "tf32": "tf32"}[precision]
            assert cudnn.allow_tf32 == (precision == "tf32")  # torch's older switch can still be read
            raise KeyError

    try:
        for precision in ("fp32", "tf32"):
            with pytest.raises(KeyError):
                fail_inside(precision)
            assert device._tf32_switches() == before
    finally:
        device._set_tf32_switches(*default)
