"""The page as a whole: one HTML file that asks nothing of any network, and says so to the browser.

Its Content-Security-Policy lets in pictures that lie in the page, and exactly this package's style sheets and scripts,
by their hashes: a name that got through the escaping would still be text, and nothing could be sent anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cyclegan_fast import comparison
from cyclegan_fast.atomic import replacing
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.evaluate import evaluate as measure
from cyclegan_fast.evaluation.report.pictures import Gallery, draw, fit
from cyclegan_fast.evaluation.report.run import EVALUATION, Run, read_evaluation, read_run
from cyclegan_fast.evaluation.report.sections import sections, summary, text
from cyclegan_fast.version import __version__

__all__ = ["render", "write_report"]

logger = logging.getLogger("cyclegan_fast.report")

_HERE = Path(__file__).parent
_WITHOUT_SCRIPT = """
.cf-bar, .cf-line, .with-script { display: none; }
.cf-view { overflow: visible; max-height: none; }
.cf-stage { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.cf-stage .cf-before { position: static; clip-path: none; order: -1; }
"""


def write_report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    which: str = "latest",
    data: str | Path | None = None,
    pictures: Sequence[str | Path] = (),
    number: int = 3,
    quality: int = 88,
    max_size: int = 15_000_000,
    evaluate: bool | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Path:
    """Write the report on a run, by default to `report.html` in its folder; returns where it lies.

    which: the checkpoint to report on, as in ``find_checkpoint``. data: the data set, by default that of the run's
    settings. pictures: files for the sliders, in place of test pictures. number: pictures a direction. quality: of
    JPEG. max_size: bytes that the page takes at most; pictures are shrunk until it does. evaluate: measure the
    checkpoint first, and keep that in the run folder as `cyclegan-fast evaluate` does; by default if nothing has been
    measured yet and there are test pictures, with True also if what was measured is another checkpoint.

    Raises InputError (CheckpointError, PhotoError) for a run, a checkpoint or a picture that cannot be used, for
    options that are not allowed, and where the page cannot be written or cannot be as small as wanted.
    """
    for name, value, low, high in (("number", number, 0, 64), ("quality", quality, 1, 100)):
        if not low <= value <= high:
            raise InputError(f"{name} = {value} is not allowed: an integer from {low} to {high}")
    content = read_run(run, which)
    out = content.folder / "report.html" if out is None else Path(out)
    root = None if data is None else Path(data)
    if evaluate is not False:
        content = _evaluated(content, root, device, precision, insist=evaluate is True)
    gallery = draw(
        content, root=root, pictures=pictures, number=number, quality=quality, device=device, precision=precision
    )
    page = render(content, gallery)
    if len(page) > max_size:
        weight = sum(shot.weight for shot in gallery.shots())
        fit(gallery, max_size - (len(page) - weight) - 4096)  # the words that say what was shrunk
        page = render(content, gallery)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            temporary.write_bytes(page)
    except OSError as error:
        raise InputError(f"cannot write the report {out}: {error.strerror or error}") from error
    return out


def _evaluated(run: Run, root: Path | None, device: str, precision: str, *, insist: bool) -> Run:
    """The run with measures of its chosen checkpoint; unless it has some already and nobody insists on these.

    With ``insist``, raises InputError where it cannot be measured; else the page says why.
    """
    out = run.folder / EVALUATION
    known = run.evaluation is not None and run.chosen is not None and run.evaluation.step == run.chosen.step
    here = (Path(run.config.data.root) if root is None else root).is_dir()
    if run.chosen is None or known or (not insist and (out.exists() or not here)):
        return run
    try:
        measure(run.chosen.path, root, device=device, precision=precision, progress=True).save(out)
    except InputError as error:
        if insist:
            raise
        return replace(run, troubles=[*run.troubles, f"Not measured: {error}"])
    logger.info("measured: %s", out)
    troubles = [trouble for trouble in run.troubles if EVALUATION not in trouble]  # a damaged one, now replaced
    return replace(run, evaluation=read_evaluation(out), troubles=troubles)


def render(run: Run, gallery: Gallery) -> bytes:
    """The page as UTF-8."""
    styles = [comparison.CSS.read_text(encoding="utf-8"), (_HERE / "report.css").read_text(encoding="utf-8")]
    scripts = [comparison.JS.read_text(encoding="utf-8"), (_HERE / "report.js").read_text(encoding="utf-8")]
    made = f"cyclegan_fast {__version__}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    parts = list(sections(run, gallery, made))
    links = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title, _ in parts)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{html.escape(title)}</h2>'
        f"{content}</section>"
        for name, title, content in parts
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy([*styles, _WITHOUT_SCRIPT], scripts)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="cyclegan_fast {__version__}">
<title>{text(run.config.name)}: report</title>
<link rel="icon" href="data:,">
{"".join(f"<style>{style}</style>" for style in styles)}
<noscript><style>{_WITHOUT_SCRIPT}</style></noscript>
</head>
<body>
<a class="skip" href="#main">To the report</a>
<header>{summary(run, gallery)}</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main">{body}</main>
<footer><p>Made by {text(made)}. Nothing on this page comes from a network.</p></footer>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""
    return page.encode("utf-8")


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    def hashes(texts: Sequence[str]) -> str:
        digests = (base64.b64encode(hashlib.sha256(each.encode("utf-8")).digest()).decode("ascii") for each in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; img-src data:; style-src {hashes(styles)}; script-src {hashes(scripts)}; "
        "base-uri 'none'; form-action 'none'"
    )
