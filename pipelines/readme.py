"""Write the results of `data/tables` into README.md, between its markers, so that no number there is typed by hand."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines import store
from pipelines.errors import UserError
from pipelines.tables import ORDER

BEGIN, END = "<!-- results: written by `make readme` -->", "<!-- /results -->"


def block(tables: Path) -> str:
    """The Markdown between the markers."""
    return "\n".join(filter(None, ((tables / f"{name}.md").read_text() for name in ORDER)))


def with_results(readme: str, results: str) -> str:
    """The text with its results replaced.

    >>> print(with_results(f"a\\n{BEGIN}\\nold\\n{END}\\nb", "new"))
    a
    <!-- results: written by `make readme` -->
    new
    <!-- /results -->
    b
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"README.md lacks the lines {BEGIN!r} and {END!r}; put them where the results belong.")
    return f"{before}{BEGIN}\n{results}\n{END}{after}"


def main() -> int:
    try:
        readme = Path("README.md")
        text = with_results(readme.read_text(), block(Path("data/tables")))
        with store.replacing(readme) as temporary:
            temporary.write_text(text)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
