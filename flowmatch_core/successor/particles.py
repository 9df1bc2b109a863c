r"""TD²-CFM with particles that persist across training steps: one evaluation of the target per point."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from flowmatch_core._call import call_field
from flowmatch_core._tensors import check_shape, expand_time, noise_like, time_like, weighted_mean
from flowmatch_core.field import VelocityField
from flowmatch_core.paths import AffinePath, CondOT
from flowmatch_core.successor.losses.bootstrap import Loss, check_path, discount, interpolate, squared_error
from flowmatch_core.successor.transitions import Transitions
from flowmatch_core.times import TimeLaw, UniformTime

__all__ = ["Particles"]


@final
class Particles(nn.Module):
    r"""The persistent bootstrap points of TD²-CFM, which move along the target's flow.

    A slot holds a transition and a point $(x, t)$ of the flow at its (S', A'). Every call of `td2_cfm_loss`
    evaluates the target there once: the velocity is what the field regresses on at that point, and moves the
    point to its next time (Euler's method for the first step, then Adams and Bashforth's of order two with
    variable steps). After `steps` points the slot takes a new transition from the batch. The slots start at different
    calls, so that their times have the same distribution as those of the direct term.

    This costs one target evaluation per point, and one more per path (at t=0, where the field is not trained, because
    an atom in the times of one term only would be a bias), instead of 2 K + 1 for K midpoint steps. A path depends on
    the last `steps` targets, an error that vanishes with the learning rate. Use it for large networks, where the
    evaluations of the target dominate.

    The state is the module's `state_dict`; `to` sets its dtype and device.

    Args:
        slots: The number of slots, that of the rows of a batch.
        event_dim: The number of dimensions of a state.
        cond_dim: The number of dimensions of a condition.
        steps: The number of points on a path.
        time: The law of the times.
        path: The path of the direct term, from N(0, I).

    Examples:
        >>> s, g = torch.zeros(64, 2), torch.Generator().manual_seed(0)
        >>> batch = Transitions(state=s, action=None, next_state=s, next_action=None)
        >>> particles, field = Particles(slots=64, event_dim=2, cond_dim=2), lambda t, x, cond: -x
        >>> losses = [particles.td2_cfm_loss(field, field, batch, gamma=0.9, generator=g) for _ in range(5)]
        >>> losses[-1].bootstrap                                                  # field and target agree
        tensor(0.)
    """

    x: Tensor
    t: Tensor
    quantile_now: Tensor
    phase: Tensor
    velocity: Tensor
    last_step: Tensor
    cond: Tensor
    next_cond: Tensor
    terminal: Tensor
    weight: Tensor
    share: Tensor

    def __init__(
        self,
        slots: int,
        event_dim: int,
        cond_dim: int,
        steps: int = 10,
        time: TimeLaw = UniformTime(),
        path: AffinePath = CondOT(),
    ) -> None:
        super().__init__()
        for name, number in (("slots", slots), ("steps", steps)):
            if number < 1:
                raise ValueError(f"{name} was {number}, but should be at least 1.")
        check_path(path)
        self.slots, self.steps, self.law, self.path = slots, steps, time, path
        # the number of the point on its path; 0 at pure noise, below 0 before the slot's first path
        self.register_buffer("phase", -(torch.arange(slots) % (steps + 1)))
        for name, shape in (
            ("x", (slots, event_dim)),
            ("t", (slots,)),
            ("quantile_now", (slots,)),
            ("velocity", (slots, event_dim)),
            ("last_step", (slots,)),
            ("cond", (slots, cond_dim)),
            ("next_cond", (slots, cond_dim)),
            ("weight", (slots,)),
            ("share", (slots,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("terminal", torch.zeros(slots, dtype=torch.bool))

    def td2_cfm_loss(
        self,
        field: VelocityField,
        target: VelocityField,
        batch: Transitions,
        *,
        gamma: float | Tensor,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Return the TD²-CFM loss of `field`, bootstrapped from `target` at the particles, and move the particles.

        Args:
            field: The velocity field that learns.
            target: The target, an average of earlier fields.
            batch: The transitions of the direct term, as many as slots; slots that have finished take theirs.
            gamma: The discount, or that of each transition, with shape `(batch,)`, as the weights are.
            weight: The weights of the transitions, with shape `(batch,)`, ones by default: they multiply the direct
                terms now, and the bootstrap terms of the slots that take the transitions.
            generator: The source of randomness.
        """
        share = discount(gamma, batch)
        check_shape("batch.condition", batch.condition, tuple(self.cond.shape))
        if weight is not None:
            check_shape("weight", weight, (self.slots,))
        u = time_like(batch.state, torch.rand, generator)
        t = self.law.quantile(u)
        direct, direct_velocity = interpolate(
            self.path, "velocity", noise_like(batch.visited, generator), batch.visited, t
        )
        with torch.no_grad():
            self._refill(batch, share, weight, generator)
            velocity = self._velocity(target)
            point, at, cond, live = self.x, self.t, self.cond, self.phase >= 1
            self._move(velocity, generator)
        both = call_field(field, torch.cat([t, at]), torch.cat([direct, point]), torch.cat([batch.condition, cond]))
        at_direct, at_bootstrap = both.chunk(2)
        direct_errors = squared_error(at_direct, direct_velocity)
        errors = self.weight * squared_error(at_bootstrap, velocity)

        def over_live(rows: Tensor) -> Tensor:
            return torch.where(live, rows, 0.0).sum() / live.sum().clamp(min=1)

        direct_term, bootstrap_term = weighted_mean(direct_errors, weight), over_live(errors)
        if isinstance(share, Tensor):
            total = weighted_mean((1 - share) * direct_errors, weight) + over_live(self.share * errors)
        else:
            total = (1 - share) * direct_term + share * bootstrap_term
        return Loss(total, direct_term, bootstrap_term)

    def _refill(
        self, batch: Transitions, share: float | Tensor, weight: Tensor | None, generator: torch.Generator | None
    ) -> None:
        """Assign a transition and pure noise to the slots that are not on a path."""
        new = self.phase <= 0
        terminal = torch.zeros_like(new) if batch.terminal is None else batch.terminal
        self.terminal = torch.where(new, terminal, self.terminal)
        self.weight = torch.where(new, 1.0 if weight is None else weight.to(self.weight.dtype), self.weight)
        self.share = torch.where(new, share, self.share)
        self.cond = torch.where(new[:, None], batch.condition, self.cond)
        self.next_cond = torch.where(new[:, None], batch.next_condition, self.next_cond)
        self.x = torch.where(new[:, None], noise_like(batch.state, generator), self.x)
        self.t = torch.where(new, 0.0, self.t)

    def _velocity(self, target: VelocityField) -> Tensor:
        """Return the target's velocity at the particles; where S' is terminal, the conditional velocity towards S'."""
        velocity = call_field(target, self.t, self.x, self.next_cond, "target")
        stay = self.path.conditional_velocity(self.t, self.x, self.next_cond[:, : self.x.shape[1]])
        return torch.where(self.terminal[:, None], stay, velocity)

    def _move(self, velocity: Tensor, generator: torch.Generator | None) -> None:
        """Move the points to their next times, and free the slots at the end of their path."""
        u = 1 - time_like(self.x, torch.rand, generator)
        start, moving = self.phase == 0, self.phase >= 0
        share = torch.where(start, u, self.quantile_now * self.steps + 1) / self.steps
        t = self.law.quantile(share.clamp(max=1))
        step = torch.where(moving, t - self.t, 0.0)
        euler = start | ~moving
        half = torch.where(euler, 0.0, step / torch.where(euler, 1.0, self.last_step) / 2)
        slope = velocity + expand_time(half, velocity) * (velocity - self.velocity)
        self.x = self.x + expand_time(step, velocity) * slope
        self.t, self.quantile_now = torch.where(moving, t, self.t), torch.where(moving, share, self.quantile_now)
        self.velocity, self.last_step = velocity, step
        self.phase = torch.where(self.phase == self.steps, 0, self.phase + 1)
