"""The schema of `params.yaml`, which is read only here.

Every value that a user may change is declared here with its range. An invalid value is reported before anything runs,
in one sentence that names the key, what was found and what was expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipelines.base import plugins
from pipelines.base.errors import UserError
from pipelines.base.plugins import Settings
from pipelines.config import catalog
from pipelines.config.catalog import ORACLE, LossSpec, NetworkSpec, Share, Spec
from pipelines.config.messages import sentence
from pipelines.config.operation import Operation
from pipelines.config.yaml_files import merge, read_yaml

Solver = Literal["euler", "midpoint", "heun", "rk4", "dopri5"]
FixedSolver = Literal["euler", "midpoint", "heun", "rk4"]
LikelihoodSolver = Literal[FixedSolver, "adams"]
CandidateLaw = Literal["random", "local", "train"]
PAGE_PARTS = frozenset({"results", "densities", "tables", "environments", "run", "parameters"})
"""Anchors of the report, beside those of entries."""
REFERENCES = {
    "floor": "the sampling floor",
    "truth": "the true samples",
    "single": "the best single policy",
    "simulation": "planning by simulation",
    "expert": "the scripted policy",
}
"""What stands beside methods in tables and pictures."""
NEAR = 100.0  # weight of a change of condition in the cost of a coupling; a larger one exchanges fewer rows
LONGEST_KEY = 250  # characters of the name of a parameter in MLflow
M = TypeVar("M", bound=BaseModel)


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("expected every seed once")
    return seeds


def _plugin_of(family: str) -> AfterValidator:
    def check(name: str) -> str:
        plugins.check(family, name)
        return name

    return AfterValidator(check)


def _row_of(table: Mapping[str, Spec], *others: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in others:
            catalog.find(table, name, *others)
        return name

    return AfterValidator(check)


Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1), AfterValidator(_different)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]  # a folder, part of stage names and options


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("it should be auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(_device)]


class Choice(BaseModel):
    """An entry of the catalog with options; a name alone selects the defaults."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Any]  # checked by `settings`
    name: str

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        """Options that are set, unconverted."""
        return dict(self.__pydantic_extra__)

    def values(self) -> dict[str, Any]:
        """Return the options that are set, converted to their types."""
        return self.settings().model_validate(self.arguments).model_dump(exclude_unset=True)

    def options(self) -> Mapping[str, Any]:
        """Return the types of the available options by name."""
        raise NotImplementedError

    def settings(self) -> type[BaseModel]:
        """Return the schema of the options."""
        fields: dict[str, Any] = {name: (kind, None) for name, kind in self.options().items()}
        return create_model(self.name, __base__=Settings, **fields)


def _network(name: str) -> str:
    try:
        catalog.find(catalog.NETWORKS, name)
    except ValueError as error:
        raise ValueError(f"expected a network of vectors: {str(error).removeprefix('expected ')}") from None
    return name


class NetworkChoice(Choice):
    """A network for vectors, a class in `flowmatch_core/networks/`."""

    name: Annotated[str, AfterValidator(_network)]

    @property
    def spec(self) -> NetworkSpec:
        """Entry of the catalog."""
        return catalog.NETWORKS[self.name]

    def options(self) -> Mapping[str, Any]:
        """Return the types of the network's options by name."""
        return self.spec.options

    def __str__(self) -> str:
        widths = next((value for value in self.arguments.values() if isinstance(value, (list, tuple))), ())
        return f"{self.name} {'×'.join(map(str, widths))}".rstrip()


class TimeChoice(Choice):
    """A law of the flow times in a loss, a class in `flowmatch_core/times.py`."""

    name: Annotated[str, _row_of(catalog.TIMES)]

    @property
    def spec(self) -> Spec:
        """Entry of the catalog."""
        return catalog.TIMES[self.name]

    def options(self) -> Mapping[str, Any]:
        """Return the types of the law's options by name."""
        return self.spec.options


class DiscountsChoice(Choice):
    """A law of discounts on [low, high], a class in `flowmatch_core/successor/discounts.py`."""

    name: Annotated[str, _row_of(catalog.DISCOUNTS)]

    @property
    def spec(self) -> Spec:
        """Entry of the catalog."""
        return catalog.DISCOUNTS[self.name]

    def options(self) -> Mapping[str, Any]:
        """Return the types of the law's options by name."""
        return self.spec.options


