"""Small networks by TD3 (Fujimoto et al. 2018, arXiv 1802.09477), trained by stable-baselines3 on batches of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3 import TD3
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv

from pipelines.environments import Array
from pipelines.environments._actor import FARTHEST, Actor
from pipelines.environments._suite import Domain

SEEN = 40  # episodes of random actions that give location and scale of the observations


@dataclass(frozen=True)
class ActorCritic:
    """TD3 on standardised observations, whose location and scale are those of episodes with random actions.

    Attributes:
        action_repeat: Control steps that an action lasts.
        rounds: Number of candidates.
        steps: Transitions between two candidates.
        rows: Episodes that are simulated together.
        updates: Gradient steps for each step of the rows.
        width: Units of each of the two hidden layers.
        batch: Transitions of a gradient step.
        lr: Learning rate.
        gamma: Discount per transition.
        noise: Standard deviation of the noise on actions.
        length: Control steps until an episode is cut off, so that training sees many starts.
        first: Transitions with random actions before the first update.
    """

    action_repeat: int = 2
    rounds: int = 16
    steps: int = 16_000
    rows: int = 16
    updates: int = 4
    width: int = 128
    batch: int = 256
    lr: float = 1e-3
    gamma: float = 0.98
    noise: float = 0.2
    length: int = 500
    first: int = 10_000

    def candidates(self, domain: Domain, seed: int) -> Iterator[Actor]:
        """Yield the actor after each round."""
        torch.set_num_threads(1)
        rng = np.random.default_rng(seed)
        length, actions = self.length // self.action_repeat, len(domain.action_names)
        seen, *_ = domain.perform(lambda state: domain.actions(rng, len(state)), SEEN, length, rng)
        loc, scale = seen.mean((0, 1)), seen.std((0, 1))
        model = TD3(
            "MlpPolicy",
            Rows(domain, self.rows, length, loc, scale, rng),
            policy_kwargs={"net_arch": [self.width, self.width]},
            learning_rate=self.lr,
            learning_starts=self.first,
            batch_size=self.batch,
            gamma=self.gamma,
            gradient_steps=self.updates,
            buffer_size=self.rounds * self.steps,
            action_noise=NormalActionNoise(np.zeros(actions), np.full(actions, self.noise)),
            seed=seed,
            device="cpu",
        )
        for number in range(self.rounds):
            model.learn(self.steps, reset_num_timesteps=number == 0)
            yield _actor(model, loc, scale)


class Rows(VecEnv):
    """Rows of a domain as environments that a time limit cuts off together."""

    render_mode = None

    def __init__(self, domain: Domain, n: int, length: int, loc: Array, scale: Array, rng: np.random.Generator) -> None:
        self.domain, self.length, self.loc, self.scale, self.rng = domain, length, loc, scale, rng
        self.age, self.action = 0, np.zeros((n, len(domain.action_names)))
        self.state, self.physics = domain.begin(rng, n)
        seen = Box(-FARTHEST, FARTHEST, (len(loc),), np.float32)
        super().__init__(n, seen, Box(-1, 1, (len(domain.action_names),), np.float32))

    def reset(self) -> np.ndarray:
        """Begin new episodes."""
        self.age = 0
        self.state, self.physics = self.domain.begin(self.rng, self.num_envs)
        return self._seen()

    def step_async(self, actions: np.ndarray) -> None:
        """Note the actions."""
        self.action = actions.astype(np.float64)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Take the noted actions, and begin new episodes where these are cut off, which is no terminal state."""
        self.age += 1
        self.state, self.physics = self.domain.move(self.physics, self.action)
        reward = self.domain.rewards(self.state)[self.domain.settings.task].astype(np.float32)
        over, seen = self.age == self.length, self._seen()
        infos = [{"TimeLimit.truncated": True, "terminal_observation": row} if over else {} for row in seen]
        return self.reset() if over else seen, reward, np.full(self.num_envs, over), infos

    def _seen(self) -> np.ndarray:
        standard = np.clip((self.state - self.loc) / self.scale, -FARTHEST, FARTHEST)
        return standard.astype(np.float32)

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def get_attr(self, attr_name: str, indices: object = None) -> list[Any]:
        """Return an attribute of the rows, which share it."""
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: object, indices: object = None) -> None:
        """Refuse: the rows have no attributes of their own."""
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: object = None, **kwargs: Any) -> list[Any]:
        """Refuse: the rows have no methods of their own."""
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type, indices: int | Iterable[int] | None = None) -> list[bool]:
        """Return that no row is wrapped."""
        return [False] * self.num_envs


def _actor(model: TD3, loc: Array, scale: Array) -> Actor:
    """Return the actor of a model."""
    linear = [layer for layer in model.actor.mu if isinstance(layer, torch.nn.Linear)]
    layers = tuple((layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in linear)
    return Actor(loc, scale, layers)
