"""The schema of `params.yaml`, the catalog of `flowmatch_core` and the profiles."""

from pipelines.base import extras

extras.check()
