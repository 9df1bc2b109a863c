"""A Forward-Backward representation: its three networks with the units of the states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from flowmatch_core._tensors import broadcast, check_shape, noise_like
from flowmatch_core._units import UnitsModule, check_pair
from flowmatch_core.forward_backward.latents import reward_weights
from flowmatch_core.forward_backward.losses import pessimistic
from flowmatch_core.forward_backward.networks import Actor, BackwardMap, ForwardMap

__all__ = ["ForwardBackward"]


@final
class ForwardBackward(UnitsModule):
    r"""A family of policies $\pi_z$ with a policy for every reward, and their successor measures.

    $$
    M^{\pi_z}(dx|s,a) \approx F^z(s,a)^\top B(x)\,\rho(dx), \qquad
    \pi_z(s) \approx \operatorname{argmax}_a F^z(s,a)^\top z, \qquad
    z_r = \sqrt d\,\frac{E_\rho[r(x) B(x)]}{|E_\rho[r(x) B(x)]|}
    $$

    The losses are `fb_loss`, `fb_orthonormality_loss` and `fb_actor_loss`, functions of the features below; the law of
    z in training is `draw_latents`. States are in raw units, actions in $[-1, 1]$, and z has norm $\sqrt d$. The model
    is made anew by `ForwardBackward(**model.config)` and `load_state_dict`.

    Args:
        state_dim: The number of dimensions of a state.
        action_dim: The number of dimensions of an action.
        latent_dim: The number $d$ of features.
        goal: The numbers of the entries of a state that B sees, all by default. Rewards should depend on no other.
        frequencies: The number of frequencies $2^k \pi / 2$ at which the sine and cosine of the standardised `goal` are
            further inputs of all networks; 0 for none.
        width: The width of the hidden layers.
        depth: The number of hidden layers of a head of F, and of the actor after its streams; B has one more.
        heads: The number of heads of F.
        loc: The location of the states, with shape `(state_dim,)`; 0 by default.
        scale: The scale of the states, with shape `(state_dim,)`; 1 by default.
        generator: The source of randomness of the initial weights.

    References:
        - Learning One Representation to Optimize All Rewards (Touati & Ollivier, 2021),
          https://arxiv.org/abs/2103.07945

    Examples:
        >>> model = ForwardBackward(state_dim=4, action_dim=2, latent_dim=8, goal=(0, 1), width=16)
        >>> s = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> z = model.reward_weights(lambda x: -x[:, :2].norm(dim=1), s)
        >>> z.shape, model.act(s, z).shape
        (torch.Size([8]), torch.Size([100, 2]))
        >>> again = ForwardBackward(**model.config)
        >>> _ = again.load_state_dict(model.state_dict())
        >>> torch.equal(again.act(s, z), model.act(s, z))
        True
    """

    loc: Tensor
    scale: Tensor
    omega: Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        latent_dim: int,
        *,
        goal: Sequence[int] | None = None,
        frequencies: int = 0,
        width: int = 256,
        depth: int = 1,
        heads: int = 2,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.goal = tuple(range(state_dim)) if goal is None else tuple(goal)
        if not self.goal or not all(0 <= entry < state_dim for entry in self.goal):
            raise ValueError(f"goal is {self.goal}, but should hold numbers from 0 to {state_dim - 1}.")
        check_pair(loc, scale)
        for name, unit, default in (("loc", loc, torch.zeros), ("scale", scale, torch.ones)):
            if unit is not None:
                check_shape(name, unit, (state_dim,))
            self._register_units(name, default(state_dim) if unit is None else unit)
        self._config: dict[str, Any] = {
            "state_dim": state_dim,
            "action_dim": action_dim,
            "latent_dim": latent_dim,
            "goal": list(self.goal),
            "frequencies": frequencies,
            "width": width,
            "depth": depth,
            "heads": heads,
        }
        self.latent_dim = latent_dim
        self.register_buffer("omega", math.pi / 2 * 2.0 ** torch.arange(frequencies), persistent=False)
        waves = 2 * frequencies * len(self.goal)
        self.forward_network = ForwardMap(
            state_dim + waves, action_dim, latent_dim, width, depth, heads, generator=generator
        )
        self.backward_network = BackwardMap(len(self.goal) + waves, latent_dim, width, depth + 1, generator=generator)
        self.actor_network = Actor(state_dim + waves, action_dim, latent_dim, width, depth, generator=generator)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make the networks, numbers and lists of them; the units are in the `state_dict`."""
        return dict(self._config)

    def forward_map(self, state: Tensor, action: Tensor, z: Tensor) -> Tensor:
        """Return the features F of all heads.

        Args:
            state: The states, with shape `(batch, state_dim)`.
            action: The actions, with shape `(batch, action_dim)`.
            z: The parameters of the policies, with shape `(batch, d)`, or `(d,)` for one policy.

        Returns:
            The features, with shape `(heads, batch, d)`.
        """
        inputs = self._inputs(state)
        features: Tensor = self.forward_network(inputs, action.to(inputs.dtype), self._latents(z, inputs))
        return features

    def backward_map(self, state: Tensor) -> Tensor:
        """Return the features B of states `(batch, state_dim)`, of norm √d, with shape `(batch, d)`."""
        standard = self._standardised(state)[:, self.goal]
        features: Tensor = self.backward_network(torch.cat([standard, self._waves(standard)], -1))
        return features

    def policy(
        self,
        state: Tensor,
        z: Tensor,
        *,
        noise: float = 0.0,
        clip: float = 0.3,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Return the actions of the policies, with gradients and, in training, with noise.

        The noise is $N(0, \sigma^2 I)$, cut off at `clip`; it smooths F over actions. The sum is cut off at ±1, with
        the gradient of the actor's action there.

        References:
            - Addressing Function Approximation Error in Actor-Critic Methods (Fujimoto et al., 2018), section 5.3,
              https://arxiv.org/abs/1802.09477

        Args:
            state: The states, with shape `(batch, state_dim)`.
            z: The parameters of the policies, with shape `(batch, d)`, or `(d,)` for one policy.
            noise: The standard deviation $\sigma$.
            clip: The largest size of an entry of the noise.
            generator: The source of randomness.

        Returns:
            The actions, with shape `(batch, action_dim)`, in [-1, 1].
        """
        inputs = self._inputs(state)
        action: Tensor = self.actor_network(inputs, self._latents(z, inputs))
        if not noise:
            return action
        moved = action + (noise * noise_like(action, generator)).clamp(-clip, clip)
        return action + (moved.clamp(-1, 1) - action).detach()

    @torch.no_grad()
    def act(self, state: Tensor, z: Tensor) -> Tensor:
        """Return the actions of the policies, without gradients or noise; see `policy`."""
        return self.policy(state, z)

    def value(self, state: Tensor, action: Tensor, z: Tensor, *, pessimism: float = 0.0) -> Tensor:
        """Return Q = F·z, the mean of the heads, or with `pessimism` 1 the least of them, with shape `(batch,)`."""
        features = self.forward_map(state, action, z)
        return pessimistic((features * z.to(features.dtype)).sum(-1), pessimism)

    @torch.no_grad()
    def reward_weights(self, reward: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """Return the parameters of the policy for a reward, from states that are drawn like those in training.

        Args:
            reward: The reward, which maps states `(n, state_dim)` to `(n,)`.
            state: The states, with shape `(n, state_dim)`.

        Returns:
            The parameters, with shape `(d,)`.
        """
        features = self.backward_map(state)
        return reward_weights(reward(state).to(features.dtype), features)

    def _standardised(self, state: Tensor) -> Tensor:
        if state.ndim != 2 or state.shape[1] != len(self.loc):
            raise ValueError(f"state has shape {tuple(state.shape)}, but should have shape (batch, {len(self.loc)}).")
        return ((state - self.loc) / self.scale).to(self.omega.dtype)

    def _waves(self, goal: Tensor) -> Tensor:
        angles = (goal[..., None] * self.omega).flatten(1)
        return torch.cat([angles.sin(), angles.cos()], -1)

    def _inputs(self, state: Tensor) -> Tensor:
        """Return what F and the actor see of states."""
        standard = self._standardised(state)
        return torch.cat([standard, self._waves(standard[:, self.goal])], -1)

    def _latents(self, z: Tensor, inputs: Tensor) -> Tensor:
        return broadcast("z", z.to(inputs.dtype), (len(inputs), self.latent_dim))
