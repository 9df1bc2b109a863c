"""What can be known to fail before any stage runs, checked where there is work to do."""

from __future__ import annotations

from pipelines import members
from pipelines.errors import UserError
from pipelines.params import ORACLE, Params


def check(params: Params) -> None:
    """Look for the device, build every path, coupling and loss, and look up every reward.

    Raises:
        UserError: with the key of `params.yaml` that cannot work here.
    """
    import numpy as np

    from pipelines import models, training

    training.device(params.device)
    for density in params.density.methods.values():
        models.path(density.path)
        models.density_loss(density)
    for successor in params.successor.methods.values():
        models.successor_path(successor.path)
    for name, entry in params.environments.items():
        for method, successor in params.successor.methods.items():
            if entry.runs(method) and successor.loss.name != ORACLE:
                fit = params.successor.fit_for(entry, successor)
                models.successor_loss(successor.loss, fit)
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
