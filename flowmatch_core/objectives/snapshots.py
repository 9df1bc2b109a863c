"""Flow matching across snapshots: regression along splines through unpaired samples at several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_floating, check_shape, weighted_mean
from flowmatch_core.couplings import ConditionalOT, IndexCoupling, MinibatchOT
from flowmatch_core.couplings._base import check_coupling
from flowmatch_core.field import VelocityField
from flowmatch_core.objectives._regression import Times, draw_times

__all__ = ["Spline", "draw_snapshots", "snapshot_cfm_loss"]


@final
@dataclass(frozen=True)
class Spline:
    r"""A curve through given points at given times, piecewise linear or a natural cubic spline.

    $$
    x_t = \sum_k w_k(t)\, x_{T_k}, \quad w_k(T_j) = \delta_{jk}, \qquad u_t = \sum_k \dot w_k(t)\, x_{T_k}
    $$

    The weights depend on the times alone. The natural cubic spline has the least integrated squared acceleration
    $\int \lVert \ddot x_t \rVert^2 dt$ of all curves through the points.

    References:
        - Modeling Complex System Dynamics with Flow Matching Across Time and Conditions (Rohbeck et al., 2025),
          https://openreview.net/forum?id=hwnObmOTrV

    Args:
        times: The increasing times $T_0 < \dots < T_K$ of the points, two or more.
        degree: 1 for straight pieces, 3 for the natural cubic spline.

    Examples:
        >>> points = torch.tensor([[[0.0], [2.0], [0.0]]])
        >>> Spline((0.0, 1.0, 3.0)).sample(points, torch.tensor([2.0]))
        (tensor([[1.]]), tensor([[-1.]]))
    """

    times: tuple[float, ...]
    degree: int = 1

    def __post_init__(self) -> None:
        if len(self.times) < 2 or any(not a < b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"times is {self.times}, but should be two or more increasing numbers.")
        if self.degree not in (1, 3):
            raise ValueError(f"degree is {self.degree}, but should be 1 or 3.")

    def sample(self, points: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point $x_t$ and the velocity $u_t$ of every curve, both with shape `(batch, *event)`.

        Args:
            points: The points of the curves, with shape `(batch, K + 1, *event)`.
            t: The times, with shape `(batch,)`; beyond the ends the outer pieces continue.
        """
        check_shape("t", t, points.shape[:1])
        if points.shape[1:2] != (len(self.times),):
            raise ValueError(
                f"points has shape {tuple(points.shape)}, but should have shape (batch, {len(self.times)}, *event), "
                f"one point for each time."
            )
        value, rate = (w.reshape(*w.shape, *(1,) * (points.ndim - 2)) for w in self._weights(t))
        return (value * points).sum(1), (rate * points).sum(1)

    def _weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the points and their derivatives, both with shape `(batch, K + 1)`."""
        times = torch.tensor(self.times, dtype=t.dtype, device=t.device)
        piece = torch.searchsorted(times[1:-1], t.detach().contiguous(), right=True)
        width = times.diff()[piece][:, None]
        b = (t[:, None] - times[piece][:, None]) / width
        a = 1 - b
        unit = torch.eye(len(times), dtype=t.dtype, device=t.device)
        value, rate = a * unit[piece] + b * unit[piece + 1], (unit[piece + 1] - unit[piece]) / width
        if self.degree == 3:
            left, right = (self._curvature().to(t)[index] for index in (piece, piece + 1))
            value = value + width**2 / 6 * ((a**3 - a) * left + (b**3 - b) * right)
            rate = rate + width / 6 * ((1 - 3 * a**2) * left + (3 * b**2 - 1) * right)
        return value, rate

    def _curvature(self) -> Tensor:
        """Return the matrix that maps the points to the second derivatives at their times, zero at both ends."""
        times = torch.tensor(self.times, dtype=torch.float64)
        width, slope = times.diff(), torch.eye(len(times), dtype=torch.float64).diff(dim=0) / times.diff()[:, None]
        inner = torch.diag(2 * (width[1:] + width[:-1]))
        inner = inner + torch.diag(width[1:-1], 1) + torch.diag(width[1:-1], -1)
        return torch.nn.functional.pad(torch.linalg.solve(inner, 6 * slope.diff(dim=0)), (0, 0, 1, 1))


def draw_snapshots(snapshots: Sequence[Tensor], rows: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return a batch of each snapshot, drawn with replacement, with shape `(rows, *event)` each.

    Args:
        snapshots: The snapshots, with shapes `(n_k, *event)`.
        rows: The number of rows of a batch.
        generator: The source of randomness, drawn for one snapshot after the other.

    Examples:
        >>> [len(batch) for batch in draw_snapshots([torch.zeros(7, 2), torch.ones(300, 2)], 16)]
        [16, 16]
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}, but should be at least 1.")
    for k, x in enumerate(snapshots):
        if len(x) == 0:
            raise ValueError(f"snapshots[{k}] has no rows, but should have at least one.")
    return [x[torch.randint(len(x), (rows,), generator=generator, device=x.device)] for x in snapshots]


def snapshot_cfm_loss(
    field: VelocityField,
    snapshots: Sequence[Tensor],
    times: Sequence[float],
    cond: Condition = None,
    *,
    degree: int = 1,
    coupling: IndexCoupling | None = None,
    time: Times = torch.rand,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the flow matching loss across snapshots, averaged over the event dimensions and the batch.

    $$
    E_{t, (x_{T_0}, \dots, x_{T_K})} \lVert v_\theta(t, x_t, c) - u_t \rVert^2 / d, \quad t \sim U[T_0, T_K]
    $$

    with $x_t$ and $u_t$ of a `Spline` through a chain of rows, one of each snapshot. The chains are those of
    `IndexCoupling.chain`: consecutive rows are pairs of the coupling. The flow of the minimiser has the law of the
    snapshot at every $T_k$, so `solve(field, x, t0=T_j, t1=T_k)` carries any snapshot to any other, backward too.
    The field sees the times as given. For two snapshots at 0 and 1 it is `cfm_loss` on `CondOT`.

    References:
        - Modeling Complex System Dynamics with Flow Matching Across Time and Conditions (Rohbeck et al., 2025),
          https://openreview.net/forum?id=hwnObmOTrV
        - Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport
          (Tong et al., 2024), https://arxiv.org/abs/2302.00482

    Args:
        field: The velocity field $v_\theta$.
        snapshots: A batch of each snapshot, all with shape `(batch, *event)`, see `draw_snapshots`.
        times: Their increasing times $T_0 < \dots < T_K$.
        cond: The conditions, whose first dimension is the batch: row `i` of every snapshot has condition `i`.
        degree: The degree of the spline, 1 or 3.
        coupling: How consecutive snapshots are paired; by default `MinibatchOT()`, or `ConditionalOT()` with
            conditions, whose chains stay within a label.
        time: The places of the times in the interval from $T_0$ to $T_K$, as fractions with shape `(batch,)`, or a
            sampler of them with the call of `torch.rand`, the default.
        weight: The weights of the rows of the last snapshot in the mean, with shape `(batch,)`.
        generator: The source of randomness, drawn for the coupling, from the last pair to the first, and the time.

    Examples:
        >>> snapshots = [torch.zeros(8, 2), torch.ones(8, 2), 3 * torch.ones(8, 2)]
        >>> snapshot_cfm_loss(lambda t, x, cond: torch.ones_like(x), snapshots, (0.0, 1.0, 3.0))
        tensor(0.)
    """
    spline = Spline(tuple(map(float, times)), degree)
    if coupling is None:
        coupling = MinibatchOT() if cond is None else ConditionalOT()
    check_coupling(coupling)
    if not isinstance(coupling, IndexCoupling):
        kind = type(coupling).__name__
        raise ValueError(f"coupling is a {kind}, but should be an IndexCoupling; pass one such as MinibatchOT().")
    if len(snapshots) != len(spline.times):
        raise ValueError(f"snapshots holds {len(snapshots)} batches, but should hold one for each of {spline.times}.")
    *_, last = snapshots
    for k, x in enumerate(snapshots):
        check_floating(f"snapshots[{k}]", x)
        check_shape(f"snapshots[{k}]", x, last.shape, "a batch, by draw_snapshots, ")
    chain = coupling.chain(snapshots, cond, generator=generator)
    points = torch.stack([x[index] for x, index in zip(snapshots, chain, strict=True)], 1)
    start, end = spline.times[0], spline.times[-1]
    t = start + (end - start) * draw_times(time, last, generator).expand(len(last))
    x_t, velocity = spline.sample(points, t)
    return weighted_mean((call_field(field, t, x_t, cond) - velocity).square(), weight)
