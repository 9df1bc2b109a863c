"""Checkpoints and finished seeds of a training stage: complete, atomic, never used for another configuration.

They are stored in `.checkpoints/<stage>/<key>/`, outside DVC's outputs, which DVC deletes before it runs a stage. The
key is a hash of everything that determines the networks: settings, inputs, torch, and all files of `pipelines/` and
`flowmatch_core/`, so a changed parameter, input or line of code starts from the beginning. The list of seeds is not
part of it: a killed run continues from its last checkpoint to the weights of an uninterrupted run, and a seed that is
added to the list is the only one that is trained. A stage that has written its result keeps the networks of its present
key and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import files, layout
from pipelines.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(".checkpoints")


def folder(stage: str, config: Mapping[str, Any], inputs: Sequence[Path]) -> Path:
    """Return the checkpoint folder of a configuration, the content of its inputs, and the code."""
    import torch

    digest = hashlib.sha256(json.dumps([config, torch.__version__], sort_keys=True, default=str).encode())
    here = Path(__file__).parents[1]
    code = sorted([*here.rglob("*.py"), *(here.parent / "flowmatch_core").rglob("*.py")])
    for path in (*inputs, *code):
        for piece in files.chunks(path):
            digest.update(piece)
    return ROOT / stage / digest.hexdigest()[:16]


def enter(state: Path, invocation: str, forced: bool) -> None:
    """Begin or continue in a checkpoint folder; a forced run continues only what its own invocation began."""
    owner = state / "invocation.json"
    if forced and not (owner.exists() and files.read_json(owner) == invocation):
        shutil.rmtree(state, ignore_errors=True)
    files.write_json(owner, invocation)


def of_seed(state: Path, seed: int) -> Path:
    """Return the checkpoint of a seed."""
    return state / f"seed{seed}.checkpoint"


def of_tuning(checkpoint: Path) -> Path:
    """Return the checkpoint of the second phase of a training."""
    return checkpoint.with_name(f"{checkpoint.stem}.tune.checkpoint")


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name and rename it."""
    files.write_tensors(path, tensors, meta)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the checkpoint at `path`, or None if there is none.

    Raises:
        UserError: The file is damaged. Writes are atomic, so it was changed afterwards.
    """
    if not path.exists():
        return None
    try:
        return files.read_tensors(path)
    except UserError:
        raise UserError(
            f"the checkpoint {path} is damaged; delete it, and training starts from the beginning."
        ) from None


def finish(state: Path, seed: int, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Mark a seed as finished, whose network is in the folder, and keep what its training returned, as JSON."""
    files.write_json(_summary(state, seed), {**summary, "sha256": _digest(layout.network(state, seed))})
    kept = finished(state, seed)
    assert kept is not None
    return kept


def finished(state: Path, seed: int) -> dict[str, Any] | None:
    """Return what the training of a seed returned; None if its network is missing or not the one that was written."""
    try:
        summary: dict[str, Any] = files.read_json(_summary(state, seed))
        whole = summary.pop("sha256") == _digest(layout.network(state, seed))
    except (UserError, KeyError, AttributeError):
        return None
    return summary if whole else None


def settle(state: Path) -> None:
    """Remove everything of a stage except the finished seeds of one key, after its result is written."""
    for other in state.parent.iterdir():
        if other != state:
            shutil.rmtree(other)
    for left in (*state.glob("*.checkpoint"), *state.glob(".*.tmp")):
        left.unlink()


def _summary(state: Path, seed: int) -> Path:
    return state / f"seed{seed}.json"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for piece in files.chunks(path):
        digest.update(piece)
    return digest.hexdigest()
