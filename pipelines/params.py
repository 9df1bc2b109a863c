"""The typed schema of `params.yaml` and its only reader.

Every number that a user may change is declared here with its range. A mistake is reported before anything runs, in one
sentence that names the key, what was found and what is expected.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from pipelines import members
from pipelines.errors import UserError, did_you_mean
from pipelines.members import Settings

Solver = Literal["euler", "midpoint", "heun", "rk4", "dopri5"]
FixedSolver = Literal["euler", "midpoint", "heun", "rk4"]
SUCCESSOR = "flowmatch_core.successor"
ORACLE = "oracle"  # the successor "loss" that is the closed form
NETWORKS = "flowmatch_core.networks"
M = TypeVar("M", bound=BaseModel)


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("expected every seed once")
    return seeds


def _member_of(family: str) -> AfterValidator:
    def check(name: str) -> str:
        members.check(family, name)
        return name

    return AfterValidator(check)


def _loss_of(family: str, *others: str) -> AfterValidator:
    """The file of that name must hold the loss of that name; it is read, not imported, as torch takes seconds."""

    def check(name: str) -> str:
        known = [*(n for n in members.names(family) if f"def {n}_loss(" in members.source(family, n)), *others]
        if name not in known:
            raise ValueError(f"expected one of {', '.join(known)}{did_you_mean(name, known)}")
        return name

    return AfterValidator(check)


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_different)]
Share = Annotated[float, Field(ge=0, lt=1)]
Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Activation = Literal["silu", "tanh", "softplus"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]  # becomes a folder and part of a stage's name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("it should be auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(_device)]


class Choice(BaseModel):
    """A member of an open family and the arguments of what its file defines; a bare name takes the defaults."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, float | str]
    name: str

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__)


def _network(name: str) -> str:
    members.check(NETWORKS, name)
    if "event_dim" not in _network_arguments(name):
        raise ValueError("expected a network of vectors")
    return name


def _network_arguments(name: str) -> dict[str, str]:
    """What a network's class takes and its annotations; the file is read, not imported, as torch takes seconds."""
    tree = ast.parse(members.source(NETWORKS, name)).body
    public = next(ast.literal_eval(n.value) for n in tree if isinstance(n, ast.Assign) and _is_all(n.targets[0]))
    network = next(n for n in tree if isinstance(n, ast.ClassDef) and n.name == public[0])
    init = next(n for n in network.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    return {arg.arg: ast.unparse(arg.annotation) for arg in init.args.args if arg.annotation is not None}


def _is_all(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id == "__all__"


class NetworkChoice(Choice):
    """A network of vectors: a class in `flowmatch_core/networks/`; what is not stated is the class's default."""

    __pydantic_extra__: dict[str, Any]  # checked by `settings`
    name: Annotated[str, AfterValidator(_network)]

    def settings(self) -> type[BaseModel]:
        """The schema of the arguments, those apart that data and seed decide."""
        types = {"int": Annotated[int, Field(ge=0)], "Sequence[int]": Widths, "str": Activation}
        arguments = _network_arguments(self.name).items()
        decided = ("event_dim", "cond_dim", "generator")
        fields: dict[str, Any] = {key: (types[kind], None) for key, kind in arguments if key not in decided}
        return create_model(self.name, __base__=Settings, **fields)

    def __str__(self) -> str:
        widths = next((value for value in self.arguments.values() if isinstance(value, (list, tuple))), ())
        return f"{self.name} {'×'.join(map(str, widths))}".rstrip()


class Fit(Settings):
    """A network and how it is trained."""

    network: NetworkChoice
    steps: int = Field(ge=1, description="gradient steps")
    batch: int = Field(ge=2, description="regression rows a step")
    lr: float = Field(gt=0, description="peak learning rate; linear warm-up, cosine to zero")
    warmup: int = Field(ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(ge=0, description="AdamW's decoupled decay")
    adam_betas: tuple[Share, Share] = Field(description="AdamW's decay of the mean gradient and of the mean square")
    adam_beta2_end: Share | None = Field(
        default=None, description="what the decay of the mean square comes to at the end, on a line; null: constant"
    )
    adam_eps: float = Field(gt=0, description="AdamW's epsilon")
    ema_step: float = Field(gt=0, le=1, description="weight of the newest weights in the averaged network, per step")
    log_every: int = Field(ge=1, description="steps between two rows of the loss curve")


class SuccessorFit(Fit):
    """The same for a successor model, with how its targets are made; what a loss does not know is not used."""

    ode_solver: Literal[FixedSolver, "ddim"] = Field(description="solver of the bootstrap; ddim for noise predictions")
    ode_steps: int = Field(ge=1, description="solver steps of one bootstrap target")
    time: Literal["uniform", "logit_normal"] = Field(description="law of the flow times of the regression")
    returns: int = Field(
        ge=1,
        description="steps between a state and its bootstrap. Above 1 the data are the rollouts instead of the "
        "transitions, since n-step returns are exact under the policy alone",
    )
    particles: bool = Field(
        description="TD²-CFM with points that persist from step to step, one target evaluation each; for large "
        "networks. A path has ode_steps points"
    )
    rows_in_memory: int = Field(ge=2, description="transitions in memory at a time; a longer table streams from disk")


class PathChoice(Choice):
    """A probability path: a class in `flowmatch_core/paths/`."""

    name: Annotated[str, _member_of("flowmatch_core.paths")]


class CouplingChoice(Choice):
    """A coupling of noise and data: a class in `flowmatch_core/couplings/`."""

    name: Annotated[str, _member_of("flowmatch_core.couplings")]


class LossChoice(Choice):
    """An objective: a function in `flowmatch_core/objectives/`."""

    name: Annotated[str, _loss_of("flowmatch_core.objectives")]


class DensityMethod(Settings):
    """A way to train a density model: path, coupling and loss, each a file of that name in `flowmatch_core`."""

    path: PathChoice
    coupling: CouplingChoice
    loss: LossChoice
    prediction: Literal["velocity", "noise", "data", "score"] = Field(
        default="velocity", description="what the network predicts and is regressed on"
    )


def _argument(value: Any) -> Any:
    """An argument of a loss, where a list stands for a pair."""
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value):
        return tuple(value)
    raise ValueError("expected a number, a word, or two numbers: at the start of training and at its end")


class SuccessorLossChoice(Choice):
    """A successor loss: a function in `flowmatch_core/successor/`; `oracle` is the closed form, where there is one.

    A loss that brings its own network (gan, vae) takes the network's arguments too.
    """

    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_argument)]]
    name: Annotated[str, _loss_of(SUCCESSOR, ORACLE)]


