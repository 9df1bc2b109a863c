"""The one exception for mistakes that a user can make and mend, and what its sentences are made of."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A sentence that names the culprit, what was found, what is expected and the remedy.

    Commands print it without a traceback and exit with status 1.
    """


def did_you_mean(name: str, known: Iterable[str], otherwise: str = ".") -> str:
    """The end of a sentence about an unknown name: the known one that is like it, or something else.

    >>> did_you_mean("mons", ["moons", "digits"]), did_you_mean("x", ["moons", "digits"])
    ("; did you mean 'moons'?", '.')
    """
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else otherwise


def first_line(error: Exception) -> str:
    """What an error says, without its details; its kind if it says nothing.

    >>> first_line(ValueError("no\\nway")), first_line(KeyError())
    ('no', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
