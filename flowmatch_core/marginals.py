r"""Transforms of single columns to a standard normal, $u = \Phi^{-1}(F(x))$, each by the distribution of its column."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from flowmatch_core._tensors import check_choice, check_shape
from flowmatch_core._units import UnitsModule

__all__ = ["Identity", "Marginal", "Marginals", "Mixture", "Steps"]

LOG_SQRT_TWO_PI = math.log(2 * math.pi) / 2
LOWEST_LOG = -700.0
"""The logarithm of a probability that `exp` still represents in full precision."""
ROUNDING = 4 * torch.finfo(torch.float64).eps
ROUNDS = 200
"""The most evaluations of an inverse: bisection alone needs about 60 for the digits of double precision."""


class Marginal(UnitsModule, ABC):
    """A strictly increasing transform of one column, in float64 whatever the dtype of the column.

    Its buffers describe a distribution function; they stay in float64 when the module is moved to another dtype.
    """

    kind: ClassVar[str]

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the logarithms of the slope there, both with the shape of `x`."""

    @abstractmethod
    def inverse(self, u: Tensor) -> Tensor:
        """Return the points whose images are `u`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what `Marginals.from_description` needs besides the state, as values of JSON."""


@final
class Identity(Marginal):
    """The transform that leaves a column as it is."""

    kind = "identity"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points themselves, and zeros."""
        u = x.double()
        return u, torch.zeros_like(u)

    def inverse(self, u: Tensor) -> Tensor:
        """Return the points themselves."""
        return u.double()

    def describe(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": self.kind}


@final
class Mixture(Marginal):
    r"""The transform of the distribution function of a Gaussian mixture, $F(x) = \sum_k w_k \Phi((x - m_k) / s_k)$.

    The smaller of $F$ and $1 - F$ is computed, as a logarithm, so that images are finite and accurate far in the
    tails, where they grow like those of the widest component.

    Args:
        weights: The weights, positive, with shape `(k,)`; they are divided by their sum.
        means: The means, with shape `(k,)`.
        scales: The standard deviations, with shape `(k,)`.

    Examples:
        >>> column = Mixture(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0]))
        >>> column(torch.tensor([4.0, 43.0]))[0], column.inverse(torch.tensor([1.0]))
        (tensor([ 0.5000, 20.0000], dtype=torch.float64), tensor([5.], dtype=torch.float64))
    """

    kind = "mixture"
    UNITS = ("weights", "means", "scales")
    weights: Tensor
    means: Tensor
    scales: Tensor

    def __init__(self, weights: Tensor, means: Tensor, scales: Tensor) -> None:
        super().__init__()
        for name, value in (("weights", weights), ("means", means), ("scales", scales)):
            check_shape(name, value, (len(weights),))
            if not bool(value.isfinite().all()) or (name != "means" and not bool((value > 0).all())):
                wanted = "finite numbers" if name == "means" else "positive, finite numbers"
                raise ValueError(f"{name} is {value.tolist()}, but should hold {wanted}.")
        self.register_buffer("weights", weights.double() / weights.double().sum())
        self.register_buffer("means", means.double().clone())
        self.register_buffer("scales", scales.double().clone())

    @classmethod
    def fit(
        cls,
        x: Tensor,
        weight: Tensor | None = None,
        *,
        components: int = 8,
        iterations: int = 60,
        floor: float = 0.05,
        name: str = "x",
    ) -> Mixture:
        """Fit a mixture to a column by expectation-maximisation from the quantiles of the column.

        Args:
            x: The column, with shape `(n,)`.
            weight: The weights of the rows, not negative, with shape `(n,)`; None for ones.
            components: The number of components.
            iterations: The number of iterations.
            floor: The smallest standard deviation of a component, as a share of that of the column. Steps of the data
                that are finer than it are not learnt.
            name: What an error calls the column.

        Examples:
            >>> x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
            >>> column = Mixture.fit(torch.where(x > 0, x + 5, x - 5), components=2)
            >>> (column.means / 5).round()
            tensor([-1.,  1.], dtype=torch.float64)
        """
        if components < 1 or iterations < 1:
            raise ValueError(f"components and iterations are {components} and {iterations}, but should be at least 1.")
        if not 0 < floor <= 1:
            raise ValueError(f"floor is {floor}, but should be above 0 and at most 1.")
        values, mass = _distinct(x, weight, name)
        if len(values) < components:
            raise ValueError(
                f"{name} has {len(values)} distinct values, but should have at least {components} for a mixture of "
                f"{components}; take fewer components, or steps for whole numbers."
            )
        centre = mass @ values
        spread = (mass @ (values - centre).square()).sqrt()
        z = (values - centre) / spread
        below = mass.cumsum(0) - mass / 2
        grid = (torch.arange(components, dtype=z.dtype, device=z.device) + 0.5) / components
        means = z[torch.searchsorted(below, grid).clamp(max=len(z) - 1)]
        scales = torch.full_like(means, 1 / components).clamp(min=floor)
        if components > 1:
            gaps = torch.cat([means[1:2] - means[:1], means[2:] - means[:-2], means[-1:] - means[-2:-1]])
            scales = torch.maximum(gaps / 2, means.new_tensor(floor))
        weights = torch.full_like(means, 1 / components)
        for _ in range(iterations):
            joint = weights.log() - ((z[:, None] - means) / scales).square() / 2 - scales.log()
            shares = mass[:, None] * joint.softmax(1)
            weights = shares.sum(0).clamp(min=1e-12)
            means = (shares * z[:, None]).sum(0) / weights
            scales = ((shares * (z[:, None] - means).square()).sum(0) / weights).sqrt().clamp(min=floor)
        return cls(weights, centre + spread * means, spread * scales)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the logarithms of the slope there."""
        z = (x.double()[..., None] - self.means) / self.scales
        log_weights = self.weights.log()
        below = (log_weights + torch.special.log_ndtr(z)).logsumexp(-1)
        above = (log_weights + torch.special.log_ndtr(-z)).logsumexp(-1)
        lower = below <= above
        tail = _normal_quantile(torch.where(lower, below, above))
        u = torch.where(lower, tail, -tail)
        log_density = (log_weights - self.scales.log() - z.square() / 2).logsumexp(-1)
        return u, log_density + u.square() / 2

    def inverse(self, u: Tensor) -> Tensor:
        """Return the points whose images are `u`, by Newton's method inside a bracket that is known in closed form."""
        with torch.no_grad():
            goal = u.detach().double().reshape(-1)
            ends = self.means + self.scales * goal[:, None]  # F is on one side of Phi(u) at each of them
            low, high = ends.amin(1), ends.amax(1)
            x, rest = (low + high) / 2, torch.arange(len(goal), device=goal.device)
            for _ in range(ROUNDS):
                if len(rest) == 0:
                    break
                at, (value, log_slope) = x[rest], self(x[rest])
                error = value - goal[rest]
                low, high = torch.where(error < 0, at, low), torch.where(error < 0, high, at)
                newton = at - error * (-log_slope).exp()
                better = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
                moved = (better - at).abs() > ROUNDING * torch.maximum(at.abs(), self.scales.amin())
                going = moved & (error.abs() > ROUNDING * goal[rest].abs().clamp(min=1))
                rest, low, high = rest[going], low[going], high[going]
                x[rest] = better[going]
            x = x.reshape(u.shape)
        return _with_gradient(self, x, u)

    def describe(self) -> dict[str, Any]:
        """Return the kind and the number of components."""
        return {"kind": self.kind, "components": len(self.weights)}


