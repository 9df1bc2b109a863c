"""The facts about a run that the report states: date, duration, code, machine and tracker."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from pipelines.runs import records
from pipelines.runs.records import Record

LOCAL_UI = "http://127.0.0.1:5000"  # where `make ui` serves


@dataclass(frozen=True)
class Facts:
    """Facts about a run.

    Attributes:
        invocation: Name of the run in the records and in the tracker.
        made: When the report was written.
        seconds: Time since the first stage started.
        commits: Commits of the code of the stages that ran; several if it changed during the run.
        dirty: Whether the code had uncommitted changes.
        machine: Processor, cores, memory and GPUs of the machine that wrote the report.
        software: Versions of Python and torch.
        tracker: Address of the pages of the tracker, without user name, password and query.
        stages: Records of the stages that ran.
    """

    invocation: str
    made: datetime
    seconds: float
    commits: tuple[str, ...]
    dirty: bool
    machine: str
    software: str
    tracker: str
    stages: tuple[Record, ...]

    @property
    def is_local(self) -> bool:
        """Whether `make ui` serves the tracker's pages."""
        return self.tracker == LOCAL_UI


def gather(invocation: str) -> Facts:
    """Return the facts about an invocation from its records and this machine."""
    stages = records.read(records.home() / "runs" / invocation)
    made = datetime.now().astimezone()
    started = min([stage.started for stage in stages], default=made.timestamp())
    return Facts(
        invocation=invocation,
        made=made,
        seconds=max(0.0, made.timestamp() - started),
        commits=tuple(dict.fromkeys(stage.commit for stage in stages if stage.commit)),
        dirty=any(stage.dirty for stage in stages),
        machine=", ".join([_processor(), f"{os.cpu_count()} cores", _memory(), *(_gpus() or ["no GPU"])]),
        software=f"Python {platform.python_version()}, torch {version('torch')}",
        tracker=tracker(os.environ.get("MLFLOW_TRACKING_URI", "")),
        stages=tuple(stages),
    )


def tracker(uri: str) -> str:
    """Return the address of the tracker's pages for a tracking URI, without what may be secret.

    >>> tracker("https://me:secret@host:8443/mlflow?token=1"), tracker("postgresql://me:secret@host/runs")
    ('https://host:8443/mlflow', 'http://127.0.0.1:5000')
    """
    try:
        parts = urlsplit(uri)
    except ValueError:
        return LOCAL_UI
    if parts.scheme not in ("http", "https"):
        return LOCAL_UI
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> duration(7.4), duration(125), duration(7325)
    ('7 s', '2 min 5 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def failures(stages: Sequence[Record]) -> dict[str, str]:
    """Return the reason of each stage that did not finish."""
    return {stage.stage: stage.message or stage.status for stage in stages if stage.status in ("FAILED", "KILLED")}


def _processor() -> str:
    """Return the name of the processor, which only Linux tells completely."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _memory() -> str:
    return f"{psutil.virtual_memory().total / 2**30:.0f} GiB memory"


def _gpus() -> list[str]:
    """Return the names of the GPUs that NVIDIA's driver lists, without importing torch."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.strip().splitlines()