class SuccessorMethod(Settings):
    """A way to obtain a successor model."""

    loss: SuccessorLossChoice
    path: PathChoice = Field(
        default=PathChoice.model_validate("cond_ot"), description="the path; gan and vae have none"
    )
    fit: dict[str, Any] = Field(default={}, description="what differs from the common `fit` for this method")


class Member(BaseModel):
    """An entry whose `kind` names the file of a family; its `Settings` check the keys not declared here."""

    model_config = ConfigDict(extra="allow", frozen=True)
    family: ClassVar[str]
    kind: str

    @property
    def member(self) -> dict[str, Any]:
        """The keys that the member's own `Settings` declare."""
        return self.__pydantic_extra__ or {}

    def settings(self) -> Any:
        """The member's own settings, validated by its file."""
        return members.load(self.family, self.kind).Settings.model_validate(self.member)


class Trained(Member):
    """A data set or an environment: models are trained on it."""

    fit: dict[str, Any] = Field(default={}, description="what differs from the common `fit` for this entry")


class Experiment(Member):
    family: ClassVar[str] = "pipelines.experiments"
    kind: Annotated[str, _member_of("pipelines.experiments")]


class Dataset(Trained):
    family: ClassVar[str] = "pipelines.datasets"
    kind: Annotated[str, _member_of("pipelines.datasets")]


class Environment(Trained):
    family: ClassVar[str] = "pipelines.environments"
    kind: Annotated[str, _member_of("pipelines.environments")]
    gamma: float = Field(ge=0, lt=1, description="discount, per transition")
    transitions: int = Field(ge=2, description="offline transitions to collect")
    rollouts: int = Field(ge=2, description="on-policy episodes for Monte-Carlo training")
    length: int = Field(
        ge=2,
        description="transitions of a rollout; beyond its end lies gamma^length of an evaluated horizon's mass, and at "
        "most gamma^(length/2) of a trained one's, which starts in the first half; the last state gets it",
    )
    starts: int = Field(ge=2, description="start states of the evaluation")
    reward: str = Field(description="the reward of the environment whose value is compared")
    methods: tuple[Name, ...] | None = Field(
        default=None,
        min_length=1,
        description="the methods of `successor.methods` to be run here, all by default; a change runs this "
        "environment's stages again, as one of any key here",
    )

    def runs(self, method: str) -> bool:
        """Whether a method is run here."""
        return self.methods is None or method in self.methods


