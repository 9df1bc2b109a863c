"""Format validation errors as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipelines.base.errors import did_you_mean


def sentence(error: ValidationError, model: type[BaseModel], path: Path, prefix: tuple[str, ...]) -> str:
    """Return the first validation error as a sentence, with the number of further errors.

    An unknown key is reported before a missing one, because a misspelt key causes both.

    Args:
        error: Error that pydantic raised.
        model: Schema that was validated.
        path: File that was read.
        prefix: Keys from the root of the file to the validated part.
    """
    mistakes = error.errors()
    first = next((mistake for mistake in mistakes if mistake["type"] == "extra_forbidden"), mistakes[0])
    key = ".".join(_word(part) for part in (*prefix, *first["loc"]))
    found = "null" if first["input"] is None else repr(first["input"])
    found = found if len(found) <= 80 else f"{found[:77]}..."
    if first["type"] == "extra_forbidden":
        known = _keys_beside(model, first["loc"])
        remedy = did_you_mean(
            str(first["loc"][-1]), known, f"; expected {'one of ' + ', '.join(known) if known else 'none'}."
        )
        what = f"{key} is not a known key (found {found}){remedy}"
    elif first["type"] == "missing":
        what = f"{key} is missing; add it."
    elif first["loc"][-1:] == ("[key]",):  # of a mapping with free names
        where = ".".join(_word(part) for part in (*prefix, *first["loc"][:-2]))
        what = f"{where} has the name {found}; expected small letters, digits and _ after a letter, at most 64 of them."
    elif not first["loc"]:
        message = str(first["msg"]).removeprefix("Value error, ")
        what = f"{key + ': ' if key else ''}{message}{'' if message.endswith(('.', '?')) else '.'}"
    else:
        message = str(first["msg"]).removeprefix("Value error, ")
        for theirs, ours in (
            ("Input should", "it should"),
            ("String should", "it should"),
            ("Tuple should", "it should"),
            (" after validation", ""),
            ("an object", "a mapping of keys to values"),
            ("array", "list"),
        ):
            message = message.replace(theirs, ours)
        what = f"{key} is {found}; {message}{'' if message.endswith(('.', '?')) else '.'}"
    others = error.error_count() - 1
    return f"{path}: {what}" + (f" (and {others} more)" if others else "")


def _word(part: int | str) -> str:
    """Return a key as it stands in the file, quoted if it is no plain word."""
    word = str(part)
    return word if word.isprintable() and word.strip() else repr(word)


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are valid at the location of an unknown key."""
    here: Any = model
    for part in loc[:-1]:
        fields = getattr(here, "model_fields", None)
        if fields is not None:
            here = fields[part].annotation if part in fields else None
        else:  # dict[str, X]: any name leads to X
            here = get_args(here)[-1] if get_args(here) else None
    return list(getattr(here, "model_fields", {}))
