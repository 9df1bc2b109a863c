"""The parts of `flowmatch_core` that `params.yaml` can select, with their options; importing it does not import torch.

A new path, coupling, network, objective, normalizing flow or successor loss is a file in `flowmatch_core` and an entry
here; a density that is fitted without gradient steps is a function in `pipelines/training/closed_forms.py` and an entry
here. A test compares every entry with the code that it describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from pipelines.base.errors import did_you_mean

Number = float
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Fours = Annotated[tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...], Field(min_length=1)]
Activation = Literal["silu", "tanh", "softplus"]
Prediction = Literal["velocity", "noise", "data", "score", "state"]


def _number_or_line(value: Any) -> Any:
    """Accept a number, or a list of two numbers: the values of a linear schedule at its start and its end."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value):
        return tuple(value)
    raise ValueError("expected a number, or two numbers: at the start of training and at its end")


Line = Annotated[Any, BeforeValidator(_number_or_line)]
"""A number, or the start and end values of a linear schedule over training."""


@dataclass(frozen=True)
class Spec:
    """A class or function that `params.yaml` can select.

    Attributes:
        module: Module that defines it.
        attribute: Name in that module.
        options: Types of the options that `params.yaml` can set, by name.
    """

    module: str
    attribute: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Path of the source file, relative to the project."""
        return f"{self.module.replace('.', '/')}.py"

    def load(self) -> Any:
        """Import and return the class or function; this imports torch."""
        return getattr(import_module(self.module), self.attribute)


@dataclass(frozen=True)
class NetworkSpec(Spec):
    """A network class.

    Attributes:
        defaults: Default values of the options.
        image: Whether its vectors are images, whose sizes it needs.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    image: bool = False


@dataclass(frozen=True)
class ObjectiveSpec(Spec):
    """An objective of density models.

    Attributes:
        coupling: Whether it accepts a coupling of noise and data.
        path: Whether it regresses along a path between noise and data; a likelihood needs no more than the noise.
    """

    coupling: bool = True
    path: bool = True


@dataclass(frozen=True)
class LossSpec(Spec):
    """A loss of successor models.

    Attributes:
        needs: Training data: transitions and a target network (`target`), transitions alone (`transitions`), or
            on-policy future states (`futures`).
        path: Whether it uses a probability path and a distribution of flow times.
        prediction: Output of the network; `state` for a network of the loss's own, which draws states.
        ode: Whether it solves the target network's ODE, so that it accepts a solver and a number of steps.
        particles: Whether it supports persistent bootstrap points.
        progress: Whether it depends on the completed share of training.
        network: Network class that the loss defines itself, instead of that of `fit`.
    """

    needs: Literal["target", "transitions", "futures"] = "target"
    path: bool = True
    prediction: Prediction = "velocity"
    ode: bool = True
    particles: bool = False
    progress: bool = False
    network: NetworkSpec | None = None

    @property
    def all_options(self) -> Mapping[str, Any]:
        """Options of the loss and of its own network."""
        return {**self.options, **(self.network.options if self.network else {})}


PATHS: Mapping[str, Spec] = {
    "cond_ot": Spec("flowmatch_core.paths.cond_ot", "CondOT", {"sigma_min": Number}),
    "cosine": Spec("flowmatch_core.paths.cosine", "Cosine"),
    "ou": Spec("flowmatch_core.paths.ou", "OU", {"horizon": Number}),
    "polynomial": Spec("flowmatch_core.paths.polynomial", "Polynomial", {"n": Number}),
    "ve": Spec("flowmatch_core.paths.ve", "VE", {"sigma_min": Number, "sigma_max": Number}),
    "vp": Spec("flowmatch_core.paths.vp", "VP", {"beta_min": Number, "beta_max": Number}),
}
"""Probability paths."""

COUPLINGS: Mapping[str, Spec] = {
    "conditional_ot": Spec("flowmatch_core.couplings.conditional_ot", "ConditionalOT", {"weight": Number}),
    "independent": Spec("flowmatch_core.couplings.independent", "Independent"),
    "minibatch_ot": Spec("flowmatch_core.couplings.minibatch_ot", "MinibatchOT"),
    "schrodinger_bridge": Spec(
        "flowmatch_core.couplings.schrodinger_bridge", "SchrodingerBridge", {"sigma": Number, "weight": Number}
    ),
    "sinkhorn": Spec("flowmatch_core.couplings.sinkhorn", "Sinkhorn", {"reg": Number, "weight": Number}),
}
"""Couplings of noise and data."""

