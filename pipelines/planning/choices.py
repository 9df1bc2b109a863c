"""How the candidates of a plan are compared: by samples of a horizon model, or by simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import GeometricHorizonModel, gpi
from pipelines.environments import Array, Family, Simulator

Choose = Callable[[Array, Array, Array], NDArray[np.int64]]
"""`(states (n, d), actions (n, N, a), w (n, N, dw)) -> chosen candidates (n,)`; candidate 0 is the default.

An action is that of its candidate's policy in the row's state.
"""
Reward = Callable[[Array], Array]
"""A reward of states, (n, d) -> (n,)."""


@dataclass(frozen=True)
class ByModel:
    """The candidate with the greatest value by a horizon model; see `flowmatch_core.successor.gpi`.

    Attributes:
        model: Model that is conditioned on state, action and w.
        reward: Reward of states.
        samples: Samples per candidate.
        margin: Standard errors by which a candidate must exceed the default.
        generator: Source of the noise, which the candidates of a state share.
    """

    model: GeometricHorizonModel
    reward: Reward
    samples: int
    margin: float
    generator: torch.Generator

    def __call__(self, state: Array, actions: Array, w: Array) -> NDArray[np.int64]:
        """Return the number of the chosen candidate of each row."""
        given = (torch.tensor(part, dtype=torch.float32, device=self.generator.device) for part in (state, actions, w))
        try:
            plan = gpi(
                self.model, self._of_samples, *given, samples=self.samples, margin=self.margin, generator=self.generator
            )
        except SolverError:  # a model that diverges gives no reason to leave the default
            return np.zeros(len(state), dtype=np.int64)
        index: NDArray[np.int64] = plan.index.cpu().numpy()
        return index

    def _of_samples(self, x: Tensor) -> Tensor:
        reward = self.reward(x.double().cpu().numpy())
        return torch.from_numpy(np.ascontiguousarray(reward, dtype=np.float64)).to(x.device)


@dataclass(frozen=True)
class BySimulation:
    r"""The candidate with the greatest $\sum_{k < n} \gamma^k r(S_{k+1})$ along one rollout of its policy.

    This is GPI without the error of a model, if the dynamics are deterministic and $\gamma^n$ is small.

    Attributes:
        simulator: Environment in which the rollouts are.
        family: Policies of the candidates.
        reward: Reward of states.
        gamma: Discount per transition.
        steps: Transitions n of a rollout.
        rng: Source of randomness.
    """

    simulator: Simulator
    family: Family
    reward: Reward
    gamma: float
    steps: int
    rng: np.random.Generator

    def __call__(self, state: Array, actions: Array, w: Array) -> NDArray[np.int64]:
        """Return the number of the chosen candidate of each row."""
        n, candidates = w.shape[:2]
        now, action, each = (
            state.repeat(candidates, 0),
            actions.reshape(-1, actions.shape[-1]),
            w.reshape(-1, w.shape[-1]),
        )
        value = np.zeros(len(now))
        for k in range(self.steps):
            now = self.simulator.step(now, action, self.rng)
            value += self.gamma**k * self.reward(now)
            action = self.family.act(now, each)
        index: NDArray[np.int64] = value.reshape(n, candidates).argmax(1)
        return index
