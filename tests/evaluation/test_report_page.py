"""The report in headless Chromium: sliders by mouse, keyboard and touch, on every screen, and nothing asked for."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from report_runs import data_set, make_run, measured, picture

from cyclegan_fast.evaluation.report.page import write_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser's driver is missing: pip install playwright"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run"]
LARGE = (900, 600)
Open = Callable[..., contextlib.AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    data_set(folder / "data")
    run = measured(make_run(folder, milestones=(1,)))
    own = [picture(folder / "large.png", LARGE), picture(folder / ("long_name_" * 12 + "é漢.png"), (60, 40))]
    return write_report(run, pictures=own, number=1, device="cpu", precision="fp32").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, address: str) -> Open:
    @contextlib.contextmanager
    def opening(**context: Any) -> Iterator[Any]:
        """The report; afterwards its console was silent, and nothing was asked for beside the file."""
        troubles: list[str] = []
        asked: list[str] = []
        still = {"viewport": {"width": 1000, "height": 800}, "reduced_motion": "reduce"}  # places are where they are
        with contextlib.closing(browser.new_context(**{**still, **context})) as own:
            page = own.new_page()
            page.set_default_timeout(20_000)
            page.on("console", lambda line: troubles.append(line.text))
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            yield page
        assert troubles == []
        assert [url for url in asked if not url.startswith("data:")] == [address]

    return opening


def split(page: Any) -> float:
    """Share of the first comparison that shows the picture before, by the clip that is in effect."""
    return float(
        page.evaluate("""() => {
        const image = document.querySelector(".cf-before");
        const line = document.querySelector(".cf-line").getBoundingClientRect();
        const box = image.getBoundingClientRect();
        const clipped = getComputedStyle(image).clipPath.startsWith("inset(0px calc(100% - ");
        return clipped ? ((line.left + line.right) / 2 - box.left) / box.width : NaN;
    }""")
    )


def drag(page: Any, share: float, *, touch: bool = False) -> None:
    """From the middle of the first picture to a share of its width, by the mouse or a finger."""
    page.locator(".cf-stage").first.scroll_into_view_if_needed()
    box = page.locator(".cf-stage").first.bounding_box()
    y = box["y"] + box["height"] / 3
    start, stop = box["x"] + box["width"] / 2, box["x"] + share * box["width"]
    if not touch:
        page.mouse.move(start, y)
        page.mouse.down()
        page.mouse.move(stop, y, steps=4)
        page.mouse.up()
        page.mouse.move(start, y)  # the button is up: nothing follows
        return
    finger = page.context.new_cdp_session(page)
    finger.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": start, "y": y}]})
    for part in (0.2, 0.4, 0.6, 0.8, 1.0):
        points = [{"x": start + part * (stop - start), "y": y}]
        finger.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": points})
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_sliders_by_mouse_and_keyboard(opened: Open) -> None:
    with opened() as page:
        shown = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth * i.naturalHeight > 0)")
        assert len(shown) > 20
        assert all(shown)
        assert split(page) == pytest.approx(0.5, abs=0.01)
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('.cf-range')"):
                break
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("End")
        assert split(page) == pytest.approx(1, abs=0.001)
        page.keyboard.press("ArrowLeft")
        assert split(page) == pytest.approx(0.99, abs=0.001)
        assert page.get_attribute(".cf-range", "aria-valuetext") == "99 % before"
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the zoom
        assert page.locator(".cf-stage").first.bounding_box()["width"] == LARGE[0]
        page.keyboard.press("Enter")
        drag(page, 0.25)
        assert split(page) == pytest.approx(0.25, abs=0.01)


def test_on_a_phone_by_touch(opened: Open) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with opened(**phone, color_scheme="dark") as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        drag(page, 0.75, touch=True)
        assert split(page) == pytest.approx(0.75, abs=0.01)
        for summary in page.locator("summary").all():
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_values_of_a_curve(opened: Open) -> None:
    with opened() as page:
        plot = page.locator(".plot").first
        last = page.locator(".keys output").nth(1).inner_text()
        plot.focus()
        page.keyboard.press("Home")
        assert plot.get_attribute("aria-valuenow") == "0"
        assert plot.get_attribute("aria-valuetext").startswith("epoch 0.1: G_A")
        assert page.locator(".at").first.inner_text() == "epoch 0.1"
        assert page.locator(".keys output").nth(1).inner_text() != last
        plot.blur()
        assert page.locator(".keys output").nth(1).inner_text() == last
        box = plot.locator(":scope > svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        assert page.locator(".at").first.inner_text() == "epoch 1.5"


# Ratio of the luminances of a text and what lies behind it, as WCAG 2.2 has it.
CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels(colour).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0.6) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...document.querySelectorAll("body *")].filter((element) =>
    element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return texts.map((element) => {
    const style = getComputedStyle(element);
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [high, low] = [light(ink), light(behind(element))].sort((one, other) => other - one);
    return [(high + 0.05) / (low + 0.05), `${element.tagName} ${element.textContent.slice(0, 40)}`];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(opened: Open, scheme: str) -> None:
    with opened(color_scheme=scheme) as page:
        found = page.evaluate(CONTRAST)
        assert len(found) > 150
        assert [words for ratio, words in found if ratio < 4.5] == []
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (min(map(int, paper[4:-1].split(","))) > 200) == (scheme == "light")


def test_without_scripts_and_on_paper_both_pictures_show(opened: Open) -> None:
    def apart(page: Any) -> bool:
        before, after = (page.locator(f".cf-{name}").first.bounding_box() for name in ("before", "after"))
        assert before["height"] == pytest.approx(after["height"], abs=1)
        return bool(before["x"] + before["width"] <= after["x"] + 1)

    with opened(java_script_enabled=False) as page:
        assert apart(page)
        assert not page.locator(".cf-range").first.is_visible()
    with opened() as page:
        assert not apart(page)
        page.emulate_media(media="print")
        assert apart(page)
        assert not page.locator("nav").is_visible()


def test_what_is_not_in_the_page_is_refused(opened: Open, browser: Any, address: str) -> None:
    """The policy works: a picture from elsewhere, a script and a style that were not there are not let in."""
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda line: refused.append(line.text))
    page.goto(address)
    page.evaluate("""() => {
        const add = (tag, set) => document.body.append(Object.assign(document.createElement(tag), set));
        add("img", { src: "http://localhost:9/picture" });
        add("script", { textContent: "document.title = 'changed'" });
        add("style", { textContent: "body { display: none }" });
        return fetch("http://localhost:9/").catch(() => null);
    }""")
    assert page.title() == "run: report"
    assert page.locator("h1").is_visible()
    assert sum("Content Security Policy" in line for line in refused) >= 4
    page.close()