NETWORKS: Mapping[str, NetworkSpec] = {
    "concat_squash": NetworkSpec(
        "flowmatch_core.networks.concat_squash",
        "ConcatSquashField",
        {"hidden": Widths, "frequencies": Count, "activation": Activation},
        {"hidden": (256, 256), "frequencies": 0, "activation": "softplus"},
    ),
    "conv_unet": NetworkSpec(
        "flowmatch_core.networks.conv_unet",
        "FlatUNetField",
        {"widths": Fours, "patch": AtLeastOne, "frequencies": Count},
        {"widths": (32, 64), "patch": 2, "frequencies": 8},
        image=True,
    ),
    "film_mlp": NetworkSpec(
        "flowmatch_core.networks.film_mlp",
        "FiLMField",
        {"hidden": Widths, "cond_hidden": Widths, "activation": Activation},
        {"hidden": (512, 512), "cond_hidden": (64,), "activation": "silu"},
    ),
    "mlp": NetworkSpec(
        "flowmatch_core.networks.mlp",
        "MLPField",
        {"hidden": Widths, "frequencies": Count, "activation": Activation},
        {"hidden": (256, 256), "frequencies": 8, "activation": "silu"},
    ),
    "residual": NetworkSpec(
        "flowmatch_core.networks.residual",
        "ResidualField",
        {"width": Count, "blocks": Count, "frequencies": Count},
        {"width": 256, "blocks": 3, "frequencies": 8},
    ),
    "unet_mlp": NetworkSpec(
        "flowmatch_core.networks.unet_mlp",
        "UNetMLPField",
        {"stages": Widths, "blocks": Count, "cond_hidden": Widths, "time_width": Count},
        {"stages": (512, 512, 512), "blocks": 1, "cond_hidden": (512, 512, 512), "time_width": 256},
    ),
}
"""Networks of vectors; that of images takes them as vectors."""

OBJECTIVES: Mapping[str, ObjectiveSpec] = {
    "cfm": ObjectiveSpec("flowmatch_core.objectives.cfm", "cfm_loss"),
    "interpolant": ObjectiveSpec("flowmatch_core.objectives.interpolant", "interpolant_loss"),
    "likelihood": ObjectiveSpec(
        "flowmatch_core.objectives.likelihood",
        "nll_loss",
        {
            "solver": Literal["euler", "midpoint", "heun", "rk4", "adams"],
            "steps": AtLeastOne,
            "grid": Any,  # an entry of GRIDS
            "divergence": Literal["auto", "exact", "hutchinson"],
        },
        coupling=False,
        path=False,
    ),
    "posterior_cfm": ObjectiveSpec("flowmatch_core.objectives.posterior_cfm", "posterior_cfm_loss", coupling=False),
}
"""Objectives of density models."""

GRIDS: Mapping[str, Spec] = {
    "edm": Spec("flowmatch_core.solvers.grids", "EDM", {"rho": Number, "noisiest": Number, "cleanest": Number}),
    "power": Spec("flowmatch_core.solvers.grids", "Power", {"rho": int}),
    "uniform": Spec("flowmatch_core.solvers.grids", "Uniform"),
    "warped": Spec("flowmatch_core.solvers.grids", "Warped", {"p": Number}),
}
"""Grids of the times at which the steps of a solver end."""

TIMES: Mapping[str, Spec] = {
    "late": Spec("flowmatch_core.times", "LateTime", {"eps": Positive}),
    "logit_normal": Spec("flowmatch_core.times", "LogitNormalTime"),
    "uniform": Spec("flowmatch_core.times", "UniformTime"),
}
"""Laws of the flow times in a loss."""

_DISCOUNTS = "flowmatch_core.successor.discounts"
_RANGE = {"low": Share, "high": Share}

DISCOUNTS: Mapping[str, Spec] = {
    "log_uniform": Spec(_DISCOUNTS, "LogUniformDiscounts", _RANGE),
    "uniform": Spec(_DISCOUNTS, "UniformDiscounts", _RANGE),
}
"""Laws of the discounts of rows, for successor models of many discounts."""

