"""The comparison of two pictures in a page: one on top of the other, and a slider between them.

Its style, script and markup, for the demo's page and the report alike. The page gives the colours, as the custom
properties that `compare.css` names, which are those of Gradio's themes.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CSS", "JS", "Side", "comparison"]

CSS = Path(__file__).with_name("compare.css")
JS = Path(__file__).with_name("compare.js")


@dataclass(frozen=True)
class Side:
    """One of the two pictures: its address, and the text that stands for it. Both are escaped where they are used."""

    source: str
    text: str


def comparison(
    before: Side, after: Side, size: tuple[int, int], *, caption: str, buttons: str = "", least: int = 0
) -> str:
    """HTML of a comparison of two pictures of one ``size``, width and height in pixels.

    ``caption`` and ``buttons`` are HTML. ``least``: width in CSS pixels to which a smaller picture is enlarged, unless
    it is looked at at 100 %.
    """
    width, height = size
    image = '<img class="cf-{0}" src="{1}" alt="{2}" width="{3}" height="{4}" draggable="false">'
    images = "".join(
        image.format(name, html.escape(side.source), html.escape(side.text), width, height)
        for name, side in (("after", after), ("before", before))
    )
    return f"""
<section class="cf-compare" data-width="{width}" data-height="{height}" data-least="{least}">
{caption}
<div class="cf-bar">
<label class="cf-slide"><span>Before | after</span>
<input class="cf-range" type="range" min="0" max="100" step="1" value="50"
 aria-label="Share of the picture that shows before"></label>
<button class="cf-button cf-zoom" type="button" aria-pressed="false" aria-label="Zoom to 100 %">100 %</button>
{buttons}
</div>
<div class="cf-view" tabindex="0" role="group" aria-label="Picture, before on the left and after on the right">
<div class="cf-stage">{images}
<div class="cf-line" aria-hidden="true"><div class="cf-tags"><span class="cf-tag cf-tag-before">before</span>
<span class="cf-tag cf-tag-after">after</span></div></div></div></div>
</section>"""
