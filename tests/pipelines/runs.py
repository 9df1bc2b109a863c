"""What tests read of the project's MLflow store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.runs import tracking


def runs(project: Path) -> list[Any]:
    """All runs, deleted ones too."""
    return list(tracking.Tracker(project / ".flowmatch").store.search(""))


def parents(project: Path) -> list[Any]:
    """The runs of invocations, the oldest first."""
    found = [run for run in runs(project) if "mlflow.parentRunId" not in run.data.tags]
    return sorted(found, key=lambda run: run.info.start_time)


def children(project: Path, parent: Any) -> dict[str, Any]:
    """The runs below an invocation's, by name."""
    own = [run for run in runs(project) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len({run.info.run_name for run in own}) == len(own)
    return {run.info.run_name: run for run in own}


def curve(project: Path, run: Any, key: str = "loss") -> list[tuple[int, float]]:
    """The steps and values of a curve."""
    client = tracking.Tracker(project / ".flowmatch").client
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def kept(project: Path, run: Any, name: str) -> str:
    """The text of an artefact."""
    return (project / "mlartifacts" / run.info.run_id / "artifacts" / name).read_text()
