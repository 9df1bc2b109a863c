"""Checkpoints of a training run: complete, atomic, and never used for another configuration.

They are stored in `.checkpoints/<stage>/<key>/`, outside DVC's outputs, which DVC deletes before it runs a stage. The
key is a hash of everything that determines the result, so a changed parameter or input starts from the beginning, and a
killed run continues from its last checkpoint to the weights of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import files
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


def clear(stage: str) -> None:
    """Remove all checkpoints of a stage, after its result is written."""
    shutil.rmtree(ROOT / stage, ignore_errors=True)
