"""MkDocs hook: formulas become MathML, which browsers show without scripts, fonts or a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def _mathml(match: re.Match[str]) -> str:
    display = match["kind"] == "["
    formula = convert(html.unescape(match["latex"]).strip(), display="block" if display else "inline")
    return f'<div class="formula">{formula}</div>' if display else formula


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula that `pymdownx.arithmatex` marked, in pages and in docstrings.

    Args:
        content: The HTML of a page.

    Returns:
        The HTML with MathML in place of LaTeX.
    """
    return _FORMULA.sub(_mathml, content)
