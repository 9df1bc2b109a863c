"""Maximum likelihood: the negative log-likelihood of the flow as the objective."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from flowmatch_core._bases import base_of
from flowmatch_core._conditions import Condition, condition_parts
from flowmatch_core._density import Rule, push, random_phase
from flowmatch_core._jacobian import full_precision
from flowmatch_core._require import required
from flowmatch_core._tensors import check_choice, check_shape, flatten_event, weighted_mean
from flowmatch_core.divergence import DivergenceMethod, divergence, rademacher
from flowmatch_core.field import VelocityField
from flowmatch_core.solvers import TimeGrid, Uniform
from flowmatch_core.solvers.adaptive import dopri5_errors, dopri5_options

__all__ = ["GradientMethod", "nll_loss"]

GradientMethod = Literal["backprop", "adjoint"]
"""How the gradient of `nll_loss` is computed."""


def nll_loss(
    field: VelocityField,
    x1: Tensor,
    cond: Condition = None,
    *,
    weight: Tensor | None = None,
    method: GradientMethod = "backprop",
    solver: str = "rk4",
    steps: int = 16,
    grid: TimeGrid = Uniform(),
    rtol: float = 1e-5,
    atol: float = 1e-5,
    divergence: DivergenceMethod = "auto",
    probes: int = 1,
    base_scale: float = 1.0,
    max_steps: int = 10_000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the negative log-likelihood of the flow of a field, averaged over the batch, in nats.

    $$
    -\frac1n \sum_i w_i \Bigl[\log N(x_0^{(i)}; 0, \sigma_0^2 I)
    - \int_0^1 \nabla \cdot v_\theta(t, x_t^{(i)}, c)\, dt\Bigr]
    $$

    - `backprop` differentiates a solve with fixed steps: the gradient is exact for the computed value, and the memory
      grows with the steps. Point and integral are solved as one state, in a variable that is a random function of
      time, drawn anew for each call: a field that is trained on fixed times learns to hide divergence between them.
      With too few steps for the speed of the field it still learns to exploit the error of the solver; multistep
      methods, whose steps become unstable first, need the most.
    - `adjoint` solves by `dopri5` and computes the gradient by a second, backward solve: constant memory, but the
      gradient has the error of the tolerances, and single precision limits them. It synchronises with the device.

    Use it to fine-tune for a few epochs after `cfm_loss`; training from scratch costs tens of evaluations per step
    where `cfm_loss` costs one. Check the result now and then by `ContinuousFlow.estimate(x1, reference="dopri5")`: the
    mean of its `log_prob` is the negative of this loss by an independent solve.

    References:
        - Neural Ordinary Differential Equations (Chen et al., 2018), https://arxiv.org/abs/1806.07366
        - FFJORD: Free-form Continuous Dynamics (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367

    Args:
        field: The velocity field $v_\theta$; for adjoint a `torch.nn.Module`, whose parameters get gradients.
        x1: The data, with shape `(batch, *event)`.
        cond: The conditions, with shape `(batch, *cond)`, or a mapping of such tensors.
        weight: The weights $w_i$, with shape `(batch,)`; 1 by default.
        method: One of backprop and adjoint.
        solver: The solver of backprop.
        steps: Its number of steps.
        grid: Where they end.
        rtol: The relative tolerance of adjoint.
        atol: The absolute tolerance of adjoint.
        divergence: One of auto, exact and hutchinson.
        probes: The number of probes of hutchinson.
        base_scale: The scale $\sigma_0$ of the noise.
        max_steps: The maximum number of steps of adjoint, above which it raises a `SolverError`.
        generator: The source of randomness of the times and of the probes.

    Examples:
        >>> nll_loss(lambda t, x, cond: x, torch.zeros(4, 2)).detach()  # 2 + log(2 pi)
        tensor(3.8379)
    """
    check_choice("method", method, get_args(GradientMethod))
    if len(x1) == 0:
        raise ValueError("x1 has no rows, but should have at least one.")
    if weight is not None:
        check_shape("weight", weight, (len(x1),))
    rule = Rule(solver, steps, grid, divergence, rtol, atol, check=False)
    base = base_of(None, base_scale, x1.shape[1:])
    noise = rademacher(x1, probes, generator) if divergence == "hutchinson" else None
    if method == "backprop":
        phase = random_phase(x1, generator)
        x0, integrals, _ = push(field, x1, cond, rule, noise=noise, backward=True, phase=phase)
        integral = integrals[0]
    elif isinstance(field, nn.Module):
        with full_precision(x1), dopri5_errors(rtol, atol, max_steps):
            x0, integral = _adjoint(field, x1, cond, divergence, noise, rtol, atol, max_steps)
    else:
        raise ValueError(
            f"field is a {type(field).__name__}, but should be a torch.nn.Module for method 'adjoint', which needs "
            "its parameters."
        )
    nll = integral - base.log_prob(x0)
    return weighted_mean(nll, weight)


def _adjoint(
    field: nn.Module,
    x1: Tensor,
    cond: Condition,
    method: DivergenceMethod,
    noise: Tensor | None,
    rtol: float,
    atol: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Return the noise that the data are mapped to, and the integral of the divergence along the path."""
    torchdiffeq = required("torchdiffeq", "torchdiffeq")  # imports much of scipy

    def joint(t: Tensor, state: Tensor) -> Tensor:
        # the trial step that sets the first step size may exceed the interval
        velocity, rate = divergence(field, t.clamp(0, 1), state[:, :-1].reshape(x1.shape), cond, method, noise=noise)
        return torch.cat([flatten_event(velocity), rate[:, None]], 1)

    leaves = [part for part in condition_parts(cond) if part.requires_grad]
    leaves = [*leaves, *(parameter for parameter in field.parameters() if parameter.requires_grad)]
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x1.device)
    state = torch.cat([flatten_event(x1), x1.new_zeros(len(x1), 1)], 1)
    end = torchdiffeq.odeint_adjoint(
        joint,
        state,
        ends,
        rtol=rtol,
        atol=atol,
        method="dopri5",
        options=dopri5_options(max_steps),
        adjoint_params=tuple(leaves),
    )[-1]
    return end[:, :-1].reshape(x1.shape), -end[:, -1]
