"""What DVC, Prefect and MLflow cost beside the work: the project's graph with stages that only write their outputs."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from benchmarks.results import Cell, Result

__all__ = ["benchmark_orchestration"]

ROOT = Path(__file__).parents[1]
DEFAULT_RUN_SECONDS = 14 * 60  # docs/operations/index.md: the default run on 2 cores
LIMITS = {"nothing to do": 2.0, "one changed stage, make repro": 6.0, "one changed stage, make flow": 12.0}
WRITE = """
import pathlib, sys
for name in sys.argv[1:]:
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}", encoding="utf-8")
"""


def benchmark_orchestration(quick: bool) -> Result:
    """Time commands on a copy of the project; the pipeline's environment is $FLOWMATCH_PYTHON, else this one."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "flowmatch"
        stages = _make(project, quick)
        whole, busy = _time(project, "repro")
        seconds = {"nothing to do": _time(project, "repro")}
        for command in ("repro", "flow"):
            _time(project, command)  # creates databases
            code = project / "pipelines/reporting/report.py"
            code.write_text(f"{code.read_text(encoding='utf-8')}# {command}\n", encoding="utf-8")
            seconds[f"one changed stage, make {command}"] = _time(project, command)
    rows: list[dict[str, Cell]] = [
        {"what": what, "seconds": wall, "CPU seconds": cpu, "wanted": f"at most {LIMITS[what]:g}"}
        for what, (wall, cpu) in seconds.items()
    ]
    rows.append(
        {"what": f"{stages} stages without work, make repro", "seconds": whole, "CPU seconds": busy, "wanted": None}
    )
    share = 100 * whole / (whole + DEFAULT_RUN_SECONDS)
    rows.append(
        {"what": "share of the default run, percent", "seconds": share, "CPU seconds": None, "wanted": "at most 5"}
    )
    return Result("Orchestration: seconds of commands beside the work of stages", rows)


def _make(project: Path, quick: bool) -> int:
    """Copy the project with stages that only write their outputs, and return the number of stages."""
    for name in ("pipelines", "flowmatch_core"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dvcignore", "README.md"):
        shutil.copy(ROOT / name, project)
    (project / "write.py").write_text(WRITE, encoding="utf-8")
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    for name, stage in graph["stages"].items():
        if name == "sources":  # whose outputs are files of one folder
            continue
        template = stage.get("do", stage)
        listed = [out for kind in ("outs", "metrics", "plots") for out in template.get(kind, ())]
        names = [next(iter(out)) if isinstance(out, Mapping) else out for out in listed]
        template["cmd"] = f"python -S write.py {' '.join(names)}"
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    if quick:
        params["datasets"] = {"moons": params["datasets"]["moons"]}
        params["environments"] = {"spiral": params["environments"]["spiral"]}
        params["experiments"] = {}
    (project / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False), encoding="utf-8")
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    _run(project, "dvc", "init", "--no-scm", "--quiet")
    return len(_run(project, "pipelines.orchestration", "status").splitlines())


def _time(project: Path, command: str) -> tuple[float, float]:
    """Return the seconds of a command, on the clock and of CPU; other programs lengthen the first alone."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(project, "pipelines.orchestration", command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run(project: Path, *arguments: str) -> str:
    python = os.environ.get("FLOWMATCH_PYTHON", sys.executable)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FLOWMATCH_", "MLFLOW_", "PREFECT_"))}
    env["PATH"] = os.pathsep.join((str(Path(python).parent), env["PATH"]))
    done = subprocess.run([python, "-m", *arguments], cwd=project, env=env, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return done.stdout
