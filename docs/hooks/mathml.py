"""Turn formulas into MathML while the site is built, so that reading them needs no script and no network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(page_html: str, **_: Any) -> str:
    """Replace what the arithmatex extension marked; a formula that cannot be read ends the build."""
    page_html = _INLINE.sub(lambda match: _to_mathml(match[1], "inline"), page_html)
    return _DISPLAY.sub(lambda match: _to_mathml(match[1], "block"), page_html)


def _to_mathml(latex: str, display: str) -> str:
    return convert(html.unescape(latex).strip(), display=display)
