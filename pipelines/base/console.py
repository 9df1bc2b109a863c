"""Standard output and error that accept every character, whatever the locale."""

from __future__ import annotations

import io
import sys


def accept_all_characters() -> None:
    """Escape the characters that the terminal's encoding lacks, which would otherwise be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
