"""Checks that report errors of stages before the first stage runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flowmatch_core.successor import Transitions
from pipelines import environments
from pipelines.base import device
from pipelines.base.errors import UserError, first_line
from pipelines.config.catalog import ORACLE
from pipelines.config.params import Choice, DensityMethod, EnvironmentEntry, Params, SuccessorFit, SuccessorMethod
from pipelines.environments import Environment, Process
from pipelines.models import build, density, successor
from pipelines.runs import sources


def check(params: Params) -> None:
    """Check the device, every path, coupling, loss and reward, the options of losses, and the sources of data sets.

    Raises:
        UserError: A key of `params.yaml` cannot work here; the message names it.
    """
    device.resolve(params.device)
    for name, method in params.density.methods.items():
        if method.has_field:
            build.path(method.path)
            _check_objective(f"density.methods.{name}.loss", method)
            if method.tune is not None:
                _check_objective(f"density.methods.{name}.tune.loss", method.tuned())
    for choice in params.successor.methods.values():
        successor.path(choice.path)
    for name, entry in params.environments.items():
        built = _built(name, entry)
        # the episodes of a log have the lengths that they have
        _check_methods(params, name, entry, entry.length if isinstance(built, Environment) else None)
        rewards = built.reward_names()
        if entry.reward is not None and entry.reward not in rewards:
            raise UserError(
                f"params.yaml: environments.{name}.reward is {entry.reward!r}; "
                f"{entry.kind} has {', '.join(map(repr, rewards))}."
            )
    sources.find(params)


def _built(name: str, entry: EnvironmentEntry) -> Process:
    try:
        built = environments.build(entry.kind, entry.settings())
    except UserError as error:
        raise UserError(f"params.yaml: environments.{name}: {error}") from None
    if entry.transitions is None and isinstance(built, Environment) and built.available() is None:
        raise UserError(
            f"params.yaml: environments.{name}.transitions is all, and {entry.kind} draws as many as it is asked for; "
            "expected a number."
        )
    return built


def _check_methods(params: Params, name: str, entry: EnvironmentEntry, length: int | None) -> None:
    for method, choice in params.successor.methods.items():
        if not entry.runs(method) or choice.loss.name == ORACLE:
            continue
        fit = params.successor.fit_for(entry, choice)
        successor.loss(choice.loss, fit)
        successor.discounts(fit, entry.gamma)
        _try(f"successor.methods.{method}.loss", choice.loss, partial(_successor_step, choice, fit))
        if length is not None and fit.returns > length:
            raise UserError(
                f"params.yaml: returns is {fit.returns} for {method} in {name}, whose rollouts have "
                f"{length} steps; expected no more: raise environments.{name}.length or lower returns."
            )


def _check_objective(key: str, method: DensityMethod) -> None:
    density.objective(method)
    _try(key, method.loss, partial(_density_step, method))


def _try(key: str, choice: Choice, step: Callable[[], object]) -> None:
    """Run a step of a loss whose options are set, because only the loss can check their values."""
    if not choice.arguments:
        return
    try:
        step()
    except Exception as error:
        raise UserError(
            f"params.yaml: {key} was given {choice.arguments}, with which a step fails: {first_line(error)}"
        ) from error


def _density_step(method: DensityMethod) -> None:
    density.objective(method)(lambda t, x, cond=None: x, build.path(method.path), torch.zeros(2, 1))


def _successor_step(method: SuccessorMethod, fit: SuccessorFit) -> None:
    spec, loss, path = method.loss.spec, successor.loss(method.loss, fit), successor.path(method.path)
    config = successor.network_config(method.loss, fit, event_dim=1, cond_dim=2)
    network, x = successor.network(config, spec.prediction, path), torch.zeros(2, 1)
    batch = Transitions(x, x, x, x)
    if spec.needs != "target":
        loss(network, batch, *([x] if spec.needs == "futures" else []))
        return
    now: dict[str, Any] = {"progress": 0.0} if spec.progress else {}
    loss(network, network, batch, gamma=0.5, **now)