class DensitySample(Settings):
    samples: int = Field(ge=2, description="samples a model")
    solver: Solver
    steps: int = Field(ge=1)


class DensityEvaluation(Settings):
    rows: int = Field(ge=2, description="test rows and samples in the distances (EMD is cubic in it)")
    likelihood_rows: int = Field(ge=2, description="test rows whose likelihood is computed, at most")
    projections: int = Field(ge=1, description="directions of the sliced Wasserstein distance")
    solver: FixedSolver
    steps: int = Field(ge=2, description="solver steps of the likelihood; its error is found with half as many")


class SuccessorSample(Settings):
    samples: int = Field(ge=2, description="samples a start state")
    solver: Solver
    steps: int = Field(ge=1)


class SuccessorEvaluation(Settings):
    likelihood_rows: int = Field(ge=2, description="true samples a start state whose likelihood is computed")
    solver: FixedSolver
    steps: int = Field(ge=2, description="solver steps of the likelihood; its error is found with half as many")
    solver_steps: dict[Name, tuple[Annotated[int, Field(ge=1)], ...]] = Field(
        description="by environment, numbers of sampling steps at which EMD and value error are reported besides"
    )


class Density(Settings):
    methods: dict[Name, DensityMethod] = Field(min_length=1)
    seeds: Seeds
    fit: Fit
    sample: DensitySample
    evaluate: DensityEvaluation

    def fit_for(self, dataset: Dataset) -> Fit:
        return Fit.model_validate(merge(self.fit.model_dump(), dataset.fit))


class Successor(Settings):
    methods: dict[Name, SuccessorMethod] = Field(min_length=1)
    seeds: Seeds
    fit: SuccessorFit
    sample: SuccessorSample
    evaluate: SuccessorEvaluation

    def fit_for(self, environment: Environment, method: SuccessorMethod) -> SuccessorFit:
        return SuccessorFit.model_validate(merge(merge(self.fit.model_dump(), environment.fit), method.fit))


class Params(Settings):
    """All of `params.yaml`."""

    profile: str = Field(description="name under which runs are filed; a profile's file sets it")
    seed: int = Field(ge=0, description="base seed; every stage derives its own from it")
    device: Device
    threads: int = Field(ge=1, description="CPU threads of a process that computes")
    mirror: Path | None = Field(description="folder with local copies of real data sets")
    datasets: dict[Name, Dataset]
    density: Density
    environments: dict[Name, Environment]
    successor: Successor
    experiments: dict[Name, Experiment]

    @model_validator(mode="after")
    def _names_are_free(self) -> Params:
        both = sorted(self.datasets.keys() & self.environments.keys())
        if both:
            raise ValueError(f"{both[0]!r} names a data set and an environment; expected different names")
        for section in ("density", "successor"):
            if "floor" in getattr(self, section).methods:
                raise ValueError(f"{section}.methods has 'floor', the name of the sampling floor; expected another one")
        known = self.successor.methods
        for name, entry in self.environments.items():
            unknown = [method for method in entry.methods or () if method not in known]
            if unknown:
                raise ValueError(
                    f"environments.{name}.methods has {unknown[0]!r}; expected of successor.methods: {', '.join(known)}"
                )
        for name in self.successor.evaluate.solver_steps:
            if name not in self.environments:
                raise ValueError(
                    f"successor.evaluate.solver_steps has {name!r}; expected of environments: "
                    f"{', '.join(self.environments)}"
                )
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check a parameter file.

    Raises:
        UserError: the file is missing, is not YAML, repeats a key, or a value is out of place.
    """
    path = Path(path)
    params = _validate(Params, read_yaml(path), path)
    for kind, section, entries, common in (
        ("density", "datasets", params.datasets, params.density.fit),
        ("successor", "environments", params.environments, params.successor.fit),
    ):
        _check_network(common.network, path, (kind, "fit"))
        for name, entry in entries.items():
            _validate(members.load(entry.family, entry.kind).Settings, entry.member, path, (section, name))
            _check_fit(common, [entry.fit], path, (section, name, "fit"))
    successor = params.successor
    for name, method in successor.methods.items():
        _check_fit(successor.fit, [method.fit], path, ("successor", "methods", name, "fit"))
        for environment, entry in params.environments.items():
            if entry.fit and method.fit and entry.runs(name):  # each may be right, and both together wrong
                both = f"environments.{environment}.fit with successor.methods.{name}.fit"
                _check_fit(successor.fit, [entry.fit, method.fit], path, (both,))
    for name, experiment in params.experiments.items():
        settings = members.load(experiment.family, experiment.kind).Settings
        _validate(settings, experiment.member, path, ("experiments", name))
    return params


def _check_fit(common: Fit, changes: Sequence[Mapping[str, Any]], path: Path, prefix: tuple[str, ...]) -> None:
    fit = _validate(type(common), reduce(merge, changes, common.model_dump()), path, prefix)
    _check_network(fit.network, path, prefix)


def _check_network(choice: NetworkChoice, path: Path, prefix: tuple[str, ...]) -> None:
    _validate(choice.settings(), choice.arguments, path, (*prefix, "network"))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with changes: mappings merge, lists and values are replaced, a mapping set to null goes.

    A choice of another name is replaced as a whole, since the arguments of the old one are not the new one's.

    >>> merge({"fit": {"lr": 1, "hidden": [8, 8]}, "sets": {"a": {}, "b": {}}}, {"fit": {"hidden": [2]}})
    {'fit': {'lr': 1, 'hidden': [2]}, 'sets': {'a': {}, 'b': {}}}
    >>> merge({"sets": {"a": {}, "b": {}}, "mirror": "x"}, {"sets": {"a": None}, "mirror": None})
    {'sets': {'b': {}}, 'mirror': None}
    >>> merge({"path": {"name": "vp", "beta_max": 9}}, {"path": {"name": "cosine"}})
    {'path': {'name': 'cosine'}}
    """
    merged = dict(base)
    for key, value in changes.items():
        here = merged.get(key)
        if isinstance(here, Mapping) and value is None:
            del merged[key]
        elif isinstance(here, Mapping) and isinstance(value, Mapping) and value.get("name") in (None, here.get("name")):
            merged[key] = merge(here, value)
        else:
            merged[key] = value
    return merged


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a repeated key, of which plain YAML silently keeps the last."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys may be stated anew
            continue
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"line {line} has the key {key!r}; expected a word.")
        if key in seen:
            raise UserError(f"the key {key!r} stands twice, on lines {seen[key]} and {line}; remove one of them.")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor("tag:yaml.org,2002:map", _mapping)
