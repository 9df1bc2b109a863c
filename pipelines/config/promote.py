"""The schema of `operation.promote`: how the champion of each model is decided after a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.base.plugins import Settings

ModelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*$")]


class Promote(Settings):
    """Settings of the decision between the champion and its challenger."""

    enabled: bool = Field(default=True, description="whether a scheduled run decides the champions")
    level: float = Field(
        default=0.95, gt=0.5, lt=1, description="confidence of the one-sided test that the challenger is better"
    )
    pairs: int = Field(
        default=8, ge=2, description="minimum number of test rows, or start states, on which both are scored"
    )
    models: tuple[ModelName, ...] | None = Field(
        default=None, description="models to decide, `<data set or environment>.<method>`; null: all that are trained"
    )