class Fit(Settings):
    """A network and its training."""

    network: NetworkChoice
    steps: int = Field(ge=1, description="gradient steps")
    batch: int = Field(ge=2, description="rows per gradient step")
    lr: float = Field(gt=0, description="peak learning rate; linear warm-up, then a cosine to lr_end")
    lr_end: float = Field(default=0.0, ge=0, le=1, description="final learning rate, as a share of lr")
    warmup: int = Field(ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(ge=0, description="AdamW's decoupled decay")
    adam_betas: tuple[Share, Share] = Field(description="AdamW's decay of the mean gradient and of the mean square")
    adam_beta2_end: Share | None = Field(
        default=None, description="final decay of the mean square, reached linearly; null: constant"
    )
    adam_eps: float = Field(gt=0, description="AdamW's epsilon")
    clip: float | None = Field(
        default=None, gt=0, description="largest norm of the gradient, which is scaled down to it; null: any"
    )
    ema_step: float = Field(gt=0, le=1, description="weight of the newest weights in the averaged network, per step")
    ema_ramp: float | None = Field(
        default=None,
        ge=1,
        description="r, for a larger weight of the newest weights at first: max(ema_step, 1 - (1 + n) / (r + n)) at "
        "step n; null: ema_step at every step",
    )
    time: TimeChoice = Field(
        default=TimeChoice.model_validate("uniform"), description="law of the flow times in the loss"
    )
    log_every: int = Field(ge=1, description="steps between two rows of the loss curve")
    rows_in_memory: int = Field(
        default=2_000_000, ge=2, description="training rows in memory; a longer table is streamed from disk"
    )


class DensityFit(Fit):
    """A network, its training, and the checks on validation rows by which it is chosen."""

    stratified: bool = Field(
        default=False, description="flow times with one draw in each of as many quantile intervals as a batch has rows"
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        description="standard deviation of the Gaussian noise that is added to the standardised training rows",
    )
    cond_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability with which training drops the conditions of a row, for `sample.guidance`; words alone",
    )
    whitening: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="strength of a whitening of the standardised rows: their principal components are divided by their "
        "standard deviations to this power; 0: none",
    )
    val_every: int = Field(
        default=50,
        ge=1,
        description="steps between two checks of the averaged network on validation rows; the best one is kept",
    )
    patience: int | None = Field(
        default=None, ge=1, description="checks without an improvement before training stops; null: it does not stop"
    )


class SuccessorFit(Fit):
    """A network, its training and its bootstrap targets; settings that a loss does not use are ignored."""

    ode_solver: Literal[FixedSolver, "ddim"] = Field(description="solver of the bootstrap; ddim for noise predictions")
    ode_steps: int = Field(ge=1, description="solver steps per bootstrap target")
    returns: int = Field(
        ge=1,
        description="steps between a state and its bootstrap. Above 1 training uses the rollouts instead of the "
        "transitions, because n-step returns are exact only on policy",
    )
    rollouts: bool = Field(
        default=False,
        description="train on the policy's rollouts in place of the transitions with one-step returns too",
    )
    particles: bool = Field(
        description="TD²-CFM with bootstrap points that persist between gradient steps, one target evaluation each; "
        "for large networks. A path has ode_steps points"
    )
    discounts: DiscountsChoice | None = Field(
        default=None,
        description="law of the discount of a row, for one model of many discounts, such as {name: uniform, low: 0.5, "
        "high: 0.95}; the environment's gamma should be among them, and ema_step * (1 - high) * steps at least 5; "
        "null: the environment's gamma alone",
    )

    @property
    def on_policy(self) -> bool:
        """Whether a bootstrapping loss is trained on the policy's rollouts."""
        return self.rollouts or self.returns > 1


class PathChoice(Choice):
    """A probability path, a class in `flowmatch_core/paths/`."""

    name: Annotated[str, _row_of(catalog.PATHS)]

    @property
    def spec(self) -> Spec:
        """Entry of the catalog."""
        return catalog.PATHS[self.name]

    def options(self) -> Mapping[str, Any]:
        """Return the types of the path's options by name."""
        return self.spec.options


class CouplingChoice(Choice):
    """A coupling of noise and data, a class in `flowmatch_core/couplings/`."""

    name: Annotated[str, _row_of(catalog.COUPLINGS)]

    @property
    def spec(self) -> Spec:
        """Entry of the catalog."""
        return catalog.COUPLINGS[self.name]

    def options(self) -> Mapping[str, Any]:
        """Return the types of the coupling's options by name."""
        return self.spec.options

    @property
    def reads_conditions(self) -> bool:
        """Whether the coupling compares conditions, so that it needs some."""
        return float(self.arguments.get("weight", self.name == "conditional_ot")) > 0

    def given(self, numbers: bool) -> CouplingChoice:
        """Return the coupling for rows with conditions, which pairs noise with rows of equal or similar conditions.

        One that does not compare conditions would make the noise depend on them.

        Args:
            numbers: Whether a condition is a number; numbers are rarely equal, so that their differences get a weight.
        """
        if self.name == "independent" or self.reads_conditions:
            return self
        if self.name == "minibatch_ot":
            weight = {"weight": NEAR} if numbers else {}
            return CouplingChoice.model_validate({"name": "conditional_ot", **weight})
        return CouplingChoice.model_validate({"name": self.name, **self.arguments, "weight": NEAR})


