from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.base.errors import UserError
from pipelines.runs import graph
from tests.pipelines.conftest import PARAMS, write
from tests.pipelines.test_runner import wait_for

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # of DVC
PROJECT = Path(__file__).parents[2]


def edges_by_dvc(root: Path) -> set[tuple[str, str]]:
    """The edges (before, after) that DVC itself draws, chains of several stages on one line included."""
    drawn = subprocess.run(
        [sys.executable, "-m", "dvc", "dag", "--dot"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    return {
        (before, after)
        for line in drawn.splitlines()
        for names in [re.findall(r'"([^"]+)"', line)]
        for before, after in itertools.pairwise(names)
    }


def edges_by_us(root: Path) -> set[tuple[str, str]]:
    return {(dep, node.name) for node in graph.load(root).values() for dep in node.deps}


def test_edges_are_those_that_dvc_draws(project: Path) -> None:
    assert edges_by_us(project) == edges_by_dvc(project) == {("leaf@a", "join"), ("leaf@b", "join")}


def test_edges_of_the_real_project_are_those_that_dvc_draws() -> None:
    drawn = edges_by_dvc(PROJECT)
    assert len(drawn) > 20
    assert edges_by_us(PROJECT) == drawn


@pytest.mark.parametrize("root", ["project", "real"])
def test_the_order_is_topological_with_the_longest_chains_first(root: str, project: Path) -> None:
    nodes = graph.load(project if root == "project" else PROJECT)
    order = list(nodes)
    for name, node in nodes.items():
        assert all(order.index(dep) < order.index(name) for dep in node.deps)
    if root == "project":
        assert order == ["leaf@a", "leaf@b", "join", "side"]


def test_a_node_holds_what_dvc_yaml_says(project: Path) -> None:
    node = graph.load(project)["leaf@a"]
    assert node.cmd == "python step.py a"
    assert node.outs == ("data/a.txt", "data/metrics/a.json")
    assert node.hints == {"retries": 1, "retry_delay_seconds": 0}
    assert graph.load(project)["side"].hints == {}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(["side"], ["side"]), (["join"], ["leaf@a", "leaf@b", "join"]), (["leaf"], ["leaf@a", "leaf@b"])],
)
def test_targets_bring_what_they_need(project: Path, targets: list[str], expected: list[str]) -> None:
    assert list(graph.load(project, targets)) == expected


def test_what_is_dirty(project: Path) -> None:
    assert graph.dirty(project) == {"leaf@a", "leaf@b", "join", "side"}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    assert graph.dirty(project) == set()
    write(project, "params.yaml", PARAMS.replace("side: {value: 3}", "side: {value: 4}"))
    assert graph.dirty(project) == {"side"}
    (project / "data/a.txt").unlink()
    assert graph.dirty(project) == {"side", "leaf@a", "join"}


FOLDER = """
stages:
  folder:
    cmd: mkdir -p data/folder/inner && cp step.py data/folder/inner/ && echo 1 > data/folder/one
    deps: [step.py]
    outs: [data/folder]
  file:
    cmd: cp data/folder/one data/one && echo 1 > data/folder.json
    deps: [data/folder]
    outs: [data/one]
    metrics: [data/folder.json: {cache: false}]
"""


def test_a_lost_cache_costs_nothing_while_the_outputs_are_there(project: Path) -> None:
    write(project, "dvc.yaml", FOLDER)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    shutil.rmtree(project / ".dvc/cache")
    assert graph.dirty(project) == set()
    shutil.rmtree(project / "data/folder")  # the cache is whole again
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "-q"], check=True)
    assert (project / "data/folder/inner/step.py").read_text() == (project / "step.py").read_text()


def test_only_an_intact_output_returns_to_the_cache(project: Path) -> None:
    write(project, "dvc.yaml", FOLDER)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    shutil.rmtree(project / ".dvc/cache")
    write(project, "data/one", "edited")
    assert graph.dirty(project) == {"file"}
    write(project, "data/folder/one", "edited")
    assert graph.dirty(project) == {"file", "folder"}


def test_names_do_not_depend_on_the_current_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = set(graph.load(project)), graph.dirty(project)
    monkeypatch.chdir(project.parent)
    assert (set(graph.load(project)), graph.dirty(project)) == here
    assert list(graph.load(project, ["side"])) == ["side"]


def test_data_without_a_command_is_no_node(project: Path) -> None:
    write(project, "raw.txt", "1")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "raw.txt"], check=True)
    write(project, "dvc.yaml", "stages: {s: {cmd: cp raw.txt out.txt, deps: [raw.txt], outs: [out.txt]}}")
    assert {name: node.deps for name, node in graph.load(project).items()} == {"s": ()}


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda root: (root / ".dvc").rename(root / "x"), "dvc init"),
        (lambda root: write(root, ".dvc/config", ""), "git init"),
        (
            lambda root: write(root, "dvc.yaml", "stages: {a: {cmd: x, outs: [o]}, b: {cmd: y, outs: [o]}}"),
            "o",
        ),
        (lambda root: write(root, "dvc.yaml", "stages: {a: {cmd: 'x ${nothing}'}}"), "nothing"),
    ],
)
def test_a_project_that_dvc_refuses_is_a_sentence(project: Path, break_it: object, says: str) -> None:
    break_it(project)  # type: ignore[operator]
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        graph.load(project)
    assert "\n" not in str(caught.value)


def test_a_project_where_dvc_is_at_work_is_a_sentence(project: Path) -> None:
    code = "from dvc.repo import Repo; r = Repo('.'); r.lock.lock(); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(UserError, match="another DVC command is at work"):
            graph.dirty(project)
        other.communicate(b"\n")


def test_an_unknown_target_is_a_sentence(project: Path) -> None:
    with pytest.raises(UserError, match="nonsense"):
        graph.load(project, ["nonsense"])


def test_locks_of_killed_processes_are_released(project: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)  # nobody has waited for it yet
    file = project / ".dvc/tmp/rwlock"
    mine = {"pid": os.getpid(), "cmd": "dvc repro"}
    dead = {"pid": child.pid, "cmd": "dvc repro"}
    locks = {"read": {"a": [mine, dead], "b": [dead]}, "write": {"c": dead, "d": mine}}
    write(project, ".dvc/tmp/rwlock", json.dumps(locks))
    graph.release_killed(project)
    assert json.loads(file.read_text()) == {"read": {"a": [mine]}, "write": {"d": mine}}
    assert graph.dirty(project)
    child.wait()
    write(project, ".dvc/tmp/rwlock", '{"read"')
    graph.release_killed(project)
    assert not file.exists()
