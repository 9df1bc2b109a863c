"""Limits on the stages that run at once, as locked files.

A lock belongs to the process that holds it: it works between processes and on a shared file system, and is released
when its process dies.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Slots:
    """A number of slots in total, and for each tag such as `gpu`.

    Attributes:
        folder: Folder of the locked files.
        total: Number of slots in total; None does not limit it.
        tagged: Number of slots of a tag on each machine.
    """

    folder: str
    total: int | None
    tagged: Mapping[str, int]

    @asynccontextmanager
    async def taken(self, tags: Sequence[str]) -> AsyncIterator[dict[str, int]]:
        """Hold slots; acquire tagged slots before the general one, to avoid holding it while waiting.

        Yields:
            The index of the slot of each limited tag.
        """
        held: dict[str, int] = {}
        async with AsyncExitStack() as stack:
            for tag in sorted(set(tags) & self.tagged.keys()):
                held[tag] = await _take(stack, Path(self.folder), f"{tag}-{socket.gethostname()}", self.tagged[tag])
            if self.total is not None:
                await _take(stack, Path(self.folder), "stage", self.total)
            yield held


async def _take(stack: AsyncExitStack, folder: Path, name: str, count: int) -> int:
    """Wait for one of some locks, release it with the stack, and return its index."""
    folder.mkdir(parents=True, exist_ok=True)
    locks = [FileLock(folder / f"{name}-{index}.lock", thread_local=False) for index in range(count)]
    while True:
        for index, lock in enumerate(locks):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            stack.callback(lock.release)
            return index
        await asyncio.sleep(_WAIT_SECONDS)
