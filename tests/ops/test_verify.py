"""The rule that nothing unverified is a default, with checks made up for the CPU."""

from __future__ import annotations

import importlib
import json
import threading
import warnings
from pathlib import Path

import pytest
import torch

from cyclegan_fast.ops import _launch, _verify

CPU = torch.device("cpu")


class Counted:
    """A check that counts its calls and does what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error

    def __call__(self, device: torch.device) -> None:
        assert device == CPU
        self.calls += 1
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def _a_process_that_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "_checks", {})
    monkeypatch.setattr(_verify, "_rows", {})


def another_process() -> None:
    _verify._rows.clear()


def kept() -> list[Path]:
    return sorted(_verify._cache_folder().glob("*"))


def test_a_good_implementation_is_checked_once_in_a_process_and_once_in_an_environment() -> None:
    check = Counted()
    _verify.register_check("op", "fast", check, devices=("cpu",))
    assert _verify.verified("op", "fast", CPU)
    assert _verify.verified("op", "fast", CPU)
    assert check.calls == 1
    another_process()
    assert _verify.verified("op", "fast", CPU)
    assert check.calls == 1
    assert len(kept()) == 1


def test_a_wrong_one_is_refused_loudly_once_and_checked_again_by_the_next_process() -> None:
    check = Counted(AssertionError("3 of 7 values differ"))
    _verify.register_check("op", "fast", check, devices=("cpu",))
    with pytest.warns(_verify.UnverifiedWarning, match=r"op: implementation 'fast' is not used on cpu.*3 of 7 values"):
        assert not _verify.verified("op", "fast", CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _verify.verified("op", "fast", CPU)
    assert check.calls == 1
    assert kept() == []
    another_process()
    check.error = None
    assert _verify.verified("op", "fast", CPU)


def test_any_exception_is_a_failure_that_names_itself() -> None:
    _verify.register_check("op", "fast", Counted(RuntimeError("no kernel image")), devices=("cpu",))
    with pytest.warns(_verify.UnverifiedWarning, match="RuntimeError: no kernel image"):
        assert not _verify.verified("op", "fast", CPU)


def test_without_a_check_nothing_is_verified() -> None:
    with pytest.warns(_verify.UnverifiedWarning, match="no check is registered"):
        assert not _verify.verified("op", "fast", CPU)


@pytest.mark.parametrize("changed", ["device", "driver", "torch", "cuda", "triton", "sources"])
def test_a_change_of_the_environment_asks_for_a_new_check(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Counted()
    _verify.register_check("op", "fast", check, devices=("cpu",))
    assert _verify.verified("op", "fast", CPU)
    environment = _verify._environment(CPU)
    assert changed in environment
    monkeypatch.setattr(_verify, "_environment", lambda _: environment | {changed: "another"})
    another_process()
    assert _verify.verified("op", "fast", CPU)
    assert check.calls == 2


def test_the_environment_knows_the_sources() -> None:
    environment = _verify._environment(CPU)
    assert environment["torch"] == torch.__version__
    assert len(environment["sources"]) == 32
    json.dumps(environment)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "1", '{"ok": true}', '{"ok": false, "environment": {}}', "\x00\x01"]
)
def test_a_damaged_file_counts_as_none(content: str) -> None:
    check = Counted()
    _verify.register_check("op", "fast", check, devices=("cpu",))
    assert _verify.verified("op", "fast", CPU)
    (file,) = kept()
    file.write_text(content)
    another_process()
    assert _verify.verified("op", "fast", CPU)
    assert check.calls == 2
    assert json.loads(file.read_text())["ok"] is True


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CYCLEGAN_FAST_CACHE", str(tmp_path / "file"))
    check = Counted()
    _verify.register_check("op", "fast", check, devices=("cpu",))
    assert _verify.verified("op", "fast", CPU)
    another_process()
    assert _verify.verified("op", "fast", CPU)
    assert check.calls == 2


def test_threads_that_ask_together_check_once() -> None:
    gate, answers = threading.Barrier(4), []
    check = Counted()
    _verify.register_check("op", "fast", check, devices=("cpu",))

    def ask() -> None:
        gate.wait()
        answers.append(_verify.verified("op", "fast", CPU))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4
    assert check.calls == 1


def test_a_check_runs_with_gradients_and_without_autocast_or_deterministic_mode_whoever_asks() -> None:
    seen: dict[str, bool] = {}

    def check(device: torch.device) -> None:
        x = torch.ones(2, requires_grad=True)
        (gradient,) = torch.autograd.grad((x * x).sum(), x)
        seen["gradient"] = gradient.tolist() == [2, 2]
        seen["autocast"] = torch.is_autocast_enabled("cpu")
        seen["deterministic"] = torch.are_deterministic_algorithms_enabled()

    _verify.register_check("op", "fast", check, devices=("cpu",))
    try:
        torch.use_deterministic_algorithms(True)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert _verify.verified("op", "fast", CPU)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == {"gradient": True, "autocast": False, "deterministic": False}


def test_a_check_that_asks_for_another_one_does_not_wait_for_itself() -> None:
    answers = []
    inner = Counted()
    _verify.register_check("inner", "fast", inner, devices=("cpu",))
    _verify.register_check("op", "fast", lambda _: answers.append(_verify.verified("inner", "fast", CPU)))
    assert _verify.verified("op", "fast", CPU)
    assert answers == [False]
    assert inner.calls == 0
    assert _verify.verified("inner", "fast", CPU)


def test_a_check_leaves_the_callers_random_numbers_alone() -> None:
    _verify.register_check("op", "fast", lambda _: None, devices=("cpu",))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert _verify.verified("op", "fast", CPU)
    assert torch.equal(torch.rand(3), expected)


def test_the_report_checks_what_is_not_known_and_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _verify.register_check("b", "fast", Counted(), devices=("cpu",))
    _verify.register_check("a", "fast", Counted(ValueError("off by one")), devices=("cpu",))
    _verify.register_check("c", "fast", Counted(), devices=("cuda",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = _verify.report()
    assert [(row.op, row.ok) for row in rows] == [("a", False), ("b", True), ("c", None)]
    assert "off by one" in rows[0].detail
    assert "matches the reference" in rows[1].detail
    assert "no cuda device here" in rows[2].detail


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A device that says cuda while it is the CPU, and a stream that is being captured or not."""
    state = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    monkeypatch.setattr(_verify, "_environment", lambda _: {"device": "made up"})
    monkeypatch.setattr(_verify, "_name", lambda _: "cuda:0, made up")
    monkeypatch.setattr(_verify, "_run", lambda op, impl, *_: _verify.Row(op, impl, "cuda:0", True, ""))
    return state


