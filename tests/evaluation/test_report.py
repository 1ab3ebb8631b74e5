"""The report as a file: what stands in it, of what kinds of runs, and that nothing from outside becomes markup."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from report_runs import NAMES, data_set, evaluation, make_run, measure, measured, picture, save, settings

from cyclegan_fast.cli import main
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.report import pictures as module
from cyclegan_fast.evaluation.report import sections
from cyclegan_fast.evaluation.report.chart import Chart, Line, chart_html, ticks
from cyclegan_fast.evaluation.report.page import write_report
from cyclegan_fast.evaluation.report.pictures import Gallery, Shot, fit, ranking
from cyclegan_fast.evaluation.report.run import Checkpoint, Measure, Reading, Run, columns, read_evaluation, read_run
from cyclegan_fast.inference.translate import load
from cyclegan_fast.training.checkpoint import CheckpointError, milestone_path, step_path

VOID = {"meta", "link", "img", "input", "br", "line", "circle", "path", "wbr"}


class Page(HTMLParser):
    """The page's elements, with the text of each section; nesting is checked on the way."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {"": ""}
        self._open: list[str] = []
        self._ids: list[str] = [""]
        self.feed(self.raw)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            if tag == "section":
                self._ids.append(dict(attrs).get("id", self._ids[-1]))
                self.sections.setdefault(self._ids[-1], "")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open
        assert self._open.pop() == tag
        if tag == "section":
            self._ids.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self._open):
            self.sections[self._ids[-1]] += data + " "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self) -> dict[str, Image.Image]:
        """Each picture by its alternative text; of those that have the same, in both directions, the first."""
        found: dict[str, Image.Image] = {}
        for image in self.all("img"):
            content = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))
            found.setdefault(image["alt"], Image.open(io.BytesIO(content)))
        return found


def report(run: Path, **options: Any) -> Page:
    return Page(write_report(run, **{"device": "cpu", "precision": "fp32", "evaluate": False, **options}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    data_set(folder / "data")
    return measured(make_run(folder))


def test_a_whole_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(whole), "--number", "2", "--device", "cpu"]) == 0
    out = whole / "report.html"
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size / 1e6:.1f} MB\n"
    page = Page(out)
    wanted = ["sliders", "progress", "cycle", "measures", "cases", "curves", "timing", "settings", "provenance"]
    assert [name for name in page.sections if name] == wanted
    assert [link["href"] for link in page.all("a")] == ["#main", *(f"#{name}" for name in wanted)]
    assert "30 steps" in page.sections[""]
    assert "finished" in page.sections[""]
    assert "6.00 s" in page.sections["timing"] or "6 s" in page.sections["timing"]  # 30 pairs at 5 a second
    assert "step-00000030.ckpt, step 30" in page.sections["provenance"]
    for word in ("PSNR", "20.00", "19.50 to 20.50", "better than untouched", "FID", "no weights", "6 of A and 6 of B"):
        assert word in page.sections["measures"]
    for word in ("Input", "After epoch 1", "After epoch 2", "Now, epoch 3", "Truth"):
        assert word in page.sections["progress"]


def test_the_pictures_are_what_they_are_called(whole: Path) -> None:
    found = report(whole, number=2, quality=100).pictures()
    model = load(whole, device="cpu", precision="fp32")
    source = whole.parent / "data" / "testA" / "five.jpg"
    before = Image.open(source)
    made, back = model.cycle(before, "AtoB")
    truth = Image.open(whole.parent / "data" / "truthB" / "five.jpg")
    early = load(whole, which="epoch-1", device="cpu", precision="fp32").translate(before, "AtoB")
    wanted = {"before": before, "after": made, "back": back, "truth": truth, "After epoch 1": early}
    for text, image in wanted.items():
        shown = found[f"five.jpg, {text}"]
        assert shown.size == (40, 30)
        difference = np.abs(np.asarray(shown, dtype=float) - np.asarray(image, dtype=float)).mean()
        assert difference < 2  # of 255: what JPEG loses by rounding
    assert np.abs(np.asarray(early, dtype=float) - np.asarray(made, dtype=float)).mean() > 8


