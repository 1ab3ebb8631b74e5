"""What the demo page does without its browser: limits, messages, files and the temporary folder."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import noise, picture, save_run, translator

from cyclegan_fast import cli
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.demo import workbench as module
from cyclegan_fast.inference.demo.limits import Limits, checked_limits
from cyclegan_fast.inference.demo.markup import comparison, message
from cyclegan_fast.inference.demo.server import _names_this_machine, bound_socket, is_loopback
from cyclegan_fast.inference.demo.workbench import Workbench, directions
from cyclegan_fast.inference.files import translate_files
from cyclegan_fast.inference.translate import Translator


def bench_in(folder: Path, model: Translator | None = None, limits: Limits | None = None) -> Workbench:
    folder.mkdir()
    return Workbench(model or translator(), folder, limits or Limits(1_000_000, 1.0))


def upload(bench: Workbench, name: str = "a b.jpg", width: int = 20, height: int = 12) -> Path:
    return picture(bench.uploads / "0f" / name, width, height)


@pytest.mark.parametrize("name", ["a b.jpg", "c.png", "d.tif"])
def test_the_download_is_the_file_that_translate_writes(tmp_path: Path, name: str) -> None:
    bench = bench_in(tmp_path / "own")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera works"
    source = bench.uploads / name
    Image.fromarray(noise(12, 20)).save(source, exif=exif)
    steps: list[float] = []
    translated = bench.translate(source, "BtoA", lambda share, _: steps.append(share))
    want = translate_files(translator(), [source], tmp_path / "w", direction="BtoA", suffix="_BtoA", progress=False)
    path, download = bench.file(translated.token, "result") or (Path(), "")
    assert download == want.done[0].name == f"{Path(name).stem}_BtoA{Path(name).suffix}"
    assert path.read_bytes() == want.done[0].read_bytes()
    with Image.open(path) as result:
        assert result.getexif()[0x010F] == "Camera works"
    assert steps == sorted(steps)
    assert steps
    for which in ("before", "after"):
        shown, _ = bench.file(translated.token, which) or (Path(), "")
        with Image.open(shown) as view:
            assert view.size == (translated.width, translated.height)
            assert view.format in ("JPEG", "PNG")


def test_what_is_too_large_is_refused_with_the_limit(tmp_path: Path) -> None:
    bench = bench_in(tmp_path / "own", limits=Limits(1000, 0.001))
    wide = upload(bench, "wide.jpg")
    Image.new("RGB", (50, 40)).save(wide, quality=1)
    with pytest.raises(InputError, match=r"wide.jpg: 50 × 40 pixels are 0.002 megapixels; .* up to 0.001"):
        bench.translate(wide, "AtoB")
    with pytest.raises(InputError, match=r"big.jpg: the file has 0.0 MB; this page takes up to 0.001"):
        bench.translate(upload(bench, "big.jpg", 60, 60), "AtoB")


def test_a_broken_file_is_a_message_without_a_path(tmp_path: Path) -> None:
    bench = bench_in(tmp_path / "own")
    whole = upload(bench, width=200, height=200)
    whole.write_bytes(whole.read_bytes()[:3000])
    text = bench.uploads / "text.jpg"
    text.write_text("no picture")
    for source in (whole, text):
        with pytest.raises(InputError) as raised:
            bench.translate(source, "AtoB")
        assert str(raised.value).startswith(f"{source.name}: ")
        assert str(tmp_path) not in str(raised.value)
    assert not list((tmp_path / "own" / "results").iterdir())


def test_no_memory_no_number_and_a_full_disk_are_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_in(tmp_path / "own")
    source = upload(bench)
    cases = [(MemoryError(), "not enough memory"), (OSError(28, "No space left", str(source)), "No space left")]
    for error, words in cases:

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(module, "translate_files", fail)
            with pytest.raises(InputError, match=words) as raised:
                bench.translate(source, "AtoB")
        assert str(tmp_path) not in str(raised.value)
    model = translator()
    with torch.no_grad():
        next(model.G_A.parameters()).fill_(float("nan"))
    broken = bench_in(tmp_path / "other", model)
    with pytest.raises(InputError, match="not finite"):
        broken.translate(upload(broken), "AtoB")


def test_files_come_from_the_page_and_go_with_it(tmp_path: Path) -> None:
    bench = bench_in(tmp_path / "own")
    outside = picture(tmp_path / "own.jpg")
    link = bench.uploads / "link.jpg"
    link.symlink_to(outside)
    for path in (outside, link, bench.uploads / ".." / ".." / "own.jpg"):
        with pytest.raises(InputError, match="not uploaded"):
            bench.translate(path, "AtoB")
    with pytest.raises(InputError, match=r"gone\.jpg is no longer here"):
        bench.translate(bench.uploads / "gone.jpg", "AtoB")
    tokens = [bench.translate(upload(bench), "AtoB").token for _ in range(module._KEPT + 2)]
    assert [bench.file(token, "result") is not None for token in tokens] == [False] * 2 + [True] * module._KEPT
    assert len(list((tmp_path / "own" / "results").iterdir())) == module._KEPT
    assert bench.file(tokens[-1], "../result") is None
    assert bench.file("..", "result") is None
    bench.close()
    with pytest.raises(InputError, match="closed"):
        bench.translate(upload(bench), "AtoB")


def test_one_direction_is_offered_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = translator()
    assert directions(model) == ["AtoB", "BtoA"]
    channels = model.channels

    def only_back(direction: str) -> tuple[int, int]:
        if direction == "AtoB":
            raise InputError("no G_A")
        return channels(direction)

    monkeypatch.setattr(model, "channels", only_back)
    assert directions(model) == ["BtoA"]


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    bench = bench_in(tmp_path / "own")
    translated = bench.translate(upload(bench, '<b onclick="x">&.jpg'), "AtoB")
    assert "<b " not in comparison(translated)
    assert '"x"' not in comparison(translated)
    assert message("<script>") == '<div class="cf-message" role="alert">&lt;script&gt;</div>'


def test_limits_are_read_and_checked() -> None:
    assert checked_limits("50MB", 100) == Limits(50_000_000, 100)
    assert checked_limits("1.5 kb", 0.5).upload == 1500
    for size, megapixels in (
        ("50", 1.0),
        ("0MB", 1.0),
        ("-1MB", 1.0),
        ("1MB", 0.0),
        ("1MB", float("nan")),
        ("1MB", 1e6),
    ):
        with pytest.raises(InputError, match="--max-"):
            checked_limits(size, megapixels)


def test_only_local_names_are_answered() -> None:
    for host, local in (("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)):  # noqa: S104
        assert is_loopback(host) is local
    for header, local in (
        ("127.0.0.1:7860", True),
        ("[::1]:1", True),
        ("evil.example:7860", False),
        ("", False),
        ("[", False),
    ):
        assert _names_this_machine({"headers": [(b"host", header.encode())]}) is local


def test_the_command_refuses_before_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run")
    assert cli.main(["demo", str(run), "--max-upload", "many"]) == 2
    assert "--max-upload 'many'" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="--port"):
        bound_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="--port 70000"):
        bound_socket("127.0.0.1", 70000)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored afterwards
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", str(run)]) == 2
    assert 'pip install "cyclegan_fast[demo]"' in capsys.readouterr().err
