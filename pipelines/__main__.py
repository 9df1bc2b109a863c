"""The commands of the pipeline: `python -m pipelines --help`."""

import sys

from pipelines.orchestration.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
