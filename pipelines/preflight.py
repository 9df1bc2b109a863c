"""What can be known to fail before any stage runs, checked where there is work to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from pipelines import members
from pipelines.errors import UserError, first_line
from pipelines.params import ORACLE, Choice, DensityMethod, Params, SuccessorFit, SuccessorMethod


def check(params: Params) -> None:
    """Look for the device, build every path, coupling and loss, try the arguments of losses, and look up every reward.

    Raises:
        UserError: with the key of `params.yaml` that cannot work here.
    """
    import numpy as np

    from pipelines import models, training

    training.device(params.device)
    for name, density in params.density.methods.items():
        models.path(density.path)
        models.density_loss(density)
        _try(f"density.methods.{name}.loss", density.loss, partial(_density_step, density))
    for successor in params.successor.methods.values():
        models.successor_path(successor.path)
    for name, entry in params.environments.items():
        for method, successor in params.successor.methods.items():
            if entry.runs(method) and successor.loss.name != ORACLE:
                fit = params.successor.fit_for(entry, successor)
                models.successor_loss(successor.loss, fit)
                step = partial(_successor_step, successor, fit)
                _try(f"successor.methods.{method}.loss", successor.loss, step)
                if fit.returns > entry.length:
                    raise UserError(
                        f"params.yaml: returns is {fit.returns} for {method} in {name}, whose rollouts have "
                        f"{entry.length} steps; expected no more: raise environments.{name}.length or lower returns."
                    )
        built = members.load("pipelines.environments", entry.kind).build(entry.settings())
        rewards = built.rewards(built.starts(np.random.default_rng(0), 1))
        if entry.reward not in rewards:
            raise UserError(
                f"params.yaml: environments.{name}.reward is {entry.reward!r}; "
                f"{entry.kind} has {', '.join(map(repr, rewards))}."
            )
    for dataset in params.datasets.values():
        member = members.load("pipelines.datasets", dataset.kind)
        if hasattr(member, "check"):
            member.check(params.mirror)


def _try(key: str, choice: Choice, step: Callable[[], object]) -> None:
    """Take a step of a loss that is given arguments: which values it can use, it knows itself."""
    if not choice.arguments:
        return
    try:
        step()
    except Exception as error:
        raise UserError(
            f"params.yaml: {key} was given {choice.arguments}, with which a step fails: {first_line(error)}"
        ) from error


def _density_step(method: DensityMethod) -> None:
    import torch

    from pipelines import models

    models.density_loss(method)(lambda t, x, cond=None: x, models.path(method.path), torch.zeros(2, 1))


def _successor_step(method: SuccessorMethod, fit: SuccessorFit) -> None:
    import torch

    from flowmatch_core.successor import Transitions
    from pipelines import models

    loss, path = models.successor_loss(method.loss, fit), models.successor_path(method.path)
    config = models.successor_network_config(method.loss, fit, event_dim=1, cond_dim=2)
    network, x = models.successor_network(config, getattr(loss, "prediction", "state"), path), torch.zeros(2, 1)
    given = {"field": network, "target": network, "batch": Transitions(x, x, x, x), "future": x, "gamma": 0.5}
    loss(**{name: value for name, value in given.items() if name in inspect.signature(loss).parameters})
