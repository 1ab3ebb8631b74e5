"""The parts of the page that are not Gradio's: the comparison of two pictures, and messages. All text is escaped."""

from __future__ import annotations

import html
from pathlib import Path

from cyclegan_fast.inference.demo.limits import Limits
from cyclegan_fast.inference.demo.workbench import Translated

__all__ = ["COMPARE_CSS", "COMPARE_JS", "LABELS", "comparison", "introduction", "message"]

COMPARE_CSS = Path(__file__).with_name("compare.css")
COMPARE_JS = Path(__file__).with_name("compare.js")
LABELS = {"AtoB": "A → B", "BtoA": "B → A"}


def introduction(model: str, limits: Limits, *, local: bool) -> str:
    """What the page does, what it takes, and where photographs go."""
    where = "Photographs stay on this computer" if local else "Photographs go to the computer that serves this page"
    return (
        f"<h1>{html.escape(model)}</h1><p>Drop a photograph (JPEG, PNG, TIFF, WebP, HEIC, AVIF) of up to "
        f"{limits.upload / 1e6:g} MB and {limits.megapixels:g} megapixels. {where} and are removed when the "
        "program ends.</p>"
    )


def message(text: str) -> str:
    return f'<div class="cf-message" role="alert">{html.escape(text)}</div>'


def comparison(translated: Translated) -> str:
    """Two pictures on top of one another with a slider between them; compare.js moves it and zooms."""
    base = f"picture/{translated.token}"
    result = translated.files["result"]
    size = result.stat().st_size / 1e6
    name = html.escape(translated.name)
    image = '<img class="cf-{0}" src="{1}/{0}" alt="{2}, {0}" width="{3}" height="{4}" draggable="false">'
    doubt = f".<br>This photograph is {html.escape(translated.unfamiliar)}." if translated.unfamiliar else ""
    images = "".join(
        image.format(which, base, name, translated.width, translated.height) for which in ("after", "before")
    )
    return f"""
<section class="cf-compare" data-width="{translated.width}" data-height="{translated.height}">
<p class="cf-caption" role="status"><strong>{name}</strong> {LABELS[translated.direction]},
{translated.width} × {translated.height} pixels, translated in {translated.seconds:.1f} s{doubt}</p>
<div class="cf-bar">
<label class="cf-slide"><span>Before | after</span>
<input class="cf-range" type="range" min="0" max="100" step="1" value="50"
 aria-label="Share of the picture that shows before"></label>
<button class="cf-button cf-zoom" type="button" aria-pressed="false" aria-label="Zoom to 100 %">100 %</button>
<a class="cf-button cf-download" href="{base}/result" download="{html.escape(result.name)}">Download
 ({html.escape(result.suffix[1:].upper())}, {size:.1f} MB)</a>
</div>
<div class="cf-view" tabindex="0" role="group" aria-label="Picture, before on the left and after on the right">
<div class="cf-stage">{images}
<div class="cf-line" aria-hidden="true"><div class="cf-tags"><span class="cf-tag cf-tag-before">before</span>
<span class="cf-tag cf-tag-after">after</span></div></div></div></div>
</section>"""
