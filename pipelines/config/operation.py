"""The section `operation` of params.yaml: how runs are scheduled, spread and watched, and nothing that they compute."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, ValidationError

from pipelines.base.errors import UserError
from pipelines.base.plugins import Settings
from pipelines.config.messages import sentence
from pipelines.config.promote import Promote
from pipelines.config.yaml_files import read_yaml

_WORDS = {
    "month": ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "weekday": ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}
_RANGES = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 7)}
_ITEM = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>[1-9]\d*))?")


def _cron(line: str) -> str:
    fields = line.split()
    if len(fields) != len(_RANGES):
        raise ValueError("expected five fields: minute hour day month weekday, such as 0 3 * * *")
    for field, (name, (low, high)) in zip(fields, _RANGES.items(), strict=True):
        for item in field.split(","):
            found = _ITEM.fullmatch(item)
            ends = [_number(name, word) for word in found.group("first", "last") if word] if found else [-1]
            if not all(low <= end <= high for end in ends) or ends != sorted(ends):
                raise ValueError(f"its {name} is {item!r}; expected *, */n or numbers of {low} to {high}")
    return line


def _number(field: str, word: str) -> int:
    words = _WORDS.get(field, ())
    if word.lower() in words:
        return words.index(word.lower()) + _RANGES[field][0]
    return int(word) if word.isdecimal() else -1


def _timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, OSError, ValueError):
        raise ValueError("expected a name of the IANA list, such as UTC or Europe/Berlin") from None
    return name


def _cluster(word: str) -> str:
    if word not in ("dask", "ray") and not re.fullmatch(r"(tcp|ray)://[^/\s:]+:\d+", word):
        raise ValueError("expected dask, ray, tcp://host:port (Dask) or ray://host:port")
    return word


def _different(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(numbers)) < len(numbers):
        raise ValueError("expected every device once")
    return numbers


Devices = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_different)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Schedule(Settings):
    """When `make serve` retrains."""

    cron: Annotated[str, AfterValidator(_cron)] = Field(
        default="0 3 * * *", description="minute hour day month weekday"
    )
    timezone: Annotated[str, AfterValidator(_timezone)] = Field(default="UTC", description="IANA name")


class Operation(Settings):
    """The section `operation`; no stage depends on it."""

    schedule: Schedule = Schedule()
    workers: int | None = Field(
        default=None, ge=1, description="stages at once under `make flow`; null: cores, at most 4"
    )
    cluster: Annotated[str, AfterValidator(_cluster)] | None = Field(
        default=None, description="where stages run; null: threads of this machine"
    )
    gpus: Devices | None = Field(default=None, description="devices, one stage each; null: those that torch sees")
    timeout_hours: float = Field(default=12.0, gt=0, description="limit of a stage; meta.prefect.timeout_seconds wins")
    notify: tuple[Variable, ...] = Field(default=(), description="environment variables that hold Apprise addresses")
    promote: Promote = Field(default=Promote(), description="how the champion of each model is decided")

    @property
    def timeout(self) -> float:
        """Time limit of a stage in seconds."""
        return 3600 * self.timeout_hours


def read(path: Path) -> Operation:
    """Read this section alone, so that a mistake in another one can be reported where this one says.

    Raises:
        UserError: The file cannot be read, or the section contains an invalid value.
    """
    try:
        return Operation.model_validate_json(json.dumps(read_yaml(path).get("operation") or {}), strict=True)
    except ValidationError as error:
        raise UserError(sentence(error, Operation, path, ("operation",))) from None