class GridChoice(Choice):
    """A grid of times, a class in `flowmatch_core/solvers/grids.py`."""

    name: Annotated[str, _row_of(catalog.GRIDS)]

    @property
    def spec(self) -> Spec:
        """Entry of the catalog."""
        return catalog.GRIDS[self.name]

    def options(self) -> Mapping[str, Any]:
        """Return the types of the grid's options by name."""
        return self.spec.options


class LossChoice(Choice):
    """An objective of a velocity field, a function in `flowmatch_core/objectives/`, or a density of another kind.

    The other kinds are the normalizing flows of `flowmatch_core/normalizing/` and the closed forms of
    `pipelines/training/closed_forms.py`.
    """

    name: Annotated[str, _row_of(catalog.DENSITIES)]

    @property
    def spec(self) -> Spec:
        """Entry of the catalog."""
        return catalog.DENSITIES[self.name]

    def options(self) -> Mapping[str, Any]:
        """Return the types of the options by name."""
        grid = {"grid": GridChoice} if "grid" in self.spec.options else {}
        return {**self.spec.options, **grid}

    @property
    def grid(self) -> GridChoice | None:
        """Grid of times among the options, if it is set."""
        found = self.arguments.get("grid")
        return None if found is None else GridChoice.model_validate(found)


class Tune(Settings):
    """A second phase of training, which goes on from the network that the first one kept."""

    loss: LossChoice
    steps: int = Field(ge=1, description="gradient steps")
    batch: int = Field(ge=2, description="rows per gradient step")
    lr: float = Field(gt=0, description="peak learning rate")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    val_every: int = Field(default=10, ge=1, description="steps between two checks on validation rows")
    ema_step: float | None = Field(
        default=None, gt=0, le=1, description="weight of the newest weights in the average; null: as in the first phase"
    )

    @field_validator("loss")
    @classmethod
    def _trains_a_field(cls, loss: LossChoice) -> LossChoice:
        if loss.name not in catalog.OBJECTIVES:
            raise ValueError(f"expected a loss of a velocity field: {', '.join(catalog.OBJECTIVES)}")
        return loss

    def fit(self, first: DensityFit) -> DensityFit:
        """Return the settings of this phase, those of the first one where it has none of its own."""
        return first.model_copy(update=self.model_dump(exclude={"loss"}, exclude_none=True))


_INDEPENDENT = CouplingChoice.model_validate("independent")


class MixtureSettings(Settings):
    """A mixture of Gaussians that is fitted before the velocity field, which learns what is left in each component."""

    components: int = Field(48, ge=1, description="number of components")
    rows: int = Field(250_000, ge=1, description="maximum number of training rows that it is fitted to")
    iterations: int = Field(12, ge=1, description="steps of expectation maximisation")
    likeliest: int | None = Field(
        default=3,
        ge=1,
        description="components of the largest posterior that a log-density is summed over, which makes it a lower "
        "bound; null: all",
    )


