"""MkDocs hook: pages that show a file of the repository, such as the changelog, without a copy of it.

A line `<!-- include: CHANGELOG.md -->` is replaced by that file without its title, for which the heading above the line
stands. Links into `docs/` become links of the site, and links to other files of the repository their names.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

_INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
_TITLE = re.compile(r"^# .*\n", re.MULTILINE)
_HEADING = re.compile(r"^ *```.*?^ *```$|^(#+) ", re.MULTILINE | re.DOTALL)  # or a block of code, which is left alone
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?!https?:|#|mailto:)[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Include the files of the repository that a page names.

    Args:
        markdown: The source of the page.
        page: The page.
        config: The configuration of the site.

    Returns:
        The source with the files in place of the lines that name them.
    """
    docs = Path(config["docs_dir"])
    here = posixpath.dirname(page.file.src_uri)

    def include(match: re.Match[str]) -> str:
        name = match[1]
        text = _TITLE.sub("", (docs.parent / name).read_text(encoding="utf-8"), count=1)
        above = [marks for marks in _HEADING.findall(markdown[: match.start()]) if marks]
        deeper = "#" * (len(above[-1]) - 1) if above else ""
        text = _HEADING.sub(lambda heading: f"{deeper}{heading[0]}" if heading[1] else heading[0], text)
        return _LINK.sub(lambda link: _relinked(link, posixpath.dirname(name), here), text)

    return _INCLUDE.sub(include, markdown)


def _relinked(link: re.Match[str], folder: str, here: str) -> str:
    target = os.path.normpath(posixpath.join(folder, link["target"]))
    if not target.startswith("docs/"):
        return f"{link['text']} (`{target}`)"
    return f"{link['image']}[{link['text']}]({posixpath.relpath(target.removeprefix('docs/'), here or '.')})"
