"""Load trained planners by the name of their model in MLflow's registry, or from a folder of networks."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipelines.base.errors import UserError, did_you_mean
from pipelines.config.params import CandidateLaw, PlanSettings
from pipelines.environments import Array
from pipelines.planning.planner import Planner

USUAL = PlanSettings(rewards=("any",))
"""The settings of `plans` in params.yaml where it does not say otherwise."""


def load(
    model: str,
    reward: str,
    *,
    w: Array | None = None,
    law: CandidateLaw = "train",
    seed: int | None = None,
    device: str = "cpu",
    solver: str = USUAL.solver,
    steps: int = USUAL.steps,
    candidates: int = USUAL.candidates,
    samples: int = USUAL.samples,
    margin: float = USUAL.margin,
    every: int = USUAL.every,
    random: int = 0,
) -> Planner:
    """Load a trained planner, whose `act(state)` returns actions; reading its files cannot execute code.

    Args:
        model: A model as `pipelines.models.registry.load` takes it, such as `maze_goals.td2_cfm` or a folder.
        reward: Name of a reward of its environment.
        w: Default w_r of the task, (dw,). None: of policies drawn from the family, the one with the greatest return
            in the environment from its start states.
        law: D(W); see `fresh`.
        seed: Seed of the network; the first one by default.
        device: As in params.yaml.
        solver: ODE solver of the samples.
        steps: Number of solver steps.
        candidates: Number of candidates.
        samples: Samples per candidate.
        margin: Standard errors by which a candidate must exceed the default.
        every: Transitions between two plans.
        random: Seed of candidates and noise.

    Raises:
        UserError: There is no such model or reward, the model is not one of a family, or `w` is outside its law.
    """
    import torch

    from flowmatch_core.successor import GeometricHorizonModel
    from pipelines import environments
    from pipelines.base import layout
    from pipelines.base.device import resolve
    from pipelines.models import registry, saved
    from pipelines.planning import singles
    from pipelines.planning.choices import ByModel
    from pipelines.runs import versions

    with TemporaryDirectory() as scratch:
        folder = Path(model) if Path(model).is_dir() else versions.files(model, Path(scratch))
        network = registry.read(folder, model, seed=seed, device=device, solver=solver, steps=steps)
        meta = saved.meta(next(iter(layout.networks(folder).values())))
    if "family_of" not in meta or not isinstance(network, GeometricHorizonModel):
        raise UserError(
            f"the model {model!r} is not one of a family of policies; expected a flow that was trained in an "
            "environment with a family, such as maze_goals.td2_cfm."
        )
    environment = environments.restore(meta["family_of"])
    family = environment.family
    assert family is not None
    if reward not in environment.reward_names():
        known = environment.reward_names()
        raise UserError(f"no reward {reward!r}, expected one of {', '.join(known)}{did_you_mean(reward, known)}.")
    rng = np.random.default_rng(random)
    if w is None:
        w = singles.best(environment, family, [reward], USUAL.singles, rng)[reward]
    generator = torch.Generator(resolve(device)).manual_seed(random)
    choose = ByModel(network, lambda state: environment.rewards(state)[reward], samples, margin, generator)
    return Planner(family, choose, w, law, candidates=candidates, every=every, rng=rng)
