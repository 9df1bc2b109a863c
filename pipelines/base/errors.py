"""The exception for errors that a user can fix, and helpers that build its messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """An error that a user can fix.

    The message is one sentence that names the argument or key, what was found, what was expected and the fix. Commands
    print it without a traceback and exit with status 1.
    """


def did_you_mean(name: str, known: Iterable[str], otherwise: str = ".") -> str:
    """Return the end of a sentence about an unknown name: the closest known name, or `otherwise`.

    >>> did_you_mean("mons", ["moons", "digits"]), did_you_mean("x", ["moons", "digits"])
    ("; did you mean 'moons'?", '.')
    >>> did_you_mean("X", ["x", "y"])
    "; did you mean 'x'?"
    """
    names = list(known)
    near = [other for other in names if other.casefold() == name.casefold()] or get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else otherwise


def first_line(error: Exception) -> str:
    r"""Return the first line of an error message, or the error's type if the message is empty.

    >>> first_line(ValueError("no\nway")), first_line(KeyError())
    ('no', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
