"""Train density models: a velocity field by flow matching, a normalizing flow by likelihood, or a closed form."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from flowmatch_core.components import draw_component
from flowmatch_core.flow import Flow
from flowmatch_core.mixture import MixtureFlow
from flowmatch_core.times import StratifiedTime
from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.base.seeding import derived_seed
from pipelines.config import catalog
from pipelines.config.params import DensityFit, DensityMethod
from pipelines.models import build, density
from pipelines.models.untrained import not_listed
from pipelines.runs.context import Stage
from pipelines.training import closed_forms, distributed, loop
from pipelines.training.fit import Fitted, Job, Task, Tuning, fit_seeds
from pipelines.training.rows import Batch, Prepared, TrainingRows

VALIDATION = 2048
"""Draws of rows, times and noises in a validation loss; a smaller part is used several times."""

DESCRIBED = ("columns", "conditions", "types", "discrete", "constants")
"""What the description of a model repeats of its data set."""

Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]
"""`(network, rows, generator) -> loss`."""


def train(stage: Stage, dataset: str, method: str) -> None:
    """Train a density model of a data set, one network per seed, or write the reason why it has no network."""
    params, entry = stage.params.density, stage.params.datasets[dataset]
    nothing = not_listed(entry, dataset, method)
    if nothing is not None:
        nothing.write(stage, dataset, method)
        return
    choice = params.methods[method]
    job = DensityJob(dataset, method, params.fit_for(entry, choice), choice)
    fit_seeds(stage, job, params.seeds_for(entry, method))


@final
@dataclass(frozen=True)
class DensityJob(Job):
    """The training job of a density model.

    Attributes:
        choice: Loss of the method, and the path and the coupling of a velocity field.
    """

    fit: DensityFit
    choice: DensityMethod

    @property
    def quick(self) -> bool:
        """Whether the method is a closed form."""
        return self.choice.loss.name in catalog.CLOSED_FORMS

    def config(self) -> dict[str, Any]:
        """Return the data set and the method."""
        method = self.choice.model_dump(
            mode="json", exclude={"seeds", "fit"}, include=None if self.choice.has_field else {"loss"}
        )
        return {"dataset": self.data, "method": method}

    def inputs(self) -> list[Path]:
        """Return the training and validation rows and their provenance."""
        folder = layout.prepared(self.data)
        read = [layout.part(folder, "train"), layout.part(folder, "val"), layout.provenance(folder)]
        transforms = layout.marginals(folder)
        return [*read, transforms] if transforms.exists() else read

    def task(self, device: torch.device) -> Task | Fitted:
        """Create the training task of one seed, or fit its closed form."""
        data = Prepared(layout.prepared(self.data), 0.0 if self.quick else self.fit.whitening)
        described = {name: data.provenance[name] for name in DESCRIBED}
        loc, scale, whitening = data.units
        units = loc.to(device), scale.to(device)
        if self.quick:
            began = time.monotonic()
            form = self.choice.loss.spec.load()(data, **self.choice.loss.values())
            meta = {"kind": density.MIXTURE, "network": density.describe_mixture(form.network), **described}
            return Fitted(form.network, form.losses, time.monotonic() - began, *units, meta, data.marginals)
        self._check_dropout(data)
        rows = data.training(self.fit.batch, self.fit.rows_in_memory, device, self.fit.noise, self.fit.cond_dropout)
        self._check_coupling(data, rows)
        network, loss, meta = self._field(data) if self.choice.has_field else self._normalizing(*data.sizes)
        check = self._objective(data, self.choice, refined=True) if self.choice.has_field else loss
        validation = self._validation(data, check, self.fit, device)
        return Task(
            network.to(device),
            _terms(loss, rows),
            *units,
            {**meta, **described},
            rows.read.seek,
            validation=validation,
            marginals=data.marginals,
            whitening=None if whitening is None else whitening.to(device),
            tuning=self._tuning(data, rows, device),
        )

    def _tuning(self, data: Prepared, rows: TrainingRows, device: torch.device) -> Tuning | None:
        """Return the second phase of the training, if there is one."""
        if self.choice.tune is None:
            return None
        fit = self.choice.tune.fit(self.fit)
        if fit.batch != self.fit.batch:
            rows = data.training(fit.batch, fit.rows_in_memory, device, fit.noise, fit.cond_dropout)
        loss, check = (self._objective(data, self.choice.tuned(), refined=refined) for refined in (False, True))
        validation = replace(self._validation(data, check, fit, device), at_start=True)
        return Tuning(_terms(loss, rows), fit, validation, rows.read.seek)

    def _field(self, data: Prepared) -> tuple[nn.Module, Loss, dict[str, Any]]:
        """Return a velocity field, its loss and its description."""
        columns, size = data.sizes
        mixture = self._mixture(data)
        if mixture is not None:
            size += len(mixture.means)
        config = build.network_config(self.fit.network, columns, size, data.image)
        meta: dict[str, Any] = {"network": config, "path": self.choice.path.model_dump()}
        meta["prediction"] = self.choice.prediction
        network, loss = build.network(config), self._objective(data, self.choice)
        if mixture is None:
            return network, loss, meta
        assert self.choice.mixture is not None
        meta |= {"kind": density.COMPONENTS, "mixture": density.describe_mixture(mixture)}
        meta["likeliest"] = self.choice.mixture.likeliest
        return density.Components(mixture, network), loss, meta

    def _mixture(self, data: Prepared) -> MixtureFlow | None:
        """Fit the mixture inside whose components the field is trained, if the method has one."""
        given = self.choice.mixture
        if given is None:
            return None
        return closed_forms.large_mixture(data, given.components, given.rows, given.iterations).network

    def _objective(self, data: Prepared, choice: DensityMethod, *, refined: bool = False) -> Loss:
        """Return the loss of a velocity field, for training or `refined` for checks; see `density.objective`."""
        described = data.conditions.described
        numbers = any(one["kind"] == "number" for one in described)
        coupling = choice.coupling.given(numbers) if described else choice.coupling
        objective = density.objective(choice.model_copy(update={"coupling": coupling}), refined=refined)
        path, law = build.path(choice.path), build.times(self.fit.time)
        if not catalog.OBJECTIVES[choice.loss.name].path:

            def likelihood(network: nn.Module, rows: Batch, generator: torch.Generator) -> Tensor:
                field, x, cond = _seen(network, rows, generator)
                return objective(field, path, x, cond=cond, weight=rows.weight, generator=generator)

            return likelihood
        time = StratifiedTime(law) if self.fit.stratified else law

        def loss(network: nn.Module, rows: Batch, generator: torch.Generator) -> Tensor:
            _, x, cond = _seen(network, rows, generator)
            return objective(network, path, x, cond=cond, weight=rows.weight, time=time, generator=generator)

        return loss

    def _normalizing(self, columns: int, size: int) -> tuple[nn.Module, Loss, dict[str, Any]]:
        """Return a normalizing flow, its loss and its description."""
        choice = self.choice.loss
        config = build.describe(choice.name, catalog.NORMALIZING[choice.name], choice.values(), columns, size)

        def loss(network: nn.Module, rows: Batch, generator: torch.Generator) -> Tensor:
            flow = cast(Flow, network)  # whose other methods are not divided among processes
            value = -flow.log_prob(rows.x, rows.cond)
            return (value if rows.weight is None else rows.weight * value).mean()

        return density.normalizing(config), loss, {"kind": density.NORMALIZING, "network": config}

    def _validation(self, data: Prepared, loss: Loss, fit: DensityFit, device: torch.device) -> loop.Validation:
        """Return the checks of a network: the same draws at each of them, in batches as in training."""
        part = data.rows("val", VALIDATION).to(device, torch.float32)
        batches = torch.split(torch.arange(VALIDATION, device=device).remainder(len(part.x)), fit.batch)
        seed = derived_seed(torch.initial_seed(), "validation")

        @torch.no_grad()
        def value(network: nn.Module) -> float:
            generator = torch.Generator(device).manual_seed(seed)
            total = 0.0
            for index in batches:
                total += float(loss(network, part.at(index), generator)) * len(index)
            return total / VALIDATION

        return loop.Validation(value, fit.val_every, fit.patience)

    def _check_dropout(self, data: Prepared) -> None:
        """Check that zeros, which dropped conditions become, are no conditions.

        Raises:
            UserError: There are no conditions, or a number among them.
        """
        found = [one["name"] for one in data.conditions.described if one["kind"] == "number"]
        if self.fit.cond_dropout > 0 and (found or not data.conditions.size):
            what = f"has the number {found[0]!r} among its conditions, whose mean is 0" if found else "has no condition"
            raise UserError(
                f"params.yaml: cond_dropout is {self.fit.cond_dropout:g}, but the data set {self.data!r} {what}; "
                "expected 0, or words as conditions."
            )

    def _check_coupling(self, data: Prepared, rows: TrainingRows) -> None:
        """Check that the rows have what the coupling compares, and that it pairs rows of the right distribution.

        Raises:
            UserError: They do not.
        """
        coupling = self.choice.coupling
        key = f"params.yaml: density.methods.{self.method}.coupling is {coupling.name!r}"
        if coupling.reads_conditions and not data.conditions.size:
            raise UserError(
                f"{key}, which compares conditions, but the data set {self.data!r} has none; expected independent "
                "or minibatch_ot."
            )
        if rows.streamed and data.provenance["weight"] is not None and coupling.name != "independent":
            raise UserError(
                f"{key}, but the weights of the rows of {self.data!r} multiply the loss where these are streamed, and "
                f"a coupling would pair noise with rows of equal weight; expected independent, or a rows_in_memory of "
                f"at least the number of rows instead of {self.fit.rows_in_memory}."
            )


def _seen(network: nn.Module, rows: Batch, generator: torch.Generator) -> tuple[nn.Module, Tensor, Tensor | None]:
    """Return the undivided field, with rows and conditions as it sees them: inside a component drawn for each row."""
    whole = distributed.undivided(network)  # its divergence is another evaluation than its velocity
    if isinstance(whole, density.Components):
        return whole.field, *draw_component(whole.mixture, rows.x, rows.cond, generator)
    return whole, rows.x, rows.cond


def _terms(loss: Loss, rows: TrainingRows) -> loop.Step:
    """Return the terms of a step: the loss at the next batch."""

    def terms(
        network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
    ) -> Mapping[str, Tensor]:
        return {"loss": loss(network, rows.draw(generator), generator)}

    return terms