class DensityMethod(Settings):
    """A method for density models: path, coupling and loss, each a file of that name in `flowmatch_core`.

    A density of another kind than a velocity field has neither path nor coupling, but its `loss` alone.
    """

    path: PathChoice = Field(default=PathChoice.model_validate("cond_ot"), description="path between noise and data")
    coupling: CouplingChoice = Field(default=_INDEPENDENT, description="which noise belongs to which data")
    loss: LossChoice
    prediction: Literal["velocity", "noise", "data", "score"] = Field(
        default="velocity", description="output of the network"
    )
    tune: Tune | None = Field(
        default=None,
        description="a second phase with another loss; its network is kept if its loss on the validation rows is lower "
        "than that of the first phase's network",
    )
    mixture: MixtureSettings | None = Field(
        default=None, description="mixture of Gaussians inside whose components the field is trained; null: none"
    )
    seeds: Seeds | None = Field(default=None, description="seeds of this method in place of those of its data sets")
    fit: dict[str, Any] = Field(default={}, description="changes to the common `fit` for this method")

    @property
    def has_field(self) -> bool:
        """Whether the method trains a velocity field."""
        return self.loss.name in catalog.OBJECTIVES

    def tuned(self) -> DensityMethod:
        """Return the method of the second phase; a loss that draws its noise itself has no coupling."""
        assert self.tune is not None
        coupling = self.coupling if catalog.OBJECTIVES[self.tune.loss.name].coupling else _INDEPENDENT
        return self.model_copy(update={"loss": self.tune.loss, "coupling": coupling, "tune": None})

    @model_validator(mode="after")
    def _only_a_field_has_a_path(self) -> DensityMethod:
        fields = type(self).model_fields  # a default is accepted, as `model_dump` writes it too
        needless = sorted(name for name, field in fields.items() if getattr(self, name) != field.default)
        needless = [name for name in needless if name not in ("loss", "seeds", "fit")]
        if needless and not self.has_field:
            raise ValueError(
                f"the loss {self.loss.name!r} trains no velocity field, so it has no {needless[0]}; "
                f"expected {{loss: {self.loss.name}}} without {needless[0]}"
            )
        return self


class SuccessorLossChoice(Choice):
    """A successor loss, a function in `flowmatch_core/successor/losses/`, or `oracle` for the closed form.

    A loss that defines its own network (gan, vae) also accepts the options of that network.
    """

    name: Annotated[str, _row_of(catalog.SUCCESSOR_LOSSES, ORACLE)]

    @property
    def spec(self) -> LossSpec:
        """Entry of the catalog; the closed form has none."""
        return catalog.SUCCESSOR_LOSSES[self.name]

    def options(self) -> Mapping[str, Any]:
        """Return the types of the loss's options by name, with those of its own network; the closed form has none."""
        return {} if self.name == ORACLE else self.spec.all_options


class SuccessorMethod(Settings):
    """A method for obtaining a successor model."""

    loss: SuccessorLossChoice
    path: PathChoice = Field(
        default=PathChoice.model_validate("cond_ot"), description="the path; gan and vae have none"
    )
    seeds: Seeds | None = Field(default=None, description="seeds of this method in place of those of its environments")
    fit: dict[str, Any] = Field(default={}, description="changes to the common `fit` for this method")


class Entry(BaseModel):
    """An entry whose `kind` names a plugin; the plugin's `Settings` validate the keys that are not declared here."""

    model_config = ConfigDict(extra="allow", frozen=True)
    family: ClassVar[str]
    kind: str

    @property
    def own(self) -> dict[str, Any]:
        """Keys that the plugin's own `Settings` declare."""
        return self.__pydantic_extra__ or {}

    def settings(self) -> Any:
        """Return the validated settings of the plugin."""
        return plugins.load(self.family, self.kind).Settings.model_validate(self.own)


class Trained(Entry):
    """A data set or an environment, on which models are trained."""

    fit: dict[str, Any] = Field(default={}, description="changes to the common `fit` for this entry")
    methods: tuple[Name, ...] | None = Field(
        default=None,
        min_length=1,
        description="methods of its family to run here, all by default; a change reruns this entry's stages, as a "
        "change of any key here does",
    )
    seeds: Seeds | None = Field(
        default=None, description="seeds of the methods here in place of the common ones; those of a method come first"
    )

    def runs(self, method: str) -> bool:
        """Return whether a method is trained and evaluated here."""
        return self.methods is None or method in self.methods


class ExperimentEntry(Entry):
    """An experiment, a plugin of `pipelines/experiments/`."""

    family: ClassVar[str] = "pipelines.experiments"
    kind: Annotated[str, _plugin_of("pipelines.experiments")]


class DatasetEntry(Trained):
    """A data set, a plugin of `pipelines/datasets/`."""

    family: ClassVar[str] = "pipelines.datasets"
    kind: Annotated[str, _plugin_of("pipelines.datasets")]
    sample: dict[str, Any] = Field(default={}, description="changes to `density.sample` for this data set")
    evaluate: dict[str, Any] = Field(default={}, description="changes to `density.evaluate` for this data set")

    @property
    def has_conditions(self) -> bool:
        """Whether models of the data set are conditional: the `condition` among the settings of its kind."""
        return bool(getattr(self.settings(), "condition", ()))


_UNSAID: Any = object()
"""Default of a key that a kind must have a default for."""