def test_nothing_leads_outside(whole: Path) -> None:
    page = report(whole, number=1)
    for attributes in (attributes for _, attributes in page.elements):
        for name in ("src", "href", "action", "srcset", "data", "poster", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert not re.search(r"@import|url\(", page.raw)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_every_picture_and_control_has_words(whole: Path) -> None:
    page = report(whole, number=1)
    assert all(image["alt"] for image in page.all("img"))
    assert all(control.get("aria-label") for control in page.all("input"))
    assert all(
        drawing.get("aria-label") or drawing.get("aria-hidden") or "viewbox" in drawing for drawing in page.all("svg")
    )
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_worst_and_the_best(whole: Path) -> None:
    cases = report(whole, number=1).sections["cases"]
    worst, best = cases.split("Best")[0], cases.split("Best")[1]
    places = [worst.index(name) for name in ("one.jpg", "two.jpg", "three.jpg")]
    assert places == sorted(places)
    places = [best.index(name) for name in ("six.jpg", "five.jpg", "four.jpg")]
    assert places == sorted(places)
    assert "10.00 dB" in worst
    assert "15.00 dB" in best


def test_what_was_invented_is_orange(tmp_path: Path) -> None:
    """A patch that both generators keep; the rest is as it was."""
    data_set(tmp_path / "data")
    run = read_run(make_run(tmp_path, milestones=()))
    image = Image.open(tmp_path / "data" / "testA" / "one.jpg").resize((96, 64), Image.Resampling.BICUBIC)

    def paint(x: torch.Tensor, direction: str) -> torch.Tensor:
        y = x.clone()
        if direction == "AtoB":
            y[:, :, 16:48, 8:40] = torch.tensor([-1.0, 1.0, -1.0])[:, None, None]
        return y

    work = module._Work(run, SimpleNamespace(translate=paint), None, None, "cpu", "fp32")  # type: ignore[arg-type]
    shown = np.asarray(module._invented(work, "AtoB", image), dtype=float)
    orange = shown[:, :, 0] - shown[:, :, 2]
    assert orange[20:44, 12:36].mean() > 100
    assert orange[:, 60:].mean() < 5


def test_gray_to_colour_has_no_such_map(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path, model={"channels_A": 1}, loss={"identity": 0}, milestones=())
    page = report(measured(run), number=1)
    assert "Truth" in page.sections["cases"]
    assert "Invented" not in page.sections["cases"]
    assert page.pictures()["one.jpg, input"].size == (40, 30)


def test_better_and_worse_by_the_difference_picture_by_picture() -> None:
    def verdict(better: int, *difference: float) -> str:
        now, was = Reading(20, 18, 22), Reading(19, 17, 21)  # which overlap
        known = Reading(*difference) if difference else None
        return sections._verdict(Measure("x", "X", "truth", "", better, now, was, None, known, ""))

    assert "no clear difference" in verdict(1)
    assert "better than untouched" in verdict(1, 1.0, 0.5, 1.5)
    assert "worse than untouched" in verdict(-1, 1.0, 0.5, 1.5)
    assert "better than untouched" in verdict(-1, -1.0, -1.5, -0.5)
    assert "no clear difference" in verdict(1, 0.1, -0.5, 0.7)
    assert verdict(0, 1.0, 0.5, 1.5) == ""


def test_what_cases_are_ranked_by(tmp_path: Path) -> None:
    def ranked(**metrics: dict[str, Any]) -> str | None:
        pictures = [{"name": "a.jpg", **dict.fromkeys(metrics, 1.0)}]
        tree = evaluation(directions={"AtoB": {"metrics": metrics, "pictures": pictures}})
        (tmp_path / "evaluation.json").write_text(json.dumps(tree))
        found = ranking(read_evaluation(tmp_path / "evaluation.json"), "AtoB")
        return found.name if found else None

    cycle, strange = measure(1, group="cycle"), measure(1, group="artefact", better=-1)
    assert ranked(cycle_l1=cycle, ssim=measure(1), psnr=measure(1)) == "psnr"
    assert ranked(cycle_l1=cycle, hallucination=strange, ssim=measure(1)) == "ssim"
    assert ranked(cycle_l1=cycle, hallucination=strange) == "hallucination"
    assert ranked(noise=measure(1, group="photograph", better=0), cycle_l1=cycle) == "cycle_l1"
    assert ranked(noise=measure(1, group="photograph", better=0)) is None


def test_lower_is_better_turns_the_order(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path, milestones=())
    tree = evaluation()
    tree["directions"] = {
        "AtoB": {
            "metrics": {"lpips": measure(1, better=-1)},
            "pictures": [{"name": n, "lpips": i} for i, n in enumerate(NAMES)],
        }
    }
    (run / "evaluation.json").write_text(json.dumps(tree))
    cases = report(run, number=1).sections["cases"]
    assert cases.index("six.jpg") < cases.index("Best") < cases.index("one.jpg")


def test_measures_that_are_missing_or_old_are_said_to_be(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path, milestones=())
    assert "has not been measured" in report(run, number=0).sections["measures"]
    page = report(measured(run, step=20), number=1)
    assert "measures are of step 20; the pictures on this page are of step 30" in page.sections["measures"]
    assert "cases" in page.sections
    for content, words in (
        ("{", "is not the JSON of an evaluation"),
        ("[]", "is not an evaluation of format 1"),
        ('{"format": 1}', "is not a whole evaluation"),
        (json.dumps({**evaluation(), "directions": {"AtoB": {"metrics": {"x": 1}, "pictures": []}}}), "not a whole"),
        ("[" * 100_000, "is not the JSON of an evaluation"),
    ):
        (run / "evaluation.json").write_text(content)
        page = report(run, number=0)
        assert words in page.sections[""]
        assert "has not been measured" in page.sections["measures"]


def test_a_run_is_measured_unless_it_was(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path, milestones=())
    page = report(run, number=0, evaluate=None)
    found = read_evaluation(run / "evaluation.json")
    assert found.step == 30
    value = next(each.reading.value for each in found.measures["AtoB"] if each.name == "psnr")
    assert f"{value:.4g}" in page.sections["measures"]
    assert re.search("(better|worse) than untouched", page.sections["measures"])
    measured(run, step=20)
    before = (run / "evaluation.json").read_bytes()
    assert "measures are of step 20" in report(run, number=0, evaluate=None).sections["measures"]
    assert (run / "evaluation.json").read_bytes() == before
    assert "are of step" not in report(run, number=0, evaluate=True).sections["measures"]
    assert read_evaluation(run / "evaluation.json").step == 30


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "testA" / "one.jpg")
    picture(tmp_path / "data" / "testB" / "one.jpg")
    run = make_run(tmp_path, milestones=())
    page = report(run, number=0, evaluate=None)
    assert "Not measured" in page.sections[""]
    assert "too few to measure" in page.sections[""]
    with pytest.raises(InputError, match="too few to measure"):
        report(run, number=0, evaluate=True)


