"""DVC's graph of stages as plain data; dvc.yaml is the only definition of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipelines.base import files, layout
from pipelines.base.errors import UserError, first_line
from pipelines.config import params as parameters
from pipelines.runs import sources

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Node:
    """A stage and its dependencies.

    Attributes:
        name: Name of the stage.
        deps: Names of the stages that it depends on.
        cmd: Command line.
        outs: Paths of the outputs.
        meta: Contents of `meta` in dvc.yaml.
    """

    name: str
    deps: tuple[str, ...]
    cmd: str
    outs: tuple[str, ...]
    meta: dict[str, Any]

    @property
    def hints(self) -> dict[str, Any]:
        """Scheduling settings: `prefect: {retries, retry_delay_seconds, timeout_seconds, tags}` under `meta`."""
        return dict(self.meta.get("prefect") or {})


@contextmanager
def repository(root: Path, settings: Mapping[str, Any] | None = None) -> Iterator[Repo]:
    """Open a project with DVC from its folder; stage names and paths are relative to the current folder.

    Args:
        root: Folder of the project.
        settings: Settings of DVC beside those of its files.

    Yields:
        DVC's repository.

    Raises:
        UserError: DVC cannot read the project, or its graph is invalid.
    """
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with chdir(root), Repo(config=dict(settings or {})) as repo:
            repo.scm  # noqa: B018  # opened lazily; a missing git repository should show here
            yield repo
    except NotDvcRepoError:
        raise UserError(
            f"{root} has no .dvc folder, so DVC does not know the project; "
            "run `dvc init` there (`dvc init --no-scm` without git)."
        ) from None
    except LockError:
        raise UserError(f"another DVC command is at work in {root}; wait until it ends, then run this again.") from None
    except SCMError:
        raise UserError(
            f"{root} is not in a git repository, which DVC expects; run `git init` there, "
            "or `dvc config --local core.no_scm true` to work without git."
        ) from None
    except DvcException as error:
        raise UserError(f"DVC refuses the project: {first_line(error)}") from None


def release_killed(root: Path) -> None:
    """Remove the locks on paths that killed DVC processes have left, without which DVC refuses to start.

    DVC does that itself for a process that is gone, but not for one that its parent has not waited for, as in a
    container without an init process. A damaged file of locks is removed.
    """
    file = root / ".dvc" / "tmp" / "rwlock"
    if not file.exists():
        return
    try:
        locks = json.loads(file.read_text(encoding="utf-8"))
        read = {path: [info for info in infos if _runs(info["pid"])] for path, infos in locks["read"].items()}
        write = {path: info for path, info in locks["write"].items() if _runs(info["pid"])}
    except (ValueError, KeyError, TypeError, AttributeError):
        file.unlink()
        return
    files.write_json(file, {"read": {path: infos for path, infos in read.items() if infos}, "write": write})


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def load(root: Path, targets: Sequence[str] = ()) -> dict[str, Node]:
    """Return the stages by name, those with the longest chain of dependent stages first.

    That order is topological, and starting stages in it avoids delaying a long chain by a side branch.

    Args:
        root: Folder of the project.
        targets: Stages to which the graph is restricted, with their dependencies; `train` selects all of `train@...`.

    Raises:
        UserError: There is no such target, or DVC cannot read the graph.
    """
    with repository(root) as repo:
        return _nodes(repo, targets)


def dirty(root: Path, *, external: bool = True) -> set[str]:
    """Return the stages whose code, parameters, inputs or outputs have changed since their last run.

    External files are compared first. Intact outputs that DVC's cache has lost are copied back into it, because DVC
    would make them again. A stage that DVC always runs has changed if its outputs have.

    Args:
        root: Folder of the project.
        external: Whether to compare external files, which need not be there to look after results.

    Raises:
        UserError: DVC cannot read the project, or an external file is missing.
    """
    from dvc.repo import lock_repo

    with repository(root) as repo, lock_repo(repo):  # DVC reads dvc.yaml and dvc.lock again for every lock
        return _dirty(repo, external)


def compare(root: Path, targets: Sequence[str] = ()) -> tuple[dict[str, Node], set[str]]:
    """Return the stages (see `load`) and those that have changed (see `dirty`), reading the project once.

    Args:
        root: Folder of the project.
        targets: Stages to which the graph is restricted, with their dependencies.

    Raises:
        UserError: There is no such target, DVC cannot read the project, or an external file is missing.
    """
    from dvc.repo import lock_repo

    with repository(root) as repo, lock_repo(repo):
        return _nodes(repo, targets), _dirty(repo, external=True)


def _nodes(repo: Repo, targets: Sequence[str]) -> dict[str, Node]:
    import networkx as nx
    from dvc.repo.reproduce import get_active_graph

    graph = get_active_graph(repo.index.graph)  # an edge leads from a stage to what it depends on
    if targets:
        wanted = {stage for target in targets for stage in repo.stage.collect(target)}
        graph = graph.subgraph(wanted.union(*(nx.descendants(graph, stage) for stage in wanted)))
    behind: dict[Any, int] = {}
    for stage in nx.topological_sort(graph):
        behind[stage] = 1 + max((behind[user] for user in graph.predecessors(stage)), default=-1)
    return {
        stage.addressing: Node(
            name=stage.addressing,
            deps=tuple(sorted(dep.addressing for dep in graph.successors(stage) if dep.cmd)),
            cmd=stage.cmd if isinstance(stage.cmd, str) else " && ".join(stage.cmd),
            outs=tuple(out.def_path for out in stage.outs),
            meta=dict(getattr(stage, "meta", None) or {}),
        )
        for stage in sorted(graph, key=lambda stage: (-behind[stage], stage.addressing))
        if stage.cmd  # a `.dvc` file is data without a command
    }


def _dirty(repo: Repo, external: bool) -> set[str]:
    outs = {out.def_path for stage in repo.index.stages for out in stage.outs}
    if external and layout.SOURCES.as_posix() in outs:
        sources.refresh(Path.cwd(), parameters.load())
    found = repo.status()
    if _recache(repo, found):
        found = repo.status()
    return {name for name, reasons in found.items() if reasons != ["always changed"]}


def _recache(repo: Repo, found: Mapping[str, Sequence[Any]]) -> bool:
    """Copy outputs as dvc.lock describes them to DVC's cache where it lost them; return whether there were any.

    Args:
        repo: DVC's repository.
        found: Answer of `repo.status()`.
    """
    lost = {
        path
        for reasons in found.values()
        for reason in reasons
        if isinstance(reason, dict)
        for path, state in reason.get("changed outs", {}).items()
        if state == "not in cache"
    }
    outs = [out for stage in repo.index.stages for out in stage.outs if str(out) in lost]
    intact = [out for out in outs if out.exists and not out.changed_checksum()]
    for out in intact:
        out.commit(relink=False)
    return bool(intact)
