"""The peers, each called as its own documentation does, around one velocity field of ours.

All of them call the same module, so weights, data type and threads are the same everywhere.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torchdiffeq
import zuko
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from torch import Tensor, nn

__all__ = [
    "Wrapped",
    "flow_matching_log_prob",
    "flow_matching_sample",
    "standard_normal_log_prob",
    "torchcfm_sample",
    "torchcfm_tutorial",
    "zuko_flow",
    "zuko_sample",
]


def standard_normal_log_prob(x: Tensor) -> Tensor:
    return -(x.square() + math.log(2 * math.pi)).sum(1) / 2


class Wrapped(ModelWrapper):  # type: ignore[misc]
    """A field of ours as a model of flow_matching."""

    def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
        velocity: Tensor = self.model(t, x)
        return velocity


def flow_matching_log_prob(
    field: nn.Module,
    x: Tensor,
    method: str,
    *,
    steps: int | None = None,
    tolerance: float = 1e-5,
    times: Tensor | None = None,
    exact: bool = True,
) -> Tensor:
    """Return the log-density by `ODESolver.compute_likelihood`.

    Arguments:
        field: The velocity field.
        x: The points.
        method: A method of torchdiffeq.
        steps: The number of equal steps of a fixed-step method.
        tolerance: Both tolerances of an adaptive method.
        times: The times between the steps of a fixed-step method, from 1 to 0, instead of `steps`.
        exact: Whether the divergence is exact or one Hutchinson probe.
    """
    grid = {} if times is None else {"time_grid": times}
    solver = ODESolver(Wrapped(field))
    _, log_prob = solver.compute_likelihood(
        x_1=x,
        log_p0=standard_normal_log_prob,
        step_size=None if steps is None else 1 / steps,
        method=method,
        atol=tolerance,
        rtol=tolerance,
        exact_divergence=exact,
        **grid,
    )
    return cast(Tensor, log_prob)


def flow_matching_sample(
    field: nn.Module,
    noise: Tensor,
    method: str,
    *,
    steps: int | None = None,
    tolerance: float = 1e-5,
    times: Tensor | None = None,
) -> Tensor:
    """Return samples by `ODESolver.sample`; the arguments are those of `flow_matching_log_prob`, times from 0 to 1."""
    grid = {} if times is None else {"time_grid": times}
    solver = ODESolver(Wrapped(field))
    step_size = None if steps is None else 1 / steps
    x = solver.sample(x_init=noise, step_size=step_size, method=method, atol=tolerance, rtol=tolerance, **grid)
    return cast(Tensor, x)


def zuko_flow(field: nn.Module, dim: int, atol: float = 1e-6, rtol: float = 1e-5) -> Any:
    """Return zuko's continuous flow, a distribution with an exact divergence, around a field of ours.

    `zuko.flows.CNF` makes the same from a network of its own; the default tolerances are those of CNF.
    """
    transform = zuko.transforms.FreeFormJacobianTransform(
        lambda t, x: field(t, x), t0=1.0, t1=0.0, atol=atol, rtol=rtol, exact=True
    )
    base = zuko.distributions.DiagNormal(torch.zeros(dim), torch.ones(dim))
    return zuko.distributions.NormalizingFlow(transform, base)


@torch.no_grad()
def zuko_sample(field: nn.Module, noise: Tensor, atol: float = 1e-6, rtol: float = 1e-5) -> Tensor:
    """Return samples by the inverse of the transformation of `zuko_flow`."""
    x: Tensor = zuko_flow(field, noise.shape[1], atol, rtol).transform.inv(noise)
    return x


def torchcfm_sample(field: nn.Module, noise: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Return samples as torchcfm's image example draws them, by dopri5 of torchdiffeq; 1e-4 is its tolerance.

    Its notebooks call torchdyn with the same method and tolerance, which does not install beside a current
    torch.
    """
    with torch.no_grad():
        trajectory = torchdiffeq.odeint(
            lambda t, x: field(t, x),
            noise,
            torch.linspace(0, 1, 2),
            atol=tolerance,
            rtol=tolerance,
            method="dopri5",
        )
    return cast(Tensor, trajectory[-1])


def torchcfm_tutorial() -> tuple[Callable[[int], Tensor], Callable[[int], Tensor], nn.Module]:
    """Return the source, the target and a new network of torchcfm's tutorial on two-dimensional data.

    `torchcfm.utils` imports torchdyn for its moons. A stand-in with the same law takes its place, in a few
    operations of numpy as the original.
    """
    torchdyn, datasets = types.ModuleType("torchdyn"), types.ModuleType("torchdyn.datasets")
    datasets.generate_moons = _moons  # type: ignore[attr-defined]
    sys.modules.setdefault("torchdyn", torchdyn)
    sys.modules.setdefault("torchdyn.datasets", datasets)
    from torchcfm.models.models import MLP
    from torchcfm.utils import sample_8gaussians, sample_moons

    return sample_8gaussians, sample_moons, MLP(dim=2, time_varying=True)


def _moons(n: int, noise: float) -> tuple[Tensor, None]:
    angle = np.linspace(0, np.pi, n // 2)
    upper, lower = (np.cos(angle), np.sin(angle)), (1 - np.cos(angle), 0.5 - np.sin(angle))
    points = np.concatenate([upper, lower], 1).T + noise * np.random.rand(n, 1)
    return torch.as_tensor(points, dtype=torch.float32), None
