"""Formulas as pictures in the page, drawn by matplotlib from their TeX: a page can be read without a network and without scripts."""

from __future__ import annotations

import base64
import html
import io
import re

import matplotlib
from docutils import nodes
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

_SIZE = {"inline": 12.5, "block": 14.0}
"""Points; the pages' text has 12."""


def picture(tex: str, where: str = "inline") -> str:
    """Return a formula as an ``<img>`` that holds its own picture and says its TeX; ValueError for TeX that matplotlib cannot draw."""
    drawn = re.sub(r"\\([lg]e)(?![a-zA-Z])", r"\\\1q", " ".join(tex.split()))
    held = io.BytesIO()
    font = FontProperties(size=_SIZE[where], math_fontfamily="stix")
    with matplotlib.rc_context({"savefig.facecolor": "none"}):
        depth = mathtext.math_to_image(f"${drawn}$", held, prop=font, dpi=72, format="svg")
    data = base64.b64encode(held.getvalue()).decode()
    shown = f'class="math {where}" style="vertical-align: -{depth:.1f}pt" alt="{html.escape(tex)}"'
    return f'<img {shown} src="data:image/svg+xml;base64,{data}">'


def _inline(page: HTML5Translator, node: nodes.math) -> None:
    page.body.append(picture(node.astext()))
    raise nodes.SkipNode


def _block(page: HTML5Translator, node: nodes.math_block) -> None:
    page.body.append(f'<div class="math">{picture(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer; ``html_math_renderer = "pictures"`` takes it."""
    app.add_html_math_renderer("pictures", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
