"""The successor model of a method: trained, or in closed form where the environment has one."""

from __future__ import annotations

from pathlib import Path

import torch

from flowmatch_core.successor import GeometricHorizonModel
from pipelines import members, models, store
from pipelines.params import Environment, SuccessorEvaluation, SuccessorMethod, SuccessorSample


def horizon_model(
    folder: Path,
    seed: int,
    environment: Environment,
    choice: SuccessorMethod,
    device: torch.device,
    sampling: SuccessorSample | SuccessorEvaluation,
) -> GeometricHorizonModel | str:
    """The successor model of one seed, trained or in closed form, or the reason why there is none."""
    if choice.loss != "oracle":
        return models.load_successor(folder / f"seed{seed}.safetensors", device, sampling.solver, sampling.steps)
    skipped = store.read_json(folder / "oracle.json")["skipped"]
    if skipped is not None:
        return str(skipped)
    built = members.load("pipelines.environments", environment.kind).build(environment.settings())
    mdp = built.oracle().to(device, torch.float32)
    field = mdp.velocity_field(environment.gamma, models.path(choice.path))
    return GeometricHorizonModel(
        field,
        (len(built.state_names),),
        gamma=environment.gamma,
        solver=sampling.solver,
        steps=sampling.steps,
    )