def test_measured_pictures_that_are_not_here(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path, milestones=())
    secret = picture(tmp_path / "secret.jpg")
    names = [str(secret), "../../secret.jpg", "../testB/one.jpg"]
    pictures = [{"name": name, "psnr": 1.0} for name in names]
    directions = {"AtoB": {"metrics": {"psnr": measure(1.0)}, "pictures": pictures}}
    page = report(measured(run, directions=directions), number=1)
    assert "cases" not in page.sections
    assert "measured pictures of A are not in this data set" in page.sections[""]
    assert not [text for text in page.pictures() if "secret" in text]


HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\u202e"


def test_text_from_outside_is_only_text(tmp_path: Path) -> None:
    name = "\"><img src=x onerror=alert(1)>é漢字 '&.jpg"
    for split in ("testA", "testB"):
        picture(tmp_path / "data" / split / name)
        picture(tmp_path / "data" / split / ("very_long_" * 20 + ".jpg"))
    run = make_run(tmp_path, milestones=())
    text = (run / "config.yaml").read_text().replace("name: run", "name: '<b>\"&'")
    (run / "config.yaml").write_text(text.replace("cache: null", f"cache: {json.dumps(HOSTILE)}"))
    tree = evaluation(missing=[{"metric": "x", "title": HOSTILE, "why": HOSTILE}])
    metric = measure(20.0, title=HOSTILE, unit=HOSTILE, note=HOSTILE, group=HOSTILE)
    psnr = measure(1.0, title=HOSTILE, unit=HOSTILE)
    tree["directions"] = {
        "AtoB": {"metrics": {HOSTILE: metric, "psnr": psnr}, "pictures": [{"name": name, "psnr": 1.0}]}
    }
    tree["provenance"] = dict.fromkeys(("version", "torch", "device", "precision", "checkpoint", "time"), HOSTILE)
    (run / "evaluation.json").write_text(json.dumps(tree))
    with (run / "scalars.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "epoch": 3.0, f"test_{HOSTILE}": 1.0, "G_A": "text", "lr": HOSTILE}) + "\n")
    page = report(run)
    assert len(page.all("script")) == 2
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not [tag for tag, attributes in page.elements if "onerror" in attributes]
    assert "<script>alert(1)</script>" in page.sections["measures"]  # as text, unescaped by the parser
    assert "\x1b" not in page.raw
    assert "\u202e" not in page.raw
    assert f"{name}, input" in page.pictures()


def test_pix2pix_has_one_direction(tmp_path: Path) -> None:
    data_set(tmp_path / "data", ("testA", "testB"))
    run = make_run(tmp_path, model={"method": "pix2pix"}, data={"pairing": "aligned"}, milestones=(1,))
    page = report(run, number=1)
    assert "cycle" not in page.sections
    assert "A → B" in page.sections["progress"]
    assert "B → A" not in page.sections["progress"]
    assert "Truth" in page.sections["progress"]
    assert "pix2pix" in page.sections[""]


def test_the_halves_of_side_by_side_pictures(tmp_path: Path) -> None:
    sides = [Image.new("RGB", (40, 30), colour) for colour in ((200, 30, 30), (30, 30, 200))]
    pair = Image.new("RGB", (80, 30))
    for index, side in enumerate(sides):
        pair.paste(side, (40 * index, 0))
    (tmp_path / "data" / "test").mkdir(parents=True)
    pair.save(tmp_path / "data" / "test" / "pair.png")
    aligned = {"pairing": "aligned", "source": "side_by_side"}
    run = make_run(tmp_path, model={"method": "pix2pix", "direction": "BtoA"}, data=aligned, milestones=())
    found = report(run).pictures()
    assert found["pair.png, before"].size == (40, 30)
    for text, colour in (("before", (30, 30, 200)), ("truth", (200, 30, 30))):
        assert np.abs(np.asarray(found[f"pair.png, {text}"], dtype=int) - colour).max() < 6


def test_augmented_shows_several_translations(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path, model={"method": "augmented", "latent": 2}, milestones=())
    page = report(run, number=1)
    assert "cycle" not in page.sections
    assert "Code 3" in page.sections["styles"]
    shown = page.pictures()
    one, other = (np.asarray(shown[f"five.jpg, code {code}"], dtype=float) for code in (0, 1))
    assert np.abs(one - other).mean() > 1


def test_without_test_pictures(tmp_path: Path) -> None:
    data_set(tmp_path / "data", ("trainA", "trainB", "truthB"))
    page = report(make_run(tmp_path), number=1)
    assert "pictures that the networks were trained on" in page.sections[""]
    assert "Truth" not in page.sections["progress"]  # which is that of test pictures


def test_without_data_the_samples_of_the_training_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=20)
    for step in (5, 10, 15, 20):
        picture(run / "samples" / f"A-to-B-step-{step:08d}.jpg", (300, 200))
    page = report(run)
    assert "data set of the run's settings is not here" in page.sections[""]
    assert "not finished" in page.sections[""]
    assert list(page.pictures()) == [f"Samples of the training, A → B, step {n}" for n in (5, 15, 20)]
    with pytest.raises(InputError, match="no pictures of a data set"):
        report(run, data=tmp_path / "nowhere")
    data_set(tmp_path / "moved")
    assert "sliders" in report(run, data=tmp_path / "moved", number=1).sections


