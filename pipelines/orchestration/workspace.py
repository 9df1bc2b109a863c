"""Profiles: each has a folder of its own, with a params.yaml that includes the profile's changes.

Stages read only the params.yaml of the folder they run in, so DVC treats a profile like any other change of parameters,
and the project's own data and dvc.lock are unaffected. Workspaces share DVC's cache, including its run cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.base import files, git, layout, locks, plugins
from pipelines.base.errors import UserError, did_you_mean
from pipelines.config.changes import SKIP_MISSING, apply
from pipelines.config.yaml_files import read_yaml, write_yaml
from pipelines.orchestration.relocate import relocate
from pipelines.runs.graph import release_killed

WORKSPACES, RESULTS = ".workspaces", "results"
_PROFILES = Path("pipelines/config/profiles")
# Not copied to a workspace: results, DVC's state and caches. Inputs in data/raw are copied.
_OWN = frozenset({layout.DATA.name, RESULTS, "dvc.lock", "mlartifacts", "mlflow.db", "__pycache__"})
# Stage templates with a cell for each entry and method: the section of the entries, and of the methods.
_CELLS = {
    "train_density": ("dataset", "datasets", "density"),
    "train_successor": ("environment", "environments", "successor"),
}
_LOCK_SECONDS = 2.0  # another command may look at the folder for a moment
_PROJECT_HIDDEN = (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore")


@contextmanager
def held(root: Path, profile: str, *, apart: bool = False) -> Iterator[Path]:
    """Lock the folder of a profile, bring it up to date, and yield it; two runs never share a folder.

    Args:
        root: Folder of the project.
        profile: Name of the profile.
        apart: Whether to use a separate folder in any case, as for scheduled runs.

    Raises:
        Busy: A run is at work there; nothing in the folder has been changed.
        UserError: There is no such profile, or a file of parameters cannot be read.
    """
    here = folder(root, profile, apart=apart)
    what = f"the folder of profile {profile}" if here != root else "the project's folder"
    with locks.held(here / locks.FOLDER / "run.lock", what, _LOCK_SECONDS):
        release_killed(here)
        yield prepare(root, profile, apart=apart)


def folder(root: Path, profile: str, *, apart: bool = False) -> Path:
    """Return the folder of a profile; it is the project itself for `default`, unless `apart`.

    Raises:
        UserError: There is no such profile.
    """
    if profile != "default":
        _profile(root, profile)
    if profile == "default" and not apart:
        return root
    return root / WORKSPACES / (f"{profile}-apart" if apart else profile)


def parameters(root: Path, profile: str) -> tuple[dict[str, Any], list[str]]:
    """Return the parameters of a profile, and a sentence on each thing that was left out.

    That are changes of entries that params.yaml does not have (see `changes.apply`), and data sets whose files are
    missing, if the profile says `skip_missing`.

    They are params.yaml with the changes of the profile, or the whole parameters of one that `write` made.

    Raises:
        UserError: There is no such profile, a file cannot be read, or the mirror is no folder.
    """
    if profile != "default" and (file := _profile(root, profile)).parent == root / WORKSPACES:
        return read_yaml(file), []
    base = read_yaml(root / "params.yaml")
    if profile == "default":
        return base, []
    profiles_changes = read_yaml(file)
    params, skipped = apply(base, profiles_changes)
    left_out = [f"params.yaml lacks {', '.join(skipped)}; left out."] if skipped else []
    if profiles_changes.get(SKIP_MISSING):
        missing = dict(_missing(root, params))
        params["datasets"] = {name: entry for name, entry in params["datasets"].items() if name not in missing}
        left_out += [f"{name} is left out: {reason}" for name, reason in missing.items()]
    return params, left_out


def _missing(root: Path, params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the data sets whose files are missing, with the reason; what the schema refuses is left to it.

    Raises:
        UserError: The mirror is no folder, so that every file would seem missing.
    """
    mirror = None if params.get("mirror") is None else root / str(params["mirror"])
    if mirror is not None and not mirror.is_dir():
        raise UserError(
            f"params.yaml: mirror is {params['mirror']!r}, which is no folder; expected a folder of local copies, or "
            "null to have archives downloaded."
        )
    for name, entry in params["datasets"].items():
        if not (isinstance(entry, Mapping) and isinstance(entry.get("kind"), str)):
            continue
        try:
            plugin = plugins.load("pipelines.datasets", entry["kind"])
            own = {key: value for key, value in entry.items() if key in plugin.Settings.model_fields}
            settings = plugin.Settings.model_validate(own)
        except (UserError, ValidationError):
            continue
        try:
            getattr(plugin, "sources", lambda settings, mirror: {})(settings, mirror)
        except UserError as error:
            yield name, str(error)


def prepare(root: Path, profile: str, *, apart: bool = False) -> Path:
    """Return the up-to-date folder of a profile, whose lock the caller holds (see `held`).

    Args:
        root: Folder of the project.
        profile: Name of the profile.
        apart: Whether to use a separate folder in any case, as for scheduled runs.

    Raises:
        UserError: There is no such profile, or a file of parameters cannot be read.
    """
    here = folder(root, profile, apart=apart)
    if here != root:
        params, _ = parameters(root, profile)
        _synchronise(root, here, relocate(params, root, here))
    return here


