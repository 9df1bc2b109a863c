"""Entry points of the stages, one file each.

A stage never imports another one; stages exchange data only through files in `data/`.
"""

from pipelines.base import extras

extras.check()
