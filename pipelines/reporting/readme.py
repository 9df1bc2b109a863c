"""Write the tables and figures of runs into documents, so that no number between the markers is typed by hand.

README.md holds a few rows of the default run, the pages of docs/results/ all tables of a profile, if it was run.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.reporting.tables import ORDER

README = Path("README.md")
_RESULTS, _PAPER = Path("docs/results"), Path(".workspaces/td_tables")
_PLANNING = Path(".workspaces/td_planning")
PAGES = {
    _RESULTS / "default.md": layout.TABLES,
    _RESULTS / "td_tables.md": _PAPER / layout.TABLES,
    _RESULTS / "density.md": Path(".workspaces/density_tables") / layout.TABLES,
    _RESULTS / "td_claims.md": Path(".workspaces/td_claims") / layout.TABLES,
    _RESULTS / "td_planning.md": _PLANNING / layout.TABLES,
}
PICTURES = {
    _RESULTS / "occupancy.png": layout.figures(layout.REPORT) / "maze_loop-occupancy.png",
    _RESULTS / "td_planning-square.png": _PLANNING / layout.figures(layout.REPORT) / "maze_goals-square.png",
    _RESULTS / "td_planning-fast_slow.png": _PLANNING / layout.figures(layout.REPORT) / "maze_goals-fast_slow.png",
    _RESULTS / "td_tables-emd.png": _PAPER / layout.figures(layout.REPORT) / "emd.png",
    _RESULTS / "td_tables-horizons.png": _PAPER / layout.figures(layout.REPORT) / "maze_loop-horizons.png",
}
HEADLINE_METHODS = ("mc_cfm", "td_cfm", "td2_cfm")
HEADLINE_COLUMNS = ("environment", "method", "EMD", "EMD / floor", "NLL / dim", "MSE(V)")


def block(tables: Path) -> str:
    """Return all tables of a run as Markdown."""
    return "\n".join(filter(None, (layout.table(tables, name, "md").read_text(encoding="utf-8") for name in ORDER)))


def headline(tables: Path) -> str:
    """Return the rows of the README: a few methods and columns of the table of successor measures."""
    table: dict[str, Any] = files.read_json(layout.table(tables, "successor", "json"))
    places = [table["columns"].index(column) for column in HEADLINE_COLUMNS]
    method = table["columns"].index("method")
    rows = [row for row in table["rows"] if row[method] in HEADLINE_METHODS]
    lines = [HEADLINE_COLUMNS, ["---"] * len(places), *([row[place] for place in places] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def filled(document: str, name: str, text: str, file: Path) -> str:
    r"""Return the document with the text between the markers of that name replaced.

    Raises:
        UserError: A marker is missing.

    >>> before = "a\n<!-- results: written by `make readme` -->\nold\n<!-- /results -->\nb"
    >>> print(filled(before, "results", "new", Path("page.md")))
    a
    <!-- results: written by `make readme` -->
    new
    <!-- /results -->
    b
    """
    begin, end = f"<!-- {name}: written by `make readme` -->", f"<!-- /{name} -->"
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UserError(f"{file} lacks the lines {begin!r} and {end!r}; put them around the results.")
    return f"{before}{begin}\n{text}\n{end}{after}"


def documents() -> Iterator[tuple[Path, str]]:
    """Yield every document whose run is there, with its new text.

    Raises:
        UserError: A document lacks its markers.
    """
    yield README, filled(README.read_text(encoding="utf-8"), "headline", headline(layout.TABLES), README)
    for page, tables in PAGES.items():
        if tables.exists():
            yield page, filled(page.read_text(encoding="utf-8"), "results", block(tables), page)


def main() -> int:
    """Update the documents and figures; return the exit status."""
    try:
        for document, text in documents():
            with files.replacing(document) as temporary:
                temporary.write_text(text, encoding="utf-8")
        for picture, figure in PICTURES.items():
            if figure.exists():
                with files.replacing(picture) as temporary:
                    shutil.copy(figure, temporary)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