NORMALIZING: Mapping[str, NetworkSpec] = {
    "glow": NetworkSpec(
        "flowmatch_core.normalizing.glow",
        "Glow",
        {"steps": AtLeastOne, "hidden": Widths},
        {"steps": 6, "hidden": (64, 64)},
    ),
    "made": NetworkSpec("flowmatch_core.normalizing.made", "MADE", {"hidden": Widths}, {"hidden": (64, 64)}),
    "maf": NetworkSpec(
        "flowmatch_core.normalizing.maf",
        "MAF",
        {"transforms": AtLeastOne, "hidden": Widths},
        {"transforms": 3, "hidden": (64, 64)},
    ),
    "naf": NetworkSpec(
        "flowmatch_core.normalizing.naf",
        "NAF",
        {"transforms": AtLeastOne, "hidden": Widths, "signal": AtLeastOne, "monotonic": Widths},
        {"transforms": 3, "hidden": (64, 64), "signal": 16, "monotonic": (64, 64)},
    ),
    "nsf": NetworkSpec(
        "flowmatch_core.normalizing.nsf",
        "NSF",
        {"transforms": AtLeastOne, "hidden": Widths, "bins": Annotated[int, Field(ge=2)]},
        {"transforms": 3, "hidden": (64, 64), "bins": 8},
    ),
    "real_nvp": NetworkSpec(
        "flowmatch_core.normalizing.real_nvp",
        "RealNVP",
        {"transforms": AtLeastOne, "hidden": Widths},
        {"transforms": 6, "hidden": (64, 64)},
    ),
}
"""Normalizing flows, trained by maximum likelihood in place of a velocity field."""

CLOSED_FORMS: Mapping[str, Spec] = {
    "gaussian": Spec("pipelines.training.closed_forms", "gaussian"),
    "gaussian_mixture": Spec("pipelines.training.closed_forms", "gaussian_mixture", {"components": AtLeastOne}),
    "independent": Spec("pipelines.training.closed_forms", "independent"),
    "kernel_density": Spec("pipelines.training.closed_forms", "kernel_density", {"bandwidth": Positive}),
    "large_mixture": Spec(
        "pipelines.training.closed_forms",
        "large_mixture",
        {"components": AtLeastOne, "rows": AtLeastOne, "iterations": AtLeastOne},
    ),
}
"""Densities that are fitted without gradient steps."""

DENSITIES: Mapping[str, Spec] = {**OBJECTIVES, **NORMALIZING, **CLOSED_FORMS}
"""What `loss` of a density method may name."""

_LOSSES = "flowmatch_core.successor.losses"
_FUSED = {"fused": bool}
_LATENT = {"width": Count, "blocks": Count}, {"width": 256, "blocks": 2}

SUCCESSOR_LOSSES: Mapping[str, LossSpec] = {
    "ensemble": LossSpec(
        f"{_LOSSES}.ensemble",
        "ensemble_loss",
        needs="transitions",
        path=False,
        prediction="state",
        ode=False,
        network=NetworkSpec(
            f"{_LOSSES}.ensemble",
            "GaussianEnsemble",
            {"members": Count, "hidden": Widths},
            {"members": 5, "hidden": (200, 200, 200)},
        ),
    ),
    "gan": LossSpec(
        f"{_LOSSES}.gan",
        "gan_loss",
        {"penalty": Line},
        path=False,
        prediction="state",
        ode=False,
        progress=True,
        network=NetworkSpec(f"{_LOSSES}.gan", "HorizonGAN", *_LATENT),
    ),
    "mc_cfm": LossSpec(f"{_LOSSES}.mc_cfm", "mc_cfm_loss", needs="futures", ode=False),
    "td2_cfm": LossSpec(f"{_LOSSES}.td2_cfm", "td2_cfm_loss", _FUSED, particles=True),
    "td2_dd": LossSpec(f"{_LOSSES}.td2_dd", "td2_dd_loss", _FUSED, prediction="noise"),
    "td_cfm": LossSpec(f"{_LOSSES}.td_cfm", "td_cfm_loss", _FUSED),
    "td_cfm_coupled": LossSpec(f"{_LOSSES}.td_cfm_coupled", "td_cfm_coupled_loss", _FUSED),
    "td_dd": LossSpec(f"{_LOSSES}.td_dd", "td_dd_loss", _FUSED, prediction="noise"),
    "vae": LossSpec(
        f"{_LOSSES}.vae",
        "vae_loss",
        {"beta": Number},
        path=False,
        prediction="state",
        ode=False,
        network=NetworkSpec(f"{_LOSSES}.vae", "HorizonVAE", *_LATENT),
    ),
}
"""Losses of successor models."""

ORACLE = "oracle"
"""Name in place of a successor loss that selects the closed form, which is not trained."""

S = TypeVar("S", bound=Spec)


def find(table: Mapping[str, S], name: str, *others: str) -> S:
    """Return the entry of a name.

    Args:
        table: Entries by name.
        name: Name to look up.
        others: Other valid names, for the message.

    Raises:
        ValueError: The name is unknown; the message lists the valid names and the closest one.
    """
    if name not in table:
        known = sorted([*table, *others])
        raise ValueError(f"expected one of {', '.join(known)}{did_you_mean(name, known)}")
    return table[name]