def test_a_run_before_its_first_checkpoint(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path, steps=0, milestones=())
    (run / "scalars.jsonl").unlink()
    page = report(run)
    assert "cannot read the scalars" in page.sections[""]
    assert "none yet" in page.sections["provenance"]
    assert page.pictures() == {}


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path)
    save(run, settings(tmp_path), step_path(run, 40), 40)
    for path in (step_path(run, 40), milestone_path(run, 1)):
        path.write_bytes(path.read_bytes()[:-1000])
    page = report(run, number=1)
    assert "step-00000040.ckpt" in page.sections[""]
    assert "epoch-0001.ckpt" in page.sections[""]
    assert "Now, epoch 3" in page.sections["progress"]
    assert "After epoch 1" not in page.sections["progress"]


def test_which_checkpoint(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path)
    page = report(run, which="epoch-2", number=1)
    assert "epoch-0002.ckpt, step 20" in page.sections["provenance"]
    assert "epoch 3" not in page.sections["progress"]
    with pytest.raises(CheckpointError, match="no `best` checkpoint"):
        report(run, which="best")


def test_the_epochs_of_the_grid(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))

    def chosen(*epochs: int) -> list[float | None]:
        there = [Checkpoint(Path(f"epoch-{epoch:04d}.ckpt"), 10 * epoch, float(epoch)) for epoch in epochs]
        return [each.epoch for each in columns(Run(run.folder, run.config, run.records, there, run.chosen, None))][:-1]

    assert chosen() == []
    assert chosen(1, 2) == [1, 2]
    assert chosen(*range(1, 80)) == [1, 2, 10, 50]
    assert chosen(5, 10, 15, 20, 25, 30, 35) == [5, 10, 20, 35]


