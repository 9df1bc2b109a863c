"""The context of a stage: parameters, seeds, log, record and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.base import files, ranks, seeding
from pipelines.config.params import Params
from pipelines.runs.records import RunRecord

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Stage:
    """The context of a stage.

    Attributes:
        name: Name of the stage.
        params: Contents of `params.yaml`.
        record: Record of this attempt.
    """

    name: str
    params: Params
    record: RunRecord

    def seed(self, *key: object) -> int:
        """Return the seed of a key (see `derived_seed`)."""
        return seeding.derived_seed(self.params.seed, *key)

    def rng(self, *key: object) -> np.random.Generator:
        """Return a NumPy generator for a key."""
        import numpy as np

        return np.random.default_rng(self.seed(*key))

    def generator(self, *key: object, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a torch generator for a key."""
        return seeding.generator(self.params.seed, *key, device=device)

    def log(self, message: str) -> None:
        """Print one line to standard output, with the name of the stage, by the first of its processes."""
        if ranks.is_first():
            print(f"{self.name}: {message}", flush=True)

    def metrics(self, values: Mapping[str, float]) -> None:
        """Record metrics of the whole stage."""
        self.record.metrics(dict(values))

    @contextmanager
    def output(self, path: Path) -> Iterator[Path]:
        """Yield a temporary path for an output file or folder, and rename it when it is complete."""
        with files.replacing(path) as temporary:
            yield temporary
        self.record.output(path)
        self.log(f"wrote {path}")
