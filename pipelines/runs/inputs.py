"""The inputs of a stage as dvc.yaml lists them, and whether they changed while it ran.

DVC hashes the inputs of a stage and reads its parameters when the stage has ended. If one was edited meanwhile,
dvc.lock and the run cache would attribute the result to inputs that did not make it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.base import files
from pipelines.base.errors import UserError
from pipelines.config.yaml_files import read_yaml
from pipelines.runs import records

GRAPH = Path("dvc.yaml")
PARAMS = Path("params.yaml")
_NO_INPUT = (Path("pipelines/config/profiles"),)  # .dvcignore: a run reads the params.yaml that was made of them
_LARGE = 2**20  # bytes; a larger file is compared by its size and time of change instead of its content


@dataclass(frozen=True)
class Inputs:
    """What DVC knows of a stage.

    Attributes:
        params: Keys of params.yaml that it uses.
        deps: Files and folders that it reads or is made of.
        outs: Files and folders that it writes.
    """

    params: tuple[str, ...] = ()
    deps: tuple[Path, ...] = ()
    outs: tuple[Path, ...] = ()

    def state(self) -> dict[str, str]:
        """Return the present state of every input: the value of each parameter and a fingerprint of each file."""
        raw = read_yaml(PARAMS) if self.params else {}
        values = records.flat({key: _value(raw, key) for key in self.params})
        return {f"{PARAMS}: {key}": json.dumps(value, default=str) for key, value in values.items()} | {
            str(path): _fingerprint(path) for dep in self.deps for path in _files(dep)
        }

    def verify(self, before: Mapping[str, str]) -> None:
        """Remove the outputs if an input differs from its earlier state.

        Raises:
            UserError: An input differs; the message names it.
        """
        now = self.state()
        names = [*now, *(name for name in before if name not in now)]
        changed = [name for name in names if now.get(name) != before.get(name)]
        if changed:
            for out in self.outs:
                files.remove(out)
            others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"{changed[0]}{others} was edited while the stage ran, so its result was discarded: dvc.lock would "
                "attribute it to the edited input; run the same command again."
            )


def of(stage: str, cell: Mapping[str, str]) -> Inputs:
    """Return the inputs of a stage; there are none where no dvc.yaml defines it.

    Args:
        stage: Name of the stage, such as `prepare@moons`.
        cell: The values of `${item...}`, such as the name of the data set.
    """
    template = (read_yaml(GRAPH).get("stages") or {}).get(stage.partition("@")[0]) if GRAPH.exists() else None
    if template is None:
        return Inputs()
    template = template.get("do", template)

    def listed(*sections: str) -> Iterator[str]:
        for section in sections:
            for entry in template.get(section, ()):
                name = entry if isinstance(entry, str) else next(iter(entry))  # a path may have options
                yield re.sub(r"\$\{item\.(\w+)\}", lambda match: cell[match[1]], name)

    return Inputs(
        params=tuple(listed("params")),
        deps=tuple(map(Path, listed("deps"))),
        outs=tuple(map(Path, listed("outs", "metrics", "plots"))),
    )


def _value(raw: Mapping[str, Any], key: str) -> Any:
    here: Any = raw
    for part in key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def _files(dep: Path) -> Iterator[Path]:
    """Yield the files of a dependency without those that .dvcignore names and hidden ones, such as an editor's."""
    if not dep.is_dir():
        yield dep
    for folder, below, names in os.walk(dep):
        here = Path(folder)
        below[:] = [n for n in below if not n.startswith(".") and n != "__pycache__" and here / n not in _NO_INPUT]
        yield from (here / name for name in names if not name.startswith("."))


def _fingerprint(path: Path) -> str:
    with suppress(FileNotFoundError):
        stat = path.stat()
        if stat.st_size > _LARGE:
            return f"{stat.st_size} {stat.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "missing"