# YAML 1.1 reads 1e-3 as a string; everyone who writes it means a number.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, refusing repeated keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); run from the project's root.") from None
    try:
        raw = yaml.load(text, _UniqueKeys)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" on line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path} is not valid YAML{line} ({problem}); mend that line.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}; expected a mapping with {', '.join(Params.model_fields)}.")
    return raw


def _validate(model: type[M], raw: Any, path: Path, prefix: tuple[str, ...] = ()) -> M:
    try:
        # As JSON, so that strict types still let a list become a tuple and a string a path.
        return model.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise UserError(_sentence(error, model, path, prefix)) from None


def _sentence(error: ValidationError, model: type[BaseModel], path: Path, prefix: tuple[str, ...]) -> str:
    """One mistake as a sentence, and how many others; a misspelt key comes before the one that it leaves missing."""
    mistakes = error.errors()
    first = next((mistake for mistake in mistakes if mistake["type"] == "extra_forbidden"), mistakes[0])
    key = ".".join(str(part) for part in (*prefix, *first["loc"]))
    found = repr(first["input"])
    found = found if len(found) <= 80 else f"{found[:77]}..."
    if first["type"] == "extra_forbidden":
        known = _keys_beside(model, first["loc"])
        remedy = did_you_mean(str(first["loc"][-1]), known, f"; expected one of {', '.join(known)}.")
        what = f"{key} is not a known key (found {found}){remedy}"
    elif first["type"] == "missing":
        what = f"{key} is missing; add it."
    elif not first["loc"]:
        what = str(first["msg"]).removeprefix("Value error, ") + "."
    else:
        message = str(first["msg"]).removeprefix("Value error, ")
        for theirs, ours in (
            ("Input should", "it should"),
            ("String should match", "it should match"),
            ("array", "list"),
        ):
            message = message.replace(theirs, ours)
        what = f"{key} is {found}; {message}{'' if message.endswith(('.', '?')) else '.'}"
    others = error.error_count() - 1
    return f"{path}: {what}" + (f" (and {others} more)" if others else "")


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that may stand where an unknown one was found."""
    here: Any = model
    for part in loc[:-1]:
        fields = getattr(here, "model_fields", None)
        if fields is not None:
            here = fields[part].annotation if part in fields else None
        else:  # dict[str, X]: any name leads to X
            here = get_args(here)[-1] if get_args(here) else None
    return list(getattr(here, "model_fields", {}))
