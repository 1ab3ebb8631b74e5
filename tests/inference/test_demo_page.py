"""The demo page in headless Chromium, served by the command itself: mouse, keyboard, errors, and what it leaves."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_models import noise, picture, save_run, translator

from cyclegan_fast.inference.files import translate_files

# Only looked for: importing it would make the warnings of what it imports errors here.
if importlib.util.find_spec("gradio") is None:
    pytest.skip('the page needs pip install "cyclegan_fast[demo]": make demo-page-test', allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is missing; make demo-page-test")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

WIDTH, HEIGHT = 1600, 900
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run"]


class Served:
    """The command under way, in a home and a temporary folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary = folder / "home", folder / "tmp"
        for path in (self.home, self.temporary):
            path.mkdir()
        run = save_run(folder / "run")
        limits = ["--max-upload", "2MB", "--max-megapixels", "2"]
        paths = {"HOME": str(self.home), "TMPDIR": str(self.temporary), "CYCLEGAN_FAST_CACHE": str(folder / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cyclegan_fast", "demo", str(run), "--port", "0", "--device", "cpu", *limits],
            env={**os.environ, **paths, "OMP_NUM_THREADS": "1"},
            cwd=self.home,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = re.match(r"(http://127\.0\.0\.1:\d+/)", line)[1]  # type: ignore[index]

    def end(self, signum: int) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        status = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def page(served: Served, browser: Any) -> Iterator[Any]:
    """The page, opened; afterwards nothing has gone wrong in its console, and nothing was asked of another host."""
    troubles: list[str] = []
    elsewhere: list[str] = []
    opened = browser.new_page(viewport={"width": 1000, "height": 800})
    opened.set_default_timeout(20_000)
    opened.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    local = (served.url, "data:", "blob:")
    opened.on("request", lambda request: None if request.url.startswith(local) else elsewhere.append(request.url))
    opened.goto(served.url)
    opened.wait_for_selector("input[type=file]", state="attached")
    yield opened
    opened.close()
    assert troubles == []
    assert elsewhere == []


def drop(page: Any, path: Path) -> None:
    page.wait_for_selector("input[type=file]", state="attached")
    page.set_input_files("input[type=file]", path)


def compared(page: Any, name: str, direction: str = "A → B") -> None:
    page.wait_for_selector(f".cf-caption:has-text('{name}'):has-text('{direction}')")
    page.wait_for_function("[...document.querySelectorAll('.cf-stage img')].every(i => i.complete && i.naturalWidth)")


def split(page: Any) -> float:
    """Width of what shows of the picture before, as a share of the picture's, by the clip that is in effect."""
    return float(
        page.evaluate("""() => {
        const image = document.querySelector(".cf-before");
        const probe = document.createElement("div");
        probe.style.cssText = "position:absolute;height:0;width:var(--split)";
        image.parentElement.append(probe);
        const share = probe.getBoundingClientRect().width / image.getBoundingClientRect().width;
        probe.remove();
        return getComputedStyle(image).clipPath.startsWith("inset(0px calc(100% - ") ? share : NaN;
    }""")
    )


def photograph(folder: Path) -> Path:
    path = folder / "flower.jpg"
    Image.fromarray(noise(HEIGHT // 20, WIDTH // 20)).resize((WIDTH, HEIGHT)).save(path)
    return path


def test_before_and_after_by_mouse_and_keyboard(page: Any, tmp_path: Path) -> None:
    source = photograph(tmp_path)
    drop(page, source)
    compared(page, "flower.jpg")
    sizes = page.evaluate("[...document.querySelectorAll('.cf-stage img')].map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes == [[WIDTH, HEIGHT]] * 2
    assert split(page) == pytest.approx(0.5, abs=0.01)

    box = page.locator(".cf-stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 120, steps=4)
    page.mouse.up()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 120)  # the button is up: nothing follows
    assert split(page) == pytest.approx(0.25, abs=0.01)

    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.cf-range')"):
            break
    page.keyboard.press("End")
    assert split(page) == pytest.approx(1, abs=0.001)
    page.keyboard.press("ArrowLeft")
    assert split(page) == pytest.approx(0.99, abs=0.001)
    assert page.get_attribute(".cf-range", "aria-valuetext") == "99 % before"

    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the zoom
    assert page.locator(".cf-stage").bounding_box()["width"] == WIDTH
    assert page.evaluate("document.querySelector('.cf-view').scrollWidth") == WIDTH
    with page.expect_download() as download:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    want = translate_files(translator(), [source], tmp_path / "want", suffix="_AtoB", progress=False).done[0]
    assert download.value.suggested_filename == "flower_AtoB.jpg"
    assert Path(download.value.path()).read_bytes() == want.read_bytes()


def test_the_other_direction_and_the_next_photograph(page: Any, tmp_path: Path) -> None:
    drop(page, picture(tmp_path / "one.png", 40, 30))
    compared(page, "one.png")
    page.get_by_label("B → A").check()
    compared(page, "one.png", "B → A")
    drop(page, picture(tmp_path / "two.png", 40, 30))
    compared(page, "two.png", "B → A")
    page.set_viewport_size({"width": 390, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_cannot_be_translated_is_said(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photograph(tmp_path).read_bytes()[:20_000])
    drop(page, broken)
    page.wait_for_selector(".cf-message:has-text('broken.jpg: ')")
    wide = tmp_path / "wide.png"
    Image.new("L", (2000, 1100)).save(wide)
    drop(page, wide)
    page.wait_for_selector(".cf-message:has-text('2000 × 1100 pixels are 2.2 megapixels; this page takes up to 2 ')")
    assert "/" not in page.inner_text(".cf-message")
    heavy = tmp_path / "heavy.jpg"
    heavy.write_bytes(bytes(2_000_001))
    drop(page, heavy)
    page.wait_for_selector("text=/exceed the maximum allowed size/")
    drop(page, picture(tmp_path / "good.png", 40, 30))  # and it goes on
    compared(page, "good.png")


def test_nothing_is_left_when_it_ends(served: Served, page: Any, tmp_path: Path) -> None:
    drop(page, picture(tmp_path / "last.png", 40, 30))
    compared(page, "last.png")
    page.goto("about:blank")
    outside = tmp_path / "last.png"
    for path, status in ((f"gradio_api/file={outside}", 403), ("picture/unknown/result", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(served.url + path, timeout=20)
        assert refused.value.code == status
        refused.value.close()
    assert list(served.temporary.rglob("last_AtoB.png"))
    assert served.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert [path.name for path in served.temporary.iterdir() if "cyclegan" in path.name] == []
    assert not [path for path in served.home.rglob("*") if path.suffix in (".png", ".jpg")]
