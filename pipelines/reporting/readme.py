"""Write tables and pictures of runs into documents, so that no number between their markers is typed by hand.

README.md has those of the default run, the files of docs/ those of the profiles of their names, where they were run.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pipelines.base import files
from pipelines.base.errors import UserError
from pipelines.reporting.tables import ORDER

TABLES = {
    Path("README.md"): Path("data/tables"),
    Path("docs/td_tables.md"): Path(".workspaces/td_tables/data/tables"),
    Path("docs/td_claims.md"): Path(".workspaces/td_claims/data/tables"),
}
_FIGURES = Path(".workspaces/td_tables/data/report/figures")
PICTURES = {
    Path("docs/occupancy.png"): Path("data/report/figures/maze_loop-occupancy.png"),
    Path("docs/td_tables-emd.png"): _FIGURES / "emd.png",
    Path("docs/td_tables-horizons.png"): _FIGURES / "maze_loop-horizons.png",
}
BEGIN, END = "<!-- results: written by `make readme` -->", "<!-- /results -->"


def block(tables: Path) -> str:
    """The Markdown between the markers."""
    return "\n".join(filter(None, ((tables / f"{name}.md").read_text() for name in ORDER)))


def with_results(document: str, results: str, name: str = "README.md") -> str:
    """The text with its results replaced.

    >>> print(with_results(f"a\\n{BEGIN}\\nold\\n{END}\\nb", "new"))
    a
    <!-- results: written by `make readme` -->
    new
    <!-- /results -->
    b
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{name} lacks the lines {BEGIN!r} and {END!r}; put them where the results belong.")
    return f"{before}{BEGIN}\n{results}\n{END}{after}"


def main() -> int:
    try:
        for document, tables in TABLES.items():
            if document.name == "README.md" or tables.exists():
                text = with_results(document.read_text(), block(tables), str(document))
                with files.replacing(document) as temporary:
                    temporary.write_text(text)
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
