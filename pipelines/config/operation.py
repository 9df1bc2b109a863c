"""The schema of `operation`: how runs are operated; no stage depends on it."""

from __future__ import annotations

from pydantic import Field

from pipelines.base.plugins import Settings
from pipelines.config.promote import Promote


class Operation(Settings):
    """The section `operation`."""

    promote: Promote = Field(default=Promote(), description="how the champion of each model is decided")
