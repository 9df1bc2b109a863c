"""Tables, figures and the report page, made from metrics and samples."""

from pipelines.base import extras

extras.check()