def test_while_a_graph_is_captured_the_unknown_is_refused_but_not_remembered(capturing: list[bool]) -> None:
    device = torch.device("cuda", 0)
    _verify.register_check("op", "fast", lambda _: None)
    with pytest.warns(_verify.UnverifiedWarning, match="not checked before the capture"):
        assert not _verify.verified("op", "fast", device)
    capturing[0] = False
    assert _verify.verified("op", "fast", device)
    another_process()
    capturing[0] = True
    assert _verify.verified("op", "fast", device)  # it was kept


@pytest.mark.parametrize("good", [True, False])
def test_auto_on_a_gpu_is_the_kernel_or_loudly_the_reference(
    good: bool, capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the choice of an op down to a check that fails, with a device that says cuda."""
    capturing[0] = False
    monkeypatch.setattr(_launch, "HAS_TRITON", True)
    row = _verify.Row("op", "triton", "cuda:0", good, "AssertionError: 3 of 7 values differ")
    monkeypatch.setattr(_verify, "_run", lambda *_: row)
    _verify.register_check("op", "triton", lambda _: None)
    device, available = torch.device("cuda", 0), {"triton": True}
    if good:
        assert _launch.default_impl("op", device, available) == "triton"
        return
    with pytest.warns(
        _verify.UnverifiedWarning, match=r"op: implementation 'triton' is not used.*3 of 7 values differ"
    ):
        assert _launch.default_impl("op", device, available) == "reference"
    assert _launch.default_impl("op", device, {"triton": False}) == "reference"


@pytest.mark.skipif(not _launch.INTERPRETED, reason="needs Triton's interpreter")
def test_a_wrong_kernel_of_an_op_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's own check, and its own kernel with one wrong bit."""
    module = importlib.import_module("cyclegan_fast.ops.crop_flip")
    right = module._crop_flip_triton
    monkeypatch.setattr(module, "_crop_flip_triton", lambda *arguments: right(*arguments).nextafter(torch.tensor(2.0)))
    _verify.register_check("crop_flip", "triton", lambda device: module._matches_reference(device, "triton"))
    with pytest.warns(_verify.UnverifiedWarning, match=r"crop_flip: implementation 'triton'.*values differ"):
        assert not _verify.verified("crop_flip", "triton", CPU)
