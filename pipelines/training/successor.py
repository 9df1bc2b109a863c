"""Train models of the successor measure of an environment's policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from flowmatch_core.paths import AffinePath
from flowmatch_core.successor import Loss, Particles
from pipelines.base import layout
from pipelines.config.params import SuccessorFit, SuccessorMethod
from pipelines.data.batches import Batches
from pipelines.models import build, successor
from pipelines.models.untrained import untrained
from pipelines.runs.context import Stage
from pipelines.training.fit import Job, Task, fit_seeds

Value = Callable[[nn.Module, nn.Module, torch.Generator, Mapping[str, float]], Loss]
"""`(network, averaged network, generator, {"progress": completed share of the steps} if the loss uses it) -> terms`."""


def train(stage: Stage, environment: str, method: str) -> None:
    """Train a successor model, one network per seed, or write the reason why it has no network."""
    entry, params = stage.params.environments[environment], stage.params.successor
    choice = params.methods[method]
    nothing = untrained(stage.params, environment, method)
    if nothing is not None:
        nothing.write(stage, environment, method)
        return
    fit = params.fit_for(entry, choice)
    fit_seeds(stage, SuccessorJob(environment, method, fit, choice, entry.gamma), params.seeds_for(entry, method))


@final
@dataclass(frozen=True)
class SuccessorJob(Job):
    """The training job of a successor model.

    A loss that needs `futures` receives on-policy future states; one that needs a `target`, transitions and the
    averaged network; one that needs `transitions`, them alone.

    Attributes:
        choice: Loss and path of the method.
        gamma: Discount per transition.
    """

    fit: SuccessorFit
    choice: SuccessorMethod
    gamma: float

    def config(self) -> dict[str, Any]:
        """Return the environment, the discount and the method."""
        return {"environment": self.data, "gamma": self.gamma, "method": self.choice.model_dump(mode="json")}

    def inputs(self) -> list[Path]:
        """Return the transitions, the rollouts, if there are any, and their provenance."""
        folder = layout.collected(self.data)
        paths = [layout.transitions(folder), layout.rollouts(folder), layout.provenance(folder)]
        return [path for path in paths if path.exists()]  # a log of another policy has no rollouts

    def task(self, device: torch.device) -> Task:
        """Create the training task of one seed."""
        spec, fit = self.choice.loss.spec, self.fit
        batches = Batches(layout.collected(self.data), device)
        path = successor.path(self.choice.path)
        memory: Particles | None = None
        seek: Callable[[int], None] = _nowhere
        if spec.needs == "futures":
            value = self._on_futures(batches, path)
        else:
            # a loss with a target network has two terms, with half of the batch each
            rows = fit.batch // 2 if spec.needs == "target" else fit.batch
            if fit.on_policy:
                draw = batches.returns(rows, self.gamma, fit.returns)
            else:
                draw, seek = batches.transitions(rows, fit.rows_in_memory)
            memory = _particles(fit, batches, path).to(device) if fit.particles else None
            value = self._on_transitions(draw, path, memory)

        def terms(
            network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
        ) -> Mapping[str, Tensor]:
            now = {"progress": progress} if spec.progress else {}
            total, direct, bootstrap = value(network, average, generator, now)
            return {"loss": total, "direct": direct, "bootstrap": bootstrap}

        states, actions = len(batches.states), len(batches.actions)
        config = successor.network_config(self.choice.loss, fit, states, states + actions)
        meta = {
            "network": config,
            "path": self.choice.path.model_dump(),
            "prediction": spec.prediction,
            "gamma": self.gamma,
            "terminal": batches.ends,
            **batches.described,
        }
        network = successor.network(config, spec.prediction, path).to(device)
        return Task(network, terms, batches.loc, batches.scale, meta, seek, memory)

    def _on_futures(self, batches: Batches, path: AffinePath) -> Value:
        loss, options = successor.loss(self.choice.loss, self.fit), self._flow_options(path)
        pairs = batches.futures(self.fit.batch, self.gamma)

        def value(network: nn.Module, average: nn.Module, generator: torch.Generator, now: Mapping[str, float]) -> Loss:
            batch, future = pairs(generator)
            return loss(network, batch, future, **options, **now, generator=generator)

        return value

    def _on_transitions(self, draw: Callable[..., Any], path: AffinePath, memory: Particles | None) -> Value:
        loss = successor.loss(self.choice.loss, self.fit)
        if self.choice.loss.spec.needs == "transitions":
            return lambda network, average, generator, now: loss(network, draw(generator), **now, generator=generator)
        options: dict[str, Any] = {"gamma": self.gamma, **self._flow_options(path)}
        if memory is not None:
            loss, options = memory.td2_cfm_loss, {"gamma": self.gamma}
        elif self.choice.loss.spec.ode:
            options |= {"steps": self.fit.ode_steps, "solver": self.fit.ode_solver}

        def value(network: nn.Module, average: nn.Module, generator: torch.Generator, now: Mapping[str, float]) -> Loss:
            return loss(network, average, draw(generator), **options, **now, generator=generator)

        return value

    def _flow_options(self, path: AffinePath) -> dict[str, Any]:
        if not self.choice.loss.spec.path:
            return {}
        return {"path": path, "time": build.times(self.fit.time)}


def _particles(fit: SuccessorFit, batches: Batches, path: AffinePath) -> Particles:
    state, action = len(batches.states), len(batches.actions)
    return Particles(fit.batch // 2, state, state + action, fit.ode_steps, time=build.times(fit.time), path=path)


def _nowhere(step: int) -> None:
    """Do nothing, for data that are drawn at random and have no position."""
