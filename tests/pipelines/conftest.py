"""A throw-away project: stages `leaf@a` and `leaf@b` are independent, `join` needs both, `side` none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runs import store

ROOT = Path(__file__).parents[2]

DVC_YAML = """
stages:
  leaf:
    foreach: [a, b]
    do:
      cmd: python step.py ${item}
      deps: [step.py]
      params: [leaf]
      outs: ["data/${item}.txt"]
      metrics: ["data/metrics/${item}.json"]
      meta: {prefect: {retries: 1, retry_delay_seconds: 0}}
  join:
    cmd: python step.py join
    deps: [step.py, data/a.txt, data/b.txt]
    params: [join]
    outs: [data/join.txt]
    metrics: [data/metrics/join.json]
  side:
    cmd: python step.py side
    deps: [step.py]
    params: [side]
    outs: [data/side.txt]
"""

# Leaves a record as a stage does, and in seen/ the times between which it ran, which are no output.
STEP = """
import json, os, pathlib, signal, sys, time

import yaml

from pipelines.runs.records import RunRecord

name = sys.argv[1]
settings = yaml.safe_load(open("params.yaml"))
mine = settings["leaf" if name in "ab" else name]
seen = pathlib.Path("seen")
seen.mkdir(exist_ok=True)
record = RunRecord.start(os.environ["DVC_STAGE"], {"cell": name, **mine}, settings)
def stop(signum, frame):
    raise SystemExit(1)
signal.signal(signal.SIGTERM, stop)
try:
    with (seen / name).open("a") as file:
        file.write(f"{time.time()} {os.getpid()}\\n")
    os.spawnlp(os.P_NOWAIT, "sleep", "sleep", str(mine.get("child", 0)))
    time.sleep(mine.get("sleep", 0))
    failures = len((seen / name).read_text().splitlines())
    if failures <= mine.get("fail", 0):
        record.finish("FAILED", f"{name} was told to fail")
        sys.exit(f"{name} was told to fail")
    for step in range(3):
        record.series(step, {"loss": mine["value"] / (1 + step)})
    data = pathlib.Path("data/metrics")
    data.mkdir(parents=True, exist_ok=True)
    pathlib.Path(f"data/{name}.txt").write_text(str(mine["value"]))
    metrics = {"score": mine["value"], "note": "words", "nested": {"two": 2}}
    (data / f"{name}.json").write_text(json.dumps(metrics))
    record.metrics({"score": mine["value"]})
    record.output(pathlib.Path(f"data/{name}.txt"))
    if name != "side":
        record.output(data / f"{name}.json")
    record.artifact(f"data/{name}.txt")
    record.finish("FINISHED")
    (seen / f"{name}.end").write_text(str(time.time()))
except SystemExit:
    if record.record.status == "RUNNING":
        record.finish("KILLED", "stopped")
    raise
"""

PARAMS = """
profile: default
seed: 0
leaf: {value: 1.5}
join: {value: 2}
side: {value: 3}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, as the current folder; what runs in it finds this interpreter and keeps records in it."""
    root = tmp_path / "a project"  # a space, as in many people's home
    root.mkdir()
    write(root, "dvc.yaml", DVC_YAML)
    write(root, "step.py", STEP)
    write(root, "params.yaml", PARAMS)
    write(root, ".dvc/config", "[core]\n    no_scm = true\n    analytics = false\n")
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # pipelines is a folder of the project, not installed
    monkeypatch.setenv("FLOWMATCH_HOME", str(root / ".flowmatch"))
    for name in ("FLOWMATCH_INVOCATION", "MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    return root


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, since MLflow takes seconds to make one."""
    home = tmp_path_factory.mktemp("schema") / ".flowmatch"
    code = "from mlflow import MlflowClient; import sys; MlflowClient(sys.argv[1]).search_experiments()"
    subprocess.run([sys.executable, "-c", code, store.uri(home)], check=True, capture_output=True)
    return home.parent / "mlflow.db"


def write(root: Path, name: str, text: str) -> None:
    """Write a file of the project."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