def tried(root: Path, profile: str) -> Path:
    """Return the file of a profile that is made by `write`."""
    return root / WORKSPACES / f"{profile}.yaml"


def write(root: Path, profile: str, params: Mapping[str, Any]) -> None:
    """Make a profile of whole parameters, which needs no file in pipelines/config/profiles/.

    Raises:
        UserError: The name is that of another profile.
    """
    if profile == "default" or (root / _PROFILES / f"{profile}.yaml").exists():
        raise UserError(f"{profile!r} is the name of a profile of the project; choose another one by --name.")
    _write(tried(root, profile), write_yaml(params))


def folders(root: Path) -> list[Path]:
    """Return the folders that exist of profiles and of scheduled runs, sorted."""
    return sorted(path.parent for path in (root / WORKSPACES).glob("*/.dvc"))


def profiles(root: Path) -> list[str]:
    """Return the profiles that have a folder, sorted."""
    known = _profiles(root)
    return [folder.name for folder in folders(root) if folder.name in known]


def _profiles(root: Path) -> dict[str, Path]:
    """Return the files of all profiles by name; one of the project takes precedence over one that `write` made."""
    found = (*(root / WORKSPACES).glob("*.yaml"), *(root / _PROFILES).glob("*.yaml"))
    return {path.stem: path for path in found}


def _profile(root: Path, profile: str) -> Path:
    known = _profiles(root)
    if profile not in known:
        hint = did_you_mean(profile, ["default", *known])
        raise UserError(f"no profile {profile!r}; {_PROFILES}/ has {', '.join(sorted(known))}, beside default{hint}")
    return known[profile]


def _synchronise(root: Path, workspace: Path, params: Mapping[str, Any]) -> None:
    workspace.mkdir(parents=True, exist_ok=True)
    manifest = workspace.with_suffix(".files.json")
    before = set(files.read_json(manifest)) if manifest.exists() else set()
    present = set(_files(root)) - {"params.yaml", "dvc.yaml"}
    files.write_json(manifest, sorted(before | present))  # before the work, so that an interrupted copy can be cleaned
    for name in before - present:
        (workspace / name).unlink(missing_ok=True)
    for name in present:
        source, target = root / name, workspace / name
        if not (target.is_file() and cmp(source, target, shallow=False)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(target) as temporary:
                shutil.copy2(source, temporary)
    _write(workspace / "params.yaml", write_yaml(params))
    _write(workspace / "dvc.yaml", _graph(root, params))
    _write(workspace / ".dvc" / "config.local", _dvc_settings(root, workspace))
    files.write_json(manifest, sorted(present))


def _graph(root: Path, params: Mapping[str, Any]) -> str:
    """Return the project's dvc.yaml without the cells that no data set and no environment runs.

    A matrix has a stage for every pair of an entry and a method, and each stage costs DVC time whether it has
    something to do or not. The cells have the same names here.
    """
    graph = read_yaml(root / "dvc.yaml")
    try:
        for stage, (key, *sections) in _CELLS.items():
            if (template := graph["stages"].get(stage)) is not None:
                cells = dict(_cells(params, key, *sections))
                del template["matrix"]
                graph["stages"][stage] = {"foreach": cells, "do": template}
    except (AttributeError, KeyError, TypeError):  # DVC and the schema of params.yaml refuse what is wrong
        return (root / "dvc.yaml").read_text(encoding="utf-8")
    head = "# Made from the project's dvc.yaml: the same stages, but only for the methods that an entry runs.\n"
    return head + write_yaml(graph, width=120)


def _cells(params: Mapping[str, Any], key: str, family: str, section: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the cells of a stage that run, by name."""
    methods = params[section]["methods"]
    for name, entry in params[family].items():
        for method in methods:
            if method in (entry.get("methods") or methods):
                yield f"{name}-{method}", {key: name, "method": method}


def _files(root: Path) -> Iterator[str]:
    """Yield the project's files, relative to it: those that git lists or would add, or without git all visible ones."""
    try:
        listed = git.output("ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=root).split(b"\0")
    except git.Unavailable:
        listed = []
    for name in map(os.fsdecode, filter(None, listed)) if any(listed) else _walk(root):
        if _is_shared(name) and (root / name).is_file():
            yield name


def _walk(root: Path) -> Iterator[str]:
    for folder, below, names in os.walk(root):
        here = Path(folder).relative_to(root)
        below[:] = [name for name in below if not name.startswith(".") or (here / name) == Path(".dvc")]
        below[:] = [name for name in below if name != "__pycache__"]
        for name in names:
            yield (here / name).as_posix()


def _is_shared(name: str) -> bool:
    first = name.partition("/")[0]
    if first.startswith("."):
        return name in _PROJECT_HIDDEN
    return first not in _OWN or Path(name).is_relative_to(layout.RAW)


def _dvc_settings(root: Path, workspace: Path) -> str:
    """Return DVC's settings for a workspace: no git, because the folder is ignored, and the project's cache."""
    from dvc.config import Config

    settings = Config(str(root / ".dvc"))["cache"]
    cache = root / ".dvc" / (settings.get("dir") or "cache")
    return f"[core]\n    no_scm = true\n[cache]\n    dir = {os.path.relpath(cache, workspace / '.dvc')}\n"


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
