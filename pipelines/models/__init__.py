"""Build models from `params.yaml`, and save and load trained ones."""

from pipelines.base import extras

extras.check()
