"""The linear-Gaussian spiral, a decision process with closed-form successor measure and values."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np
from pydantic import Field

from pipelines.environments import Array, Simulator, _family
from pipelines.environments._family import FamilySettings

if TYPE_CHECKING:
    from flowmatch_core.oracles import LinearGaussianMDP


class Settings(FamilySettings):
    """The dynamics of the spiral and the location of its reward."""

    contraction: float = Field(0.99, ge=0, lt=1, description="factor of the radius per step, the spectral radius of F")
    angle: float = Field(0.15, ge=-np.pi, le=np.pi, description="turn per step, radians")
    noise: float = Field(0.03, gt=0, le=10, description="standard deviation of the noise of a step, per axis")
    action_scale: float = Field(0.15, gt=0, le=10, description="standard deviation of the covering actions, per axis")
    goal: tuple[float, float] = Field((1.0, 0.0), description="centre of the reward's bump")
    width: float = Field(0.5, gt=0, le=100, description="standard deviation of the reward's bump")


@final
class Spiral(Simulator):
    r"""The spiral: actions displace the state, the dynamics contract it, and the policy rotates it about the origin.

    $$ s' = \rho (s + a) + w, \quad w \sim N(0, \sigma^2 I), \qquad \pi(s) = (R_\theta - I) s $$

    In the notation of `LinearGaussianMDP`: $A = B = \rho I$, $c = 0$, $W = \sigma^2 I$, $K = R_\theta - I$ and
    $k = 0$, so that $F = A + BK = \rho R_\theta$.
    """

    state_names = ("x", "y")
    action_names = ("ux", "uy")
    bounds = (-2.5, -2.5, 2.5, 2.5)
    source = "own definition: the two-dimensional, solvable analogue of the maze's loop"
    fidelity = "exact: the successor measure and the values are known in closed form"

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.family = _family.own(settings, len(self.action_names))

    @cached_property
    def gain(self) -> Array:
        """Gain matrix K of the policy, (2, 2)."""
        cos, sin = np.cos(self.settings.angle), np.sin(self.settings.angle)
        return np.array([[cos - 1, -sin], [sin, cos - 1]])

    def policy(self, state: Array) -> Array:
        """Return the displacement that rotates the state by the angle."""
        return state @ self.gain.T

    def step(self, state: Array, action: Array, rng: np.random.Generator) -> Array:
        """Return the state after one noisy step."""
        noise = self.settings.noise * rng.standard_normal(state.shape)
        return self.settings.contraction * (state + action) + noise

    def actions(self, rng: np.random.Generator, n: int) -> Array:
        """Draw actions from N(0, action_scale^2 I)."""
        return self.settings.action_scale * rng.standard_normal((n, 2))

    def coverage(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Draw states from N(0, I), and actions independent of them."""
        return rng.standard_normal((n, 2)), self.actions(rng, n)

    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """Draw states from N(0, I)."""
        return rng.standard_normal((n, 2))

    def rewards(self, state: Array) -> dict[str, Array]:
        """Return the reward `bump`: a Gaussian of height 1 at the goal."""
        squared = ((state - np.array(self.settings.goal)) ** 2).sum(-1) / self.settings.width**2
        return {"bump": np.exp(-squared / 2)}

    def oracle(self) -> LinearGaussianMDP | None:
        """Return the same process in closed form, float64; None with a family, whose policies need not be linear."""
        if self.family is not None:
            return None
        import torch

        from flowmatch_core.oracles import LinearGaussianMDP

        eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        pull = self.settings.contraction * eye
        return LinearGaussianMDP(
            A=pull, B=pull, c=zero, W=self.settings.noise**2 * eye, K=torch.from_numpy(self.gain), k=zero
        )

    def exact_values(self, state: Array, action: Array, gamma: float) -> dict[str, Array]:
        """Return the value of the bump, a sum of Gaussian integrals; none with a family."""
        import torch

        oracle = self.oracle()
        if oracle is None:
            return {}
        goal = torch.tensor(self.settings.goal, dtype=torch.float64)
        spread = self.settings.width**2 * torch.eye(2, dtype=torch.float64)
        value = oracle.value_bump(torch.from_numpy(state), torch.from_numpy(action), gamma, goal=goal, spread=spread)
        return {"bump": value.numpy()}


def build(settings: Settings) -> Spiral:
    """Return the spiral for the given settings.

    >>> spiral = build(Settings(contraction=0.5, angle=np.pi / 2, noise=1e-9))
    >>> state = np.array([[1.0, 0.0]])
    >>> (spiral.step(state, spiral.policy(state), np.random.default_rng(0)) + 0.0).round(6)
    array([[0. , 0.5]])
    """
    return Spiral(settings)


sources = _family.sources
