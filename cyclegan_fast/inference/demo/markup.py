"""The parts of the page that are not Gradio's: the comparison of two pictures, and messages. All text is escaped."""

from __future__ import annotations

import html

from cyclegan_fast import comparison as compare
from cyclegan_fast.inference.demo.limits import Limits
from cyclegan_fast.inference.demo.workbench import Translated

__all__ = ["LABELS", "comparison", "introduction", "message"]

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
    doubt = f".<br>This photograph is {html.escape(translated.unfamiliar)}." if translated.unfamiliar else ""
    caption = f"""<p class="cf-caption" role="status"><strong>{name}</strong> {LABELS[translated.direction]},
{translated.width} × {translated.height} pixels, translated in {translated.seconds:.1f} s{doubt}</p>"""
    download = f"""<a class="cf-button cf-download" href="{base}/result" download="{html.escape(result.name)}">Download
 ({html.escape(result.suffix[1:].upper())}, {size:.1f} MB)</a>"""
    return compare.comparison(
        compare.Side(f"{base}/before", f"{translated.name}, before"),
        compare.Side(f"{base}/after", f"{translated.name}, after"),
        (translated.width, translated.height),
        caption=caption,
        buttons=download,
    )
