"""Write the fingerprints of the external files of data sets and environments; DVC runs it every time."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.base.errors import UserError
from pipelines.config import params as parameters
from pipelines.runs import sources

if __name__ == "__main__":
    try:
        sources.refresh(Path.cwd(), parameters.load())
    except UserError as error:
        sys.exit(f"sources: {error}")