def _of_kind(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Return the value of a key, where the `DEFAULTS` of the plugin may stand for one that is not there."""
    kind, key = info.data.get("kind"), str(info.field_name)
    defaults = getattr(plugins.load(EnvironmentEntry.family, kind), "DEFAULTS", {}) if kind else {}
    if value is _UNSAID and key not in defaults:
        raise PydanticCustomError("missing", "Field required")
    value = defaults[key] if value is _UNSAID else value
    if key == "transitions" and value == "all":
        return None
    if value is None and (key == "transitions" or key not in defaults):
        raise ValueError("it should be a value, which only recorded episodes have themselves")
    return handler(value)


_OF_KIND = WrapValidator(_of_kind)


class EnvironmentEntry(Trained):
    """An environment, a plugin of `pipelines/environments/`."""

    family: ClassVar[str] = "pipelines.environments"
    kind: Annotated[str, _plugin_of("pipelines.environments")]
    gamma: Annotated[float, Field(ge=0, lt=1), _OF_KIND] = Field(
        default=_UNSAID, validate_default=True, description="discount, per transition"
    )
    transitions: Annotated[int | None, Field(ge=2), _OF_KIND] = Field(
        default=_UNSAID,
        validate_default=True,
        description="offline transitions to collect; all: every recorded one, where they are recorded",
    )
    rollouts: Annotated[int | None, Field(ge=2), _OF_KIND] = Field(
        default=_UNSAID,
        validate_default=True,
        description="on-policy episodes for Monte-Carlo training; null: those of the log",
    )
    length: Annotated[int | None, Field(ge=2), _OF_KIND] = Field(
        default=_UNSAID,
        validate_default=True,
        description="transitions per rollout. The truncated mass of a horizon, gamma^length in evaluation and at most "
        "gamma^(length/2) in training, which starts in the first half, is assigned to the last state. In a log: steps "
        "that follow a start state; null: as many as leave a mass of 1 %",
    )
    starts: Annotated[int | None, Field(ge=2), _OF_KIND] = Field(
        default=_UNSAID,
        validate_default=True,
        description="start states of the evaluation; null: 64 of the log, or all if there are fewer",
    )
    reward: Annotated[str | None, _OF_KIND] = Field(
        default=_UNSAID,
        validate_default=True,
        description="the reward whose value is compared; null: none. In a log: a component of the state, a logged "
        "column, or package.module:function of the state",
    )

    @property
    def own(self) -> dict[str, Any]:
        """Keys that the plugin's own `Settings` declare, with the reward for a plugin that reads it from a file."""
        own = super().own
        if "reward" in plugins.load(self.family, self.kind).Settings.model_fields:
            own = {**own, "reward": self.reward}
        return own


class DensitySample(Settings):
    """Settings for sampling density models."""

    samples: int = Field(ge=2, description="samples per model")
    solver: Solver
    steps: int = Field(ge=1)
    guidance: float = Field(
        default=1.0,
        description="scale of classifier-free guidance of velocity fields trained with cond_dropout; 1: none",
    )


class DensityEvaluation(Settings):
    """Settings for evaluating density models."""

    rows: int = Field(ge=2, description="test rows and samples in the distances (the cost of EMD is cubic in it)")
    likelihood_rows: int | None = Field(
        ge=2, description="maximum number of rows of each part whose likelihood is computed; null: all"
    )
    other_rows: int | None = Field(
        default=None, ge=2, description="maximum number of training and of validation rows; null: as many as test rows"
    )
    projections: int = Field(ge=1, description="directions of the sliced Wasserstein distance")
    solver: LikelihoodSolver
    grid: GridChoice = Field(
        default=GridChoice.model_validate("uniform"), description="where the solver's steps end in flow time"
    )
    steps: int = Field(
        ge=2, multiple_of=2, description="solver steps of the likelihood; its error is found with half as many"
    )
    divergence: Literal["auto", "exact", "hutchinson"] = Field(
        default="auto",
        description="divergence of velocity fields; hutchinson: unbiased, by one probe a row, for many columns; "
        "standard errors over rows include its noise",
    )


class MixtureRow(Settings):
    """A row of the density table: the mixture of all seeds of some methods with equal weights."""

    methods: tuple[Name, ...] = Field(min_length=1, description="methods of `density.methods`")
    tilt: bool = Field(
        default=False,
        description="whether it is multiplied by the ratio of the population to the tempered weights of the training "
        "rows, which a classifier estimates; only on data sets with tempered weights",
    )


class SuccessorSample(Settings):
    """Settings for sampling successor models."""

    samples: int = Field(ge=2, description="samples per start state")
    solver: Solver
    steps: int = Field(ge=1)


class SuccessorEvaluation(Settings):
    """Settings for evaluating successor models."""

    likelihood_rows: int = Field(ge=2, description="true samples per start state whose likelihood is computed")
    solver: FixedSolver
    steps: int = Field(ge=2, description="solver steps of the likelihood; its error is found with half as many")
    solver_steps: dict[Name, tuple[Annotated[int, Field(ge=1)], ...]] = Field(
        description="additional numbers of sampling steps at which EMD and value error are reported, by environment"
    )


class PlanSettings(Settings):
    """Planning among the policies of an environment's family, and the episodes by which planners are compared."""

    rewards: tuple[str, ...] = Field(min_length=1, description="tasks: names of rewards of the environment")
    methods: tuple[Name, ...] | None = Field(
        default=None, min_length=1, description="methods with whose models it plans; null: all flows that run there"
    )
    laws: tuple[CandidateLaw, ...] = Field(
        default=get_args(CandidateLaw),
        min_length=1,
        description="laws D(W) of new candidates: random, uniform between the bounds of w; local, around w_r; train, "
        "that of the training",
    )
    candidates: int = Field(default=16, ge=2, description="candidates of a plan: w_r, the present w, and new ones")
    samples: int = Field(default=128, ge=2, description="samples per candidate, whose noise candidates share")
    margin: float = Field(
        default=1.5,
        ge=0,
        description="standard errors by which the value of a candidate must exceed that of w_r",
    )
    solver: FixedSolver = "midpoint"
    steps: int = Field(default=3, ge=1, description="solver steps of a sample")
    every: int = Field(default=4, ge=1, description="transitions between two plans")
    episodes: int = Field(default=4, ge=1, description="episodes per task and seed, with equal starts for all methods")
    length: int = Field(default=200, ge=1, description="transitions per episode")
    singles: int = Field(
        default=256, ge=1, description="policies among which w_r is the one with the greatest true return"
    )
    simulated: int = Field(default=60, ge=1, description="transitions of a rollout where planning is by simulation")


class Section(Settings):
    """A section of methods, with their seeds and training settings."""

    methods: Mapping[str, DensityMethod] | Mapping[str, SuccessorMethod]
    seeds: Seeds

    def seeds_for(self, entry: Trained, method: str) -> tuple[int, ...]:
        """Return the training seeds of a method on an entry; the method's own take precedence."""
        return self.methods[method].seeds or entry.seeds or self.seeds

    def methods_for(self, entry: Trained) -> list[str]:
        """Return the methods that an entry runs."""
        return [*filter(entry.runs, self.methods)]

    def seeds_in(self, entry: Trained) -> tuple[int, ...]:
        """Return the seeds of all methods that an entry runs, in ascending order."""
        return tuple(sorted({seed for method in self.methods_for(entry) for seed in self.seeds_for(entry, method)}))


class Density(Section):
    """The section `density`: methods, seeds, training, sampling and evaluation."""

    methods: dict[Name, DensityMethod] = Field(min_length=1)
    mixtures: dict[Name, MixtureRow] = Field(
        default={}, description="further rows, on the data sets that run their methods"
    )
    seeds: Seeds
    fit: DensityFit
    sample: DensitySample
    evaluate: DensityEvaluation

    def fit_for(self, dataset: DatasetEntry, method: DensityMethod) -> DensityFit:
        """Return the training settings for a method on a data set; the method's changes take precedence."""
        return DensityFit.model_validate(merge(merge(self.fit.model_dump(), dataset.fit), method.fit))

    def sample_for(self, dataset: DatasetEntry) -> DensitySample:
        """Return the sampling settings for a data set."""
        return DensitySample.model_validate(merge(self.sample.model_dump(), dataset.sample))

    def evaluate_for(self, dataset: DatasetEntry) -> DensityEvaluation:
        """Return the evaluation settings for a data set."""
        return DensityEvaluation.model_validate(merge(self.evaluate.model_dump(), dataset.evaluate))


class Successor(Section):
    """The section `successor`: methods, seeds, training, sampling and evaluation."""

    methods: dict[Name, SuccessorMethod] = Field(min_length=1)
    seeds: Seeds
    fit: SuccessorFit
    sample: SuccessorSample
    evaluate: SuccessorEvaluation

    def fit_for(self, environment: EnvironmentEntry, method: SuccessorMethod) -> SuccessorFit:
        """Return the training settings for a method in an environment; the method's changes take precedence."""
        return SuccessorFit.model_validate(merge(merge(self.fit.model_dump(), environment.fit), method.fit))


class Params(Settings):
    """The contents of `params.yaml`."""

    profile: str = Field(description="name of the profile, shown with its runs; a profile's file sets it")
    seed: int = Field(ge=0, description="base seed, from which every stage derives its own")
    device: Device
    threads: int = Field(ge=1, description="CPU threads per process")
    mirror: Path | None = Field(description="folder with local copies of real data sets; null: they are downloaded")
    datasets: dict[Name, DatasetEntry]
    density: Density
    environments: dict[Name, EnvironmentEntry]
    successor: Successor
    plans: dict[Name, PlanSettings] = Field(default={}, description="planning, by environment")
    experiments: dict[Name, ExperimentEntry]
    operation: Operation = Operation()

    @model_validator(mode="after")
    def _names_are_free(self) -> Params:
        sections: dict[str, Mapping[str, Entry]]
        sections = {"data set": self.datasets, "environment": self.environments, "experiment": self.experiments}
        for (one, here), (other, there) in combinations(sections.items(), 2):
            if both := sorted(here.keys() & there.keys()):
                raise ValueError(f"{both[0]!r} names a {one} and an {other}; expected different names")
        for what, entries in sections.items():
            if taken := sorted(entries.keys() & PAGE_PARTS):
                raise ValueError(f"{taken[0]!r} names a part of the report; expected another name of the {what}")
        for section in ("density", "successor"):
            for name, what in REFERENCES.items():
                if name in getattr(self, section).methods:
                    raise ValueError(f"{section}.methods has {name!r}, the name of {what}; expected another one")
        for name, row in self.density.mixtures.items():
            absent = [method for method in row.methods if method not in self.density.methods]
            if absent:
                raise ValueError(
                    f"density.mixtures.{name}.methods has {absent[0]!r}; expected of density.methods: "
                    f"{', '.join(self.density.methods)}"
                )
            if name in {*self.density.methods, *REFERENCES}:
                raise ValueError(f"density.mixtures has {name!r}, the name of another row; expected another one")
        trained: dict[str, tuple[Mapping[str, Trained], str, Mapping[str, Any]]]
        trained = {
            "datasets": (self.datasets, "density", self.density.methods),
            "environments": (self.environments, "successor", self.successor.methods),
        }
        for heading, (these, family, known) in trained.items():
            for data, trainee in these.items():
                unknown = [method for method in trainee.methods or () if method not in known]
                if unknown:
                    raise ValueError(
                        f"{heading}.{data}.methods has {unknown[0]!r}; expected of {family}.methods: {', '.join(known)}"
                    )
        for name, plan in self.plans.items():
            if name not in self.environments:
                raise ValueError(f"plans has {name!r}; expected of environments: {', '.join(self.environments)}")
            runs = self.successor.methods_for(self.environments[name])
            unknown = [method for method in plan.methods or () if method not in runs]
            if unknown:
                raise ValueError(
                    f"plans.{name}.methods has {unknown[0]!r}; expected of those it runs: {', '.join(runs)}"
                )
        for name in self.successor.evaluate.solver_steps:
            if name not in self.environments:
                raise ValueError(
                    f"successor.evaluate.solver_steps has {name!r}; expected of environments: "
                    f"{', '.join(self.environments)}"
                )
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and validate a parameter file.

    Raises:
        UserError: The file is missing, is not YAML, repeats a key, or contains an invalid value.
    """
    return parse(read_yaml(Path(path)), Path(path))


def parse(raw: Mapping[str, Any], path: Path) -> Params:
    """Validate the contents of a parameter file; errors name `path`.

    Raises:
        UserError: A key is missing or unknown, or a value is invalid.
    """
    params = _validate(Params, raw, path)
    for key in _keys(raw):
        if len(key) > LONGEST_KEY:
            raise UserError(
                f"{path}: {key[:60]}... has {len(key)} characters with the keys above it, expected at most "
                f"{LONGEST_KEY}, the limit of MLflow; shorten its name."
            )
    for kind, section, entries, common in (
        ("density", "datasets", params.datasets, params.density.fit),
        ("successor", "environments", params.environments, params.successor.fit),
    ):
        _check_fit_choices(common, path, (kind, "fit"))
        for name, entry in entries.items():
            _validate(plugins.load(entry.family, entry.kind).Settings, entry.own, path, (section, name))
            _check_fit(common, [entry.fit], path, (section, name, "fit"))
    for name, entry in params.datasets.items():
        for key, settings in (("sample", params.density.sample), ("evaluate", params.density.evaluate)):
            changed = merge(settings.model_dump(), getattr(entry, key))
            _validate(type(settings), changed, path, ("datasets", name, key))
        _check_choice(params.density.evaluate_for(entry).grid, path, ("datasets", name, "evaluate", "grid"))
    for name, density in params.density.methods.items():
        for key, choice in (("path", density.path), ("coupling", density.coupling)):
            _check_choice(choice, path, ("density", "methods", name, key))
        _check_loss(density.loss, path, ("density", "methods", name, "loss"))
        if density.tune is not None:
            _check_loss(density.tune.loss, path, ("density", "methods", name, "tune", "loss"))
        if density.coupling.reads_conditions:
            without = [data for data, entry in params.datasets.items() if entry.runs(name) and not entry.has_conditions]
            if without:
                raise UserError(
                    f"{path}: density.methods.{name}.coupling is {density.coupling.name!r}, which compares conditions, "
                    f"but the data set {without[0]!r} has none; expected independent or minibatch_ot, or data sets "
                    "with `condition` alone."
                )
    _check_choice(params.density.evaluate.grid, path, ("density", "evaluate", "grid"))
    for name, method in params.successor.methods.items():
        _check_choice(method.path, path, ("successor", "methods", name, "path"))
        _check_choice(method.loss, path, ("successor", "methods", name, "loss"))
    _check_methods_fit(params.density.fit, "density", params.density.methods, "datasets", params.datasets, path)
    _check_methods_fit(
        params.successor.fit, "successor", params.successor.methods, "environments", params.environments, path
    )
    for name, entry in params.datasets.items():  # whose `fit` of each method is valid by now
        _check_guidance(params.density, name, entry, path)
    for name, experiment in params.experiments.items():
        settings = plugins.load(experiment.family, experiment.kind).Settings
        _validate(settings, experiment.own, path, ("experiments", name))
    return params


def _keys(nested: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values and sections."""
    for key, value in nested.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")


def _check_fit(common: Fit, changes: Sequence[Mapping[str, Any]], path: Path, prefix: tuple[str, ...]) -> None:
    fit = _validate(type(common), reduce(merge, changes, common.model_dump()), path, prefix)
    _check_fit_choices(fit, path, prefix)


def _check_fit_choices(fit: Fit, path: Path, prefix: tuple[str, ...]) -> None:
    choices: dict[str, Choice | None] = {"network": fit.network, "time": fit.time}
    if isinstance(fit, SuccessorFit):
        choices["discounts"] = fit.discounts
    for key, choice in choices.items():
        if choice is not None:
            _check_choice(choice, path, (*prefix, key))


def _check_methods_fit(
    common: Fit,
    section: str,
    methods: Mapping[str, DensityMethod] | Mapping[str, SuccessorMethod],
    family: str,
    entries: Mapping[str, Trained],
    path: Path,
) -> None:
    """Check the changes of methods to `fit`, alone and with those of the entries that run them."""
    for name, method in methods.items():
        _check_fit(common, [method.fit], path, (section, "methods", name, "fit"))
        for other, entry in entries.items():
            if entry.fit and method.fit and entry.runs(name):  # each may be valid alone and the combination invalid
                both = f"{family}.{other}.fit with {section}.methods.{name}.fit"
                _check_fit(common, [entry.fit, method.fit], path, (both,))


def _check_guidance(density: Density, name: str, entry: DatasetEntry, path: Path) -> None:
    """Check that guided models are conditional and were trained without their conditions, too.

    Raises:
        UserError: They are not.
    """
    scale = density.sample_for(entry).guidance
    fields = {m: density.methods[m] for m in density.methods_for(entry) if density.methods[m].has_field}
    if scale == 1 or not fields:
        return
    without = next((m for m, method in fields.items() if density.fit_for(entry, method).cond_dropout == 0), None)
    if not entry.has_conditions or without is not None:
        lacks = f"{without!r} has a cond_dropout of 0" if entry.has_conditions else "it has no condition"
        raise UserError(
            f"{path}: the samples of the data set {name!r} have the guidance {scale:g}, but {lacks}; expected 1, or "
            "a `condition` and a cond_dropout such as 0.1."
        )


def _check_loss(loss: LossChoice, path: Path, prefix: tuple[str, ...]) -> None:
    _check_choice(loss, path, prefix)
    if loss.grid is not None:
        _check_choice(loss.grid, path, (*prefix, "grid"))


def _check_choice(choice: Choice, path: Path, prefix: tuple[str, ...]) -> None:
    _validate(choice.settings(), choice.arguments, path, prefix)


def _validate(model: type[M], raw: Any, path: Path, prefix: tuple[str, ...] = ()) -> M:
    try:
        # From JSON, strict types still accept a list for a tuple and a string for a path.
        return model.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise UserError(sentence(error, model, path, prefix)) from None
