"""MkDocs hook: formulas become MathML, which browsers show without scripts, fonts or a network."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)
_LETTER = r'<mi mathvariant="normal">(\w)</mi>'
_FUNCTION = r"(<m[io]>(?:arg|cos|det|exp|log|max|min|sin|tan|tanh|tr)</m[io]>)"
_ATOM = (
    r"(?=<(?:mi|mn|mrow|msub|msup|msubsup|mover|mfrac|mstyle)\b|<mo>(?:&#x02207;|&#x02202;|&#x02016;|&#x02223;)</mo>)"
)
# The converter leaves delimiters such as \Bigl\lVert as they are, makes the relation ~ and punctuation identifiers,
# cuts upright words into letters, and sets no space between a function and its argument.
_BEFORE = (
    (re.compile(r"(\\[bB]igg?[lrm]?)\\[lr]Vert"), r"\1‖"),
    (re.compile(r"\\mathrel\s*"), ""),
)
_AFTER = (
    (re.compile(r"<mi>&#x0007E;</mi>"), "<mo>&#x0223C;</mo>"),
    (re.compile(r"<mi>([;:])</mi>"), r'<mo separator="true">\1</mo>'),
    (
        re.compile(rf"(?:{_LETTER}){{2,}}"),
        lambda word: f"<mi>{''.join(re.findall(_LETTER, word[0]))}</mi>",
    ),
    (re.compile(_FUNCTION + _ATOM), r'\1<mspace width="0.167em"></mspace>'),
)
_log = logging.getLogger("mkdocs.plugins.mathml")


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match["latex"]).strip()
    for pattern, replacement in _BEFORE:
        latex = pattern.sub(replacement, latex)
    display = match["kind"] == "["
    formula = convert(latex, display="block" if display else "inline")
    for pattern, replacement in _AFTER:
        formula = pattern.sub(replacement, formula)
    if "\\" in formula:
        _log.warning("A formula has a command that is not known: %s", latex)
    return f'<div class="formula">{formula}</div>' if display else formula


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula that `pymdownx.arithmatex` marked, in pages and in docstrings.

    Args:
        content: The HTML of a page.

    Returns:
        The HTML with MathML in place of LaTeX.
    """
    return _FORMULA.sub(_mathml, content)
