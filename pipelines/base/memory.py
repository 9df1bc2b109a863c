"""Keep the memory that a process frees, which the next operation needs again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of malloc.h
_NEVER, _PAD_BYTES = 2**31 - 1, 2**26


def keep() -> None:
    """Let this process's C library keep freed memory.

    By default glibc returns large blocks to the system at once, which clears them anew for each intermediate tensor: a
    fifth of the time of a likelihood on a CPU. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD_BYTES)):
        mallopt(option, value)
