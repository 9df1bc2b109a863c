"""Remove credentials from the URIs in a text that is printed or recorded."""

from __future__ import annotations

import re

HIDDEN = "***"

_URI = re.compile(r"(?<![\w+.-])([a-z][a-z0-9+.-]*://)([^\s]+)", re.IGNORECASE)
# SQLAlchemy accepts a password with slashes; elsewhere the user's part ends at the last @ before the path.
_USER = re.compile(r"^(?:[^:/@]*:[^@]*@)?(?:[^/?#]*@)?")
_QUERY = re.compile(
    r"([?&;#][^=&;]*(?:pass|pwd|token|secret|key|sig|cred|auth)[^=&;]*=)[^&#]*?(?=[\"')>\].,]*(?:[&#]|$))",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return a text in which no URI has a user, a password or a secret parameter.

    >>> redact("no answer from postgresql://ann:pw@db:5432/runs?sslpassword=pw&sslmode=require.")
    'no answer from postgresql://***@db:5432/runs?sslpassword=***&sslmode=require.'
    >>> redact("http://127.0.0.1:5000 and train@moons stay")
    'http://127.0.0.1:5000 and train@moons stay'
    """
    return _URI.sub(lambda found: found[1] + _hide(found[2]), text)


def _hide(rest: str) -> str:
    """Return what follows the scheme of a URI without its credentials."""
    user = _USER.match(rest)
    without = rest[user.end() :] if user else rest
    mark = f"{HIDDEN}@" if len(without) < len(rest) else ""
    return mark + _QUERY.sub(rf"\g<1>{HIDDEN}", without)
