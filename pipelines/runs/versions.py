"""Versions of models in MLflow's registry: their files, aliases and tags.

A version is made of the run of a training stage. Its name is `<data set or environment>.<method>`; that of another
profile than the default begins with the profile, so that a smoke run is not the latest model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.base.errors import UserError, did_you_mean, first_line
from pipelines.base.redact import redact
from pipelines.runs import records, store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL = "flowmatch.model"
"""Tag of a run that trained a model: `<data set or environment>.<method>`."""
_MODELS = 1000  # at most as many are listed in one request


def name_of(model: str, profile: str) -> str:
    """Return the name of a model in the registry.

    >>> name_of("spiral.td2_cfm", "default"), name_of("spiral.td2_cfm", "smoke")
    ('spiral.td2_cfm', 'smoke.spiral.td2_cfm')
    """
    return model if profile == "default" else f"{profile}.{model}"


def files(address: str, into: Path | None = None) -> Path:
    """Return the folder of a trained model's files, from its address in the registry or the run that trained it.

    Args:
        address: A name (see `resolve`), `models:/<name>/<version>`, `models:/<name>@<alias>`, or `runs:/<id of a
            training run>`.
        into: Folder to copy the files to; a new temporary one by default.

    Raises:
        UserError: There is no such model, or the address is invalid.
    """
    from mlflow.exceptions import MlflowException

    if ":/" not in address:
        address = resolve(address)
    kind, _, rest = address.partition(":/")
    name, alias = (rest.partition("@")[::2]) if "@" in rest else (rest.partition("/")[0], "")
    version = rest.partition("/")[2]
    if kind not in ("models", "runs") or not name or (kind == "models" and not (alias or version)):
        raise UserError(
            f"the model {address!r} is neither a name, such as moons.cfm, nor models:/<name>/<version>, nor "
            "models:/<name>@<alias> nor runs:/<id of a training run>."
        )
    client = store.open_existing(records.home()).client
    try:
        run = client.get_run(rest if kind == "runs" else str(_find(client, name, version, alias).run_id))
        model = run.data.tags.get(MODEL)
        if model is None:
            raise UserError(f"the run of {address!r} is {run.info.run_name}; expected one that trained a model.")
        return Path(client.download_artifacts(run.info.run_id, folder_of(model), str(into) if into else None))
    except (MlflowException, OSError) as error:
        said = redact(first_line(error))
        raise UserError(f"MLflow has no model {address!r} ({said}); see `make ui`.") from None


def resolve(name: str) -> str:
    """Return the address of the latest version of a model.

    Args:
        name: Name in the registry, without the profile if no other model's name ends in it.

    Raises:
        UserError: No model has the name, or several end in it.
    """
    client = store.open_existing(records.home()).client
    known = [model.name for model in client.search_registered_models(max_results=_MODELS)]
    found = [name] if name in known else [full for full in known if "." in name and full.endswith(f".{name}")]
    if len(found) > 1:
        raise UserError(f"{name!r} may be each of the models {', '.join(found)}; give one of these names.")
    if not found:
        raise unknown(client, name)
    return f"models:/{found[0]}/latest"


def folder_of(model: str) -> str:
    """Return the folder of a model's files among the artefacts of its run.

    >>> folder_of("spiral.td2_cfm")
    'td2_cfm'
    """
    return model.rpartition(".")[2]


def register(client: MlflowClient, model: str, profile: str, run: str, source: str, tags: Mapping[str, str]) -> None:
    """Register the model that a run trained as the next version of its name, once.

    Args:
        client: MLflow's client.
        model: Data set or environment, and method.
        profile: Profile of the run.
        run: Id of the run.
        source: Address of the run's artefacts.
        tags: Tags of the version.
    """
    from mlflow.exceptions import MlflowException

    name = name_of(model, profile)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not client.search_model_versions(f"run_id = '{run}'"):
        client.create_model_version(name, f"{source}/{folder_of(model)}", run, {"profile": profile, **tags})


def score(client: MlflowClient, run: str, metric: str, value: float, seeds: int) -> None:
    """Tag the versions that a run trained with their score: a mean over seeds, the smaller the better."""
    tags = {"score": f"{value:.6g}", "score_metric": metric, "score_seeds": str(seeds)}
    for version in client.search_model_versions(f"run_id = '{run}'"):
        for key, tag in tags.items():
            client.set_model_version_tag(version.name, version.version, key, tag)


def unknown(client: MlflowClient, name: str) -> UserError:
    """Return the error for a model that is not registered; it names those that are."""
    known = [model.name for model in client.search_registered_models(max_results=_MODELS)]
    return UserError(f"MLflow has no model {name!r}, only {', '.join(known) or 'none'}{did_you_mean(name, known)}")


def _find(client: MlflowClient, name: str, version: str, alias: str) -> ModelVersion:
    """Return a version of a registered model by its number, its alias, or as the latest."""
    if alias:
        return client.get_model_version_by_alias(name, alias)
    if version != "latest":
        return client.get_model_version(name, version)
    found = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if not found:
        raise unknown(client, name)
    return found[0]
