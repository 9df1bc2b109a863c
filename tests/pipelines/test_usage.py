from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.runs.records import RunRecord
from pipelines.runs.usage import Usage


def test_the_use_of_a_stage_and_its_children_is_recorded(project: Path) -> None:
    record = RunRecord.start("s", {})
    code = "x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nprint('full', flush=True); input()"
    command = [sys.executable, "-c", code]
    with (
        Usage(record, every=0.05),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
    ):
        assert child.stdout
        assert child.stdout.readline() == b"full\n"
        time.sleep(0.5)  # several samples
        child.communicate(b"\n")
    found = {key: value or 0.0 for key, value in record.record.metrics.items()}
    assert found["system/memory_mib_max"] > 200
    assert 0 < found["system/memory_mib_mean"] <= found["system/memory_mib_max"]
    assert 0 < found["system/cpu_percent_mean"] <= found["system/cpu_percent_max"]


def test_a_failed_stage_has_its_use_too(project: Path) -> None:
    record = RunRecord.start("s", {})
    with pytest.raises(RuntimeError), Usage(record):
        raise RuntimeError
    assert record.record.metrics["system/memory_mib_max"]
