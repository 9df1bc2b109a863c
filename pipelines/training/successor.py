"""Train models of the successor measure of an environment's policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from flowmatch_core.paths import AffinePath
from flowmatch_core.successor import Discounts, Loss, Particles, Transitions, with_discount
from pipelines.base import layout
from pipelines.config.params import SuccessorFit, SuccessorMethod
from pipelines.data.batches import Batches, Draw
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
            if fit.on_policy:
                draw = batches.returns(self._rows, self.gamma, fit.returns)
            else:
                single, seek = batches.transitions(self._rows, fit.rows_in_memory)
                draw = _at_any_discount(single)
            memory = self._particles(batches, path).to(device) if fit.particles else None
            value = self._on_transitions(draw, path, memory)

        def terms(
            network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
        ) -> Mapping[str, Tensor]:
            now = {"progress": progress} if spec.progress else {}
            total, direct, bootstrap = value(network, average, generator, now)
            return {"loss": total, "direct": direct, "bootstrap": bootstrap}

        config = successor.network_config(self.choice.loss, fit, len(batches.states), self._cond_dim(batches))
        meta = {
            "network": config,
            "path": self.choice.path.model_dump(),
            "prediction": spec.prediction,
            "gamma": self.gamma,
            "discounts": None if fit.discounts is None else fit.discounts.model_dump(),
            "terminal": batches.ends,
            **batches.described,
        }
        network = successor.network(config, spec.prediction, path).to(device)
        return Task(network, terms, batches.loc, batches.scale, meta, seek, memory)

    def _on_futures(self, batches: Batches, path: AffinePath) -> Value:
        loss, options = successor.loss(self.choice.loss, self.fit), self._flow_options(path)
        pairs = batches.futures(self.fit.batch, self.gamma)

        def value(network: nn.Module, average: nn.Module, generator: torch.Generator, now: Mapping[str, float]) -> Loss:
            gamma = self._discount(generator)
            batch, future = pairs(generator, gamma)
            return loss(network, _conditioned(batch, gamma), future, **options, **now, generator=generator)

        return value

    def _on_transitions(self, draw: Callable[..., Transitions], path: AffinePath, memory: Particles | None) -> Value:
        loss, single = successor.loss(self.choice.loss, self.fit), self.choice.loss.spec.needs == "transitions"
        options: dict[str, Any] = self._flow_options(path)
        if memory is not None:
            loss, options = memory.td2_cfm_loss, {}
        elif self.choice.loss.spec.ode:
            options |= {"steps": self.fit.ode_steps, "solver": self.fit.ode_solver}

        def value(network: nn.Module, average: nn.Module, generator: torch.Generator, now: Mapping[str, float]) -> Loss:
            gamma = self._discount(generator)
            batch = _conditioned(draw(generator, gamma), gamma)
            if single:
                return loss(network, batch, **now, generator=generator)
            return loss(network, average, batch, gamma=gamma, **options, **now, generator=generator)

        return value

    def _flow_options(self, path: AffinePath) -> dict[str, Any]:
        if not self.choice.loss.spec.path:
            return {}
        return {"path": path, "time": build.times(self.fit.time)}

    @property
    def _rows(self) -> int:
        """Number of rows of a batch; a loss with a target network has two terms, with half of the batch each."""
        return self.fit.batch // 2 if self.choice.loss.spec.needs == "target" else self.fit.batch

    @cached_property
    def _discounts(self) -> Discounts | None:
        return successor.discounts(self.fit, self.gamma)

    def _discount(self, generator: torch.Generator) -> float | Tensor:
        """Return the environment's discount, or one drawn for every row."""
        if self._discounts is None:
            return self.gamma
        return self._discounts.sample(self._rows, generator=generator, device=generator.device)

    def _cond_dim(self, batches: Batches) -> int:
        features = 0 if self._discounts is None else self._discounts.FEATURES
        return len(batches.states) + len(batches.actions) + features

    def _particles(self, batches: Batches, path: AffinePath) -> Particles:
        sizes = self._rows, len(batches.states), self._cond_dim(batches), self.fit.ode_steps
        return Particles(*sizes, time=build.times(self.fit.time), path=path)


def _at_any_discount(draw: Draw) -> Callable[..., Transitions]:
    """Return a function that also takes a discount, on which single transitions do not depend."""
    return lambda generator, gamma: draw(generator)


def _conditioned(batch: Transitions, gamma: float | Tensor) -> Transitions:
    """Return the batch for a network that is conditioned on the discount where every row has its own."""
    return with_discount(batch, gamma) if isinstance(gamma, Tensor) else batch


def _nowhere(step: int) -> None:
    """Do nothing, for data that are drawn at random and have no position."""