def test_pictures_of_ones_own(whole: Path, tmp_path: Path) -> None:
    large = picture(tmp_path / "mine.png", (300, 200))
    page = report(whole, pictures=[large], number=1, out=tmp_path / "out.html")
    assert page.pictures()["mine.png, after"].size == (300, 200)
    assert "300 × 200 pixels" in page.sections["sliders"]
    assert "five.jpg, before" not in page.pictures()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        report(whole, pictures=[broken], out=tmp_path / "out.html")


def test_the_page_stays_below_its_limit(whole: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "mine.png")
    options: dict[str, Any] = {"pictures": [tmp_path / "mine.png"], "number": 1, "out": tmp_path / "out.html"}
    free = len(report(whole, **options).raw.encode())
    limit = free - 60_000
    page = report(whole, **options, max_size=limit)
    assert limit * 0.5 < len(page.raw.encode()) <= limit
    before, after = (page.pictures()[f"mine.png, {text}"].size for text in ("before", "after"))
    assert before == after
    assert before[0] < 300
    assert f"shown at {before[0]} × {before[1]} of 300 × 200 pixels" in page.sections["sliders"]
    with pytest.raises(InputError, match="the pictures take"):
        report(whole, **options, max_size=60_000)
    with pytest.raises(InputError, match=r"number = 65 is not allowed: an integer from 0 to 64"):
        report(whole, number=65)


def test_only_the_heavy_pictures_are_shrunk() -> None:
    def shot(width: int) -> Shot:
        image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (width, width, 3), dtype=np.uint8))
        return Shot("x", module._jpeg(image, 88), image.size, image.size)

    gallery = Gallery(samples=[shot(70), shot(500), shot(400)])
    light = gallery.samples[0].content
    fit(gallery, 300_000)
    assert gallery.samples[0].content == light
    assert sum(each.weight for each in gallery.samples) <= 300_000
    assert min(each.size[0] for each in gallery.samples[1:]) > 150


def test_a_page_that_cannot_be_written(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the report"):
        report(whole, number=0, out=tmp_path / "file" / "out.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder: it has no config.yaml" in capsys.readouterr().err


# Curves


def test_gaps_stay_gaps_and_extremes_stay() -> None:
    values = np.sin(np.arange(5000) / 700)
    values[[1234, 4321]] = 9.0, -9.0
    values[3000:3010] = np.nan
    drawn = chart_html(Chart("Loss", np.arange(5000.0), [Line("one", values)]))
    raw = re.search(r'class="raw c0" d="([^"]+)"', drawn)
    assert raw
    assert raw[1].count("M") == 2
    assert raw[1].count("L") < 1000
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", raw[1])]
    assert min(heights) < 0  # the outliers leave the drawing, and do not stretch it
    assert max(heights) > 1000
    assert 'class="lost"' in drawn


def test_a_chart_says_its_values_in_words() -> None:
    chart = Chart("Loss <b>", np.array([1.0, 2.0]), [Line("<i>", np.array([0.5, np.inf]))], smooth=False)
    drawn = chart_html(chart)
    assert "<i>" not in drawn
    assert "Loss &lt;b&gt;" in drawn
    assert "<output>0.5</output>" in drawn  # the last that is finite
    assert '<tr><th scope="row">2</th><td>not finite</td></tr>' in drawn
    data = json.loads(re.search(r'data-chart="([^"]+)"', drawn)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert data["x"] == [1.0, 2.0]
    assert data["y"] == [[0.5, None]]


def test_records_with_losses_that_are_not_finite(tmp_path: Path) -> None:
    data_set(tmp_path / "data")
    run = make_run(tmp_path, milestones=())
    lines = (run / "scalars.jsonl").read_text().splitlines()
    lines[10] = lines[10].replace('"D_A": 0.25', '"D_A": null')
    lines[12] = lines[12].replace('"D_A": 0.25', '"D_A": NaN')
    (run / "scalars.jsonl").write_text("\n".join([*lines, '{"step": 31, "epo', "[]"]))
    page = report(run, number=0)
    assert page.sections["curves"].count("×") == 2


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 4.0, [0, 1, 2, 3, 4]),
        (0.0, 0.35, [0, 0.1, 0.2, 0.3]),
        (-3.0, 11.0, [0, 5, 10]),
        (1e-4, 2.1e-4, [1e-4, 1.5e-4, 2e-4]),
    ],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high, 4) == pytest.approx(wanted)


def test_one_record_is_drawn_too() -> None:
    drawn = chart_html(Chart("Loss", np.array([0.0]), [Line("one", np.array([0.0]))]))
    assert "<circle" in drawn
    assert "nan" not in drawn.lower()
