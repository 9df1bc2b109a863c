"""The champion of each registered model in MLflow: the version with the alias `champion`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.runs import records, store, versions
from pipelines.runs.store import INVOCATION, PARENT

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from numpy.typing import NDArray

ALIAS = "champion"
_PREVIOUS = "previous_champion"  # tag of a champion: the version that was champion before it
_ROWS = Path("promotion") / "training_rows.npy"  # an artefact of the run that trained a version


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        model: Name of the model.
        number: Number of the version.
        run: Id of the run that trained it.
        tags: Its tags.
    """

    model: str
    number: int
    run: str
    tags: Mapping[str, str]

    @property
    def previous(self) -> str | None:
        """Number of the version that was champion before this one."""
        return self.tags.get(_PREVIOUS)


class Registry:
    """The registered models of the store.

    Raises:
        UserError: There is no store.
    """

    def __init__(self) -> None:
        self._store = store.open_existing(records.home())
        self._client: MlflowClient = self._store.client

    def versions(self, model: str) -> list[Version]:
        """Return the versions of a model, the newest first; none if there is no such model."""
        found = self._client.search_model_versions(f"name = '{model}'", order_by=["version_number DESC"])
        return [Version(model, int(one.version), str(one.run_id), dict(one.tags)) for one in found]

    def champion(self, model: str) -> int | None:
        """Return the version of a model that is its champion.

        Raises:
            UserError: There is no such model.
        """
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_registered_model(model)
        except MlflowException:
            raise versions.unknown(self._client, model) from None
        version = found.aliases.get(ALIAS)
        return None if version is None else int(version)

    def crown(self, model: str, version: int, before: int | None) -> None:
        """Make a version the champion, and note on it which version was champion before, if one is given."""
        if before is not None:
            self.tag(model, version, {_PREVIOUS: str(before)})
        self._client.set_registered_model_alias(model, ALIAS, str(version))

    def tag(self, model: str, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self._client.set_model_version_tag(model, str(version), key, value)

    def networks(self, version: Version, scratch: Path) -> dict[int, Path]:
        """Return the files of a version's networks by seed.

        Args:
            version: The version.
            scratch: Folder to copy them to.

        Raises:
            UserError: MLflow does not have them.
        """
        address = f"models:/{version.model}/{version.number}"
        folder = scratch / f"{version.model}-{version.number}"
        folder.mkdir(exist_ok=True)
        found = layout.networks(versions.files(address, folder))
        if not found:
            raise UserError(f"MLflow has lost the files of {address}")
        return found

    def keep_rows(self, version: Version, keys: NDArray[np.uint64]) -> None:
        """Keep with a version the keys of the rows that it was trained on."""
        import numpy as np

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / _ROWS.name
            np.save(file, np.unique(keys), allow_pickle=False)
            self._client.log_artifact(version.run, str(file), _ROWS.parent.name)

    def rows(self, version: Version) -> NDArray[np.uint64] | None:
        """Return the keys of the rows that a version was trained on, or None if they were not kept."""
        import numpy as np
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                file = self._client.download_artifacts(version.run, str(_ROWS), folder)
                keys: NDArray[np.uint64] = np.load(file, allow_pickle=False)
            except (OSError, ValueError, MlflowException):
                return None
        return keys

    def invocation(self, version: Version) -> str:
        """Return the name of the invocation that trained a version."""
        return str(self._client.get_run(version.run).data.tags.get(INVOCATION, ""))

    def file(self, decision: Mapping[str, Any], version: Version, invocation: str) -> None:
        """File a decision on the run of an invocation, or of the one that trained the version if it has none."""
        parent, _ = self._store.runs_of(invocation)
        if parent is None or parent.info.lifecycle_stage != "active":
            run = str(self._client.get_run(version.run).data.tags.get(PARENT, version.run))
        else:
            run = parent.info.run_id
        self._client.log_dict(run, dict(decision), f"promotion/{version.model}.json")