@final
class Steps(Marginal):
    r"""The transform of whole numbers plus uniform noise, $x = a + b (j + U[0, 1))$.

    The distribution function is linear on each level, and its slope there is the probability of the level over its
    width. Below the lowest level and above the highest one, the image goes on with slope 1 / width, so that every
    number has an image and a density. One level is the uniform distribution.

    Args:
        mass: The probabilities of what is below, of the levels `low, low + 1, ...`, and of what is above, positive,
            with shape `(levels + 2,)`; they are divided by their sum.
        low: The lowest level.
        start: Where level 0 begins, $a$.
        width: The width of a level, $b$, which is 1 unless whole numbers were scaled.

    Examples:
        >>> column = Steps(torch.tensor([0.01, 0.49, 0.49, 0.01]), low=3)
        >>> column(torch.tensor([4.0]))[0], column.inverse(torch.tensor([0.0]))
        (tensor([0.], dtype=torch.float64), tensor([4.], dtype=torch.float64))
        >>> Steps(torch.tensor([0.01, 0.98, 0.01]), low=0, start=-60.0, width=120.0)(torch.tensor([0.0]))[0]
        tensor([0.], dtype=torch.float64)
    """

    kind = "steps"
    UNITS = ("mass",)
    mass: Tensor

    def __init__(self, mass: Tensor, low: int, start: float = 0.0, width: float = 1.0) -> None:
        super().__init__()
        if mass.ndim != 1 or len(mass) < 3:
            raise ValueError(f"mass has shape {tuple(mass.shape)}, but should be of shape (levels + 2,).")
        if not bool((mass.isfinite() & (mass > 0)).all()):
            raise ValueError(f"mass is {mass.tolist()}, but should hold positive, finite numbers.")
        if not math.isfinite(start):
            raise ValueError(f"start is {start}, but should be finite.")
        if not 0 < width < math.inf:
            raise ValueError(f"width is {width}, but should be positive and finite.")
        self.low, self.start, self.width = low, start, width
        self.register_buffer("mass", mass.double() / mass.double().sum())

    @classmethod
    def fit(
        cls,
        x: Tensor,
        weight: Tensor | None = None,
        *,
        pseudo_count: float = 0.5,
        low: int | None = None,
        high: int | None = None,
        start: float = 0.0,
        width: float = 1.0,
        name: str = "x",
    ) -> Steps:
        """Count the levels of a column.

        Args:
            x: The column of levels, with their noise or without it, with shape `(n,)`.
            weight: The weights of the rows, not negative, with shape `(n,)`; None for ones.
            pseudo_count: What is added to the count of each level, of all levels below, and of all above.
            low: The lowest level; that of the column by default.
            high: The highest level, likewise.
            start: Where level 0 begins.
            width: The width of a level.
            name: What an error calls the column.

        Examples:
            >>> Steps.fit(torch.tensor([0.3, 0.7, 2.1])).mass * 5.5
            tensor([0.5000, 2.5000, 0.5000, 1.5000, 0.5000], dtype=torch.float64)
        """
        if not 0 < pseudo_count < math.inf:
            raise ValueError(f"pseudo_count is {pseudo_count}, but should be positive.")
        place = (x.double() - start) / width
        values, mass = _distinct(place.floor(), weight, name)
        first, last = int(values[0]) if low is None else low, int(values[-1]) if high is None else high
        if values[0] < first or values[-1] > last:
            raise ValueError(
                f"{name} has levels from {int(values[0])} to {int(values[-1])}, but should have levels from {first} to "
                f"{last}."
            )
        counts = mass.new_full((last - first + 3,), pseudo_count)
        counts[(values - first).long() + 1] += mass * (len(x) if weight is None else float(weight.double().sum()))
        return cls(counts, first, start, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the logarithms of the slope there."""
        u, log_slope = self._images(x[..., None], self.mass[None])
        return u[..., 0], log_slope[..., 0]

    def inverse(self, u: Tensor) -> Tensor:
        """Return the points whose images are `u`."""
        return self._points(u[..., None], self.mass[None])[..., 0]

    def describe(self) -> dict[str, Any]:
        """Return the kind, the lowest level, the number of levels, and where they lie."""
        place = {"start": self.start, "width": self.width}
        return {"kind": self.kind, "low": self.low, "levels": len(self.mass) - 2, **place}

    def _images(self, x: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the logarithms of the slope of columns with these levels, by their probabilities.

        Args:
            x: The points, with shape `(*batch, columns)`.
            mass: The `mass` of each column, with shape `(columns, levels + 2)`.
        """
        place = (x.double() - self.start) / self.width - self.low
        levels, (below, above) = mass.shape[1] - 2, _ends(mass)
        level = place.detach().floor().clamp(0, levels - 1)
        share, j, at = (place - level).clamp(0, 1), level.long(), torch.arange(len(mass), device=mass.device)
        here = mass[at, j + 1]
        left, right = below[at, j] + here * share, above[at, j + 1] + here * (1 - share)
        first, last = (_quantile(below[at, k], above[at, k]) for k in (j, j + 1))
        u = _quantile(left, right).clamp(first, last)  # rounding must not reach another level
        log_slope = here.log() + u.square() / 2 + LOG_SQRT_TWO_PI
        beyond = place - place.clamp(0, levels)
        outside = beyond != 0
        lowest, highest = (_quantile(below[:, k], above[:, k]) for k in (0, -1))
        edge = torch.where(beyond < 0, lowest, highest)
        log_slope = torch.where(outside, 0.0, log_slope) - math.log(self.width)
        return torch.where(outside, edge + beyond, u), log_slope

    def _points(self, u: Tensor, mass: Tensor) -> Tensor:
        """Return the points of columns with these levels whose images are `u`; see `_images`."""
        u = u.double()
        levels, (below, above) = mass.shape[1] - 2, _ends(mass)
        knots = _quantile(below, above)
        inside, at = u.clamp(knots[:, 0], knots[:, -1]), torch.arange(len(mass), device=mass.device)
        by_column = inside.detach().reshape(-1, len(mass)).T.contiguous()
        j = torch.searchsorted(knots.contiguous(), by_column, right=True).T.reshape(inside.shape)
        j = (j - 1).clamp(0, levels - 1)
        here = mass[at, j + 1]
        left = (torch.special.ndtr(inside) - below[at, j]) / here
        right = (torch.special.ndtr(-inside) - above[at, j + 1]) / here
        share = torch.where(inside < 0, left, 1 - right).clamp(0, 1 - 1e-9)  # nor here
        beyond = u - inside
        place = torch.where(beyond > 0, levels + beyond, j + share)
        return self.start + self.width * (self.low + torch.where(beyond < 0, beyond, place))


@final
class Marginals(nn.Module):
    r"""One transform for each column, $u_i = \Phi^{-1}(F_i(x_i))$.

    The density of $x$ follows from that of $u$ by the log-determinant, $\log p(x) = \log p(u) + \sum_i \log u_i'(x_i)$.
    A flow takes it as `marginals`, and then works on $u$. A file holds the state and the description.

    Args:
        columns: The transforms of the columns.

    Examples:
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).exp()
        >>> marginals = Marginals.fit(x, components=4)
        >>> u, log_det = marginals(x)
        >>> u.shape, log_det.shape, bool((u.std(0) - 1).abs().max() < 0.05)
        (torch.Size([1000, 2]), torch.Size([1000]), True)
        >>> other = Marginals.from_description(marginals.description)
        >>> other.load_state_dict(marginals.state_dict())
        <All keys matched successfully>
        >>> bool((other.inverse(u) - x).abs().max() < 1e-6)
        True
    """

    def __init__(self, columns: Sequence[Marginal]) -> None:
        super().__init__()
        if not columns:
            raise ValueError("columns is empty, but should hold one transform for each column.")
        self.columns = nn.ModuleList(columns)

    @classmethod
    def fit(
        cls,
        x: Tensor,
        weight: Tensor | None = None,
        kinds: Sequence[str] | None = None,
        *,
        components: int = 8,
        iterations: int = 60,
        floor: float = 0.05,
        pseudo_count: float = 0.5,
    ) -> Marginals:
        """Fit a transform to each column.

        Args:
            x: The rows, with shape `(n, columns)`.
            weight: The weights of the rows, not negative, with shape `(n,)`; None for ones.
            kinds: For each column one of mixture, steps and identity; mixture by default.
            components: The number of components of a mixture.
            iterations: The number of its iterations.
            floor: The smallest standard deviation of a component, as a share of that of the column.
            pseudo_count: What is added to the count of each step.
        """
        if x.ndim != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, but should be of shape (n, columns).")
        kinds = ("mixture",) * x.shape[1] if kinds is None else kinds
        if len(kinds) != x.shape[1]:
            raise ValueError(f"kinds has {len(kinds)} entries, but should have {x.shape[1]}, one for each column.")
        columns: list[Marginal] = []
        for i, kind in enumerate(kinds):
            check_choice(f"kinds[{i}]", kind, _KINDS)
            name = f"column {i} of x"
            if kind == "mixture":
                columns.append(
                    Mixture.fit(x[:, i], weight, components=components, iterations=iterations, floor=floor, name=name)
                )
            elif kind == "steps":
                columns.append(Steps.fit(x[:, i], weight, pseudo_count=pseudo_count, name=name))
            else:
                columns.append(Identity())
        return cls(columns)

    @classmethod
    def from_description(cls, description: Sequence[Mapping[str, Any]]) -> Marginals:
        """Return transforms of the described kinds, whose numbers `load_state_dict` fills in."""
        columns: list[Marginal] = []
        for i, each in enumerate(description):
            check_choice(f"the kind of column {i}", each["kind"], _KINDS)
            if each["kind"] == "mixture":
                columns.append(Mixture(*torch.ones(3, each["components"])))
            elif each["kind"] == "steps":
                place = (each.get("start", 0.0), each.get("width", 1.0))  # older files do not have them
                columns.append(Steps(torch.ones(each["levels"] + 2), each["low"], *place))
            else:
                columns.append(Identity())
        return cls(columns)

    @property
    def description(self) -> list[dict[str, Any]]:
        """What `from_description` makes the same transforms of, as values of JSON."""
        return [column.describe() for column in self._transforms()]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images `(*batch, columns)` and the log-determinants `(*batch,)`, in float64."""
        self._check("x", x)
        if (alike := self._alike()) is not None:
            u, log_slope = alike[0]._images(x, alike[1])
            return u, log_slope.sum(-1)
        images, slopes = zip(*(column(x[..., i]) for i, column in enumerate(self._transforms())), strict=True)
        return torch.stack(images, -1), torch.stack(slopes, -1).sum(-1)

    def inverse(self, u: Tensor) -> Tensor:
        """Return the points `(*batch, columns)` whose images are `u`, in float64."""
        self._check("u", u)
        if (alike := self._alike()) is not None:
            return alike[0]._points(u, alike[1])
        return torch.stack([column.inverse(u[..., i]) for i, column in enumerate(self._transforms())], -1)

    def _transforms(self) -> list[Marginal]:
        return list(self.columns)  # type: ignore[arg-type]

    def _alike(self) -> tuple[Steps, Tensor] | None:
        """Return one column and the probabilities of all, if they have the same levels, as the pixels of images do.

        Such columns are transformed at once.
        """
        columns = [column for column in self.columns if isinstance(column, Steps)]
        levels = {(column.low, column.start, column.width, len(column.mass)) for column in columns}
        if len(columns) < len(self.columns) or len(levels) > 1:
            return None
        return columns[0], torch.stack([column.mass for column in columns])

    def _check(self, name: str, value: Tensor) -> None:
        if value.ndim == 0 or value.shape[-1] != len(self.columns):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but should end in {len(self.columns)}, one for each column."
            )


_KINDS = (Mixture.kind, Steps.kind, Identity.kind)


def _ends(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mass below and above each knot of columns of steps, `(columns, levels + 1)`."""
    return mass[:, :-1].cumsum(1), mass[:, 1:].flip(1).cumsum(1).flip(1)


def _quantile(below: Tensor, above: Tensor) -> Tensor:
    """Return the normal quantile of the mass below a point by the smaller of it and the mass above."""
    lower = below <= above
    tail = torch.special.ndtri(torch.where(lower, below, above))
    return torch.where(lower, tail, -tail)


def _distinct(x: Tensor, weight: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Return the distinct values of a column in order, and the shares of the weight on them, in float64."""
    if x.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but should be of shape (n,).")
    if bad := int((~x.isfinite()).sum()):
        raise ValueError(f"{name} holds {bad} numbers that are not finite, but should hold none.")
    weight = torch.ones_like(x, dtype=torch.float64) if weight is None else weight.detach().double()
    check_shape("weight", weight, tuple(x.shape))
    if not bool((weight.isfinite() & (weight >= 0)).all()) or not bool(weight.sum() > 0):
        raise ValueError("weight holds values that are negative or not finite, or only zeros, but should be positive.")
    values, place = torch.unique(x.detach().double()[weight > 0], return_inverse=True)
    if len(values) < 2:
        raise ValueError(f"{name} is constant, {values[0].item():g}, but should have at least 2 distinct values.")
    mass = torch.zeros_like(values).index_add_(0, place, weight[weight > 0])
    return values, mass / mass.sum()


def _normal_quantile(log_p: Tensor) -> Tensor:
    r"""Return $\Phi^{-1}(e^{\log p})$ for $\log p \leq \log 1/2$, also where $p$ itself underflows.

    The first guess is the quantile, or its asymptote, $-\sqrt{-2 \log p}$, which Newton's method on the logarithm
    makes exact; its last step carries the gradient.
    """
    with torch.no_grad():
        given = log_p.detach()
        deep = given < LOWEST_LOG
        asymptote = -(-2 * given.clamp(max=-1.0)).sqrt()
        u = torch.where(deep, asymptote, torch.special.ndtri(given.clamp(min=LOWEST_LOG).exp()))
        for _ in range(3):
            u = torch.where(deep, u - (torch.special.log_ndtr(u) - given) * _inverse_hazard(u), u)
    exact: Tensor = u - (torch.special.log_ndtr(u) - log_p) * _inverse_hazard(u)
    return exact


def _inverse_hazard(u: Tensor) -> Tensor:
    r"""Return $\Phi(u) / \varphi(u)$."""
    log_ratio: Tensor = torch.special.log_ndtr(u) + u.square() / 2 + LOG_SQRT_TWO_PI
    return log_ratio.exp()


def _with_gradient(transform: Marginal, x: Tensor, u: Tensor) -> Tensor:
    """Return the inverse `x` of `u` with its gradient, that of the inverse function."""
    if not u.requires_grad:
        return x
    slope: Tensor = transform(x)[1].exp()
    return x + (u.double() - u.detach().double()) / slope
