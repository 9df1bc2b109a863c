from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from pathlib import Path

from pipelines.orchestration.slots import Slots
from tests.pipelines.conftest import ROOT

HOLDER = """
import asyncio, pickle, sys
async def hold(slots):
    async with slots.taken(["gpu"]) as held:
        print(held["gpu"], flush=True)
        await asyncio.sleep(60)
asyncio.run(hold(pickle.loads(bytes.fromhex(sys.argv[1]))))
"""


def test_slots_bound_how_many_run_at_once(tmp_path: Path) -> None:
    slots = Slots(str(tmp_path), 2, {"gpu": 1})
    running: list[str] = []
    most = {"all": 0, "gpu": 0}

    async def work(tag: str) -> None:
        async with slots.taken([tag]):
            running.append(tag)
            most["all"] = max(most["all"], len(running))
            most["gpu"] = max(most["gpu"], running.count("gpu"))
            await asyncio.sleep(0.3)
            running.remove(tag)

    async def together() -> None:
        await asyncio.gather(*(work(tag) for tag in ("gpu", "gpu", "gpu", "cpu", "cpu")))

    asyncio.run(together())
    assert most == {"all": 2, "gpu": 1}


def test_a_slot_is_shared_between_processes_and_freed_when_one_is_killed(tmp_path: Path) -> None:
    slots = Slots(str(tmp_path), None, {"gpu": 2})
    command = [sys.executable, "-c", HOLDER, pickle.dumps(slots).hex()]

    async def take(seconds: float) -> int | None:
        try:
            async with asyncio.timeout(seconds), slots.taken(["gpu"]) as held:
                return held["gpu"]
        except TimeoutError:
            return None

    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as second,
    ):
        assert first.stdout
        assert second.stdout
        index = int(first.stdout.readline())
        assert {index, int(second.stdout.readline())} == {0, 1}
        assert asyncio.run(take(0.5)) is None
        first.kill()
        first.wait()
        assert asyncio.run(take(20.0)) == index
        second.kill()
