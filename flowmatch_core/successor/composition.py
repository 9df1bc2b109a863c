r"""Compositions of horizon models at test time: longer discounts, and policies that switch.

A process follows the policy $\pi_1$, and in each state that it comes to it changes for good to $\pi_2$ with probability
$\alpha_1$, then from that to $\pi_3$ with probability $\alpha_2$, and so on. With $\beta_k = \gamma (1 - \alpha_k)$ for
$k < n$ and $\beta_n = \gamma$ its successor measure is a mixture of chains of the models of the single policies,

$$
m = \sum_{k=1}^n w_k\, m_{\beta_1}^{\pi_1} \cdots m_{\beta_k}^{\pi_k}, \qquad
w_k = \frac{1-\gamma}{1-\beta_k} \prod_{i<k} \frac{\gamma-\beta_i}{1-\beta_i}, \qquad \sum_k w_k = 1,
$$

where a chain draws $Y_1 \sim m_{\beta_1}^{\pi_1}(\cdot|s,a)$, then
$Y_2 \sim m_{\beta_2}^{\pi_2}(\cdot|Y_1,\pi_2(Y_1))$, up to $Y_k$. With one policy this is, for any $\beta \le \gamma$,

$$
m_\gamma = \frac{1-\gamma}{1-\beta} m_\beta + \frac{\gamma-\beta}{1-\beta} m_\beta m_\gamma,
$$

and put into itself it gives $m_\gamma$ from $m_\beta$ alone.

References:
    - Generalised Policy Improvement with Geometric Policy Composition (Thakoor et al., 2022),
      https://arxiv.org/abs/2206.08736
    - Gamma-Models: Generative Temporal Difference Learning for Infinite-Horizon Prediction (Janner et al., 2020),
      theorem 1, https://arxiv.org/abs/2010.14496
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from flowmatch_core.successor.geometric import check_gamma
from flowmatch_core.successor.horizon_model import HorizonModel

__all__ = ["ComposedHorizonModel", "composition_weights"]

Policy = Callable[[Tensor], Tensor | None]
"""The actions `(batch, p)` of states `(batch, d)`; None for models that are conditioned on the state alone."""


def composition_weights(betas: Sequence[float], gamma: float) -> list[float]:
    r"""Return the weights $w_k$ of the chains of 1, 2, ..., n models in the composition at the discount `gamma`.

    The last weight is that of all the rest, $\prod_{i<n} (\gamma-\beta_i)/(1-\beta_i)$, so that their sum is 1: with
    $\beta_n = \gamma$ that is the formula's, with $\beta_n < \gamma$ the last model follows itself.

    Args:
        betas: The discounts of the models, none above `gamma`.
        gamma: The discount of the composition, in [0, 1).

    Examples:
        >>> composition_weights([0.5, 0.75], gamma=0.75)
        [0.5, 0.5]
    """
    check_gamma(gamma)
    if not betas or not all(0 <= beta <= gamma for beta in betas):
        raise ValueError(f"betas was {list(betas)}, but should be one or more numbers in [0, gamma], gamma {gamma}.")
    weights, rest = [], 1.0
    for beta in betas[:-1]:
        weights.append(rest * (1 - gamma) / (1 - beta))
        rest *= (gamma - beta) / (1 - beta)
    return [*weights, rest]


@final
class ComposedHorizonModel(HorizonModel):
    r"""The horizon model of policies that follow one another, composed of a model of each; without a density.

    A sample is the end of a chain of samples: of the first model at (s, a), with probability $1 - w_1$ of the second
    one at the state that it gave, and so on. The errors of the models add up along the chain. A model of many discounts
    gives those to compose by its method `at`. The states should not be terminal, because a model does not know them as
    a start.

    Args:
        models: The models, in the order in which their policies act. The last one follows itself where its discount is
            below `gamma`.
        policies: The policy of each model, which acts in the state where it takes over.
        gamma: The discount of the composition, at least that of every model.

    Examples:
        >>> from flowmatch_core.oracles import LinearGaussianMDP
        >>> from flowmatch_core.successor import GeometricHorizonModel
        >>> I = torch.eye(1)
        >>> mdp = LinearGaussianMDP(A=I, B=I, c=torch.ones(1), W=I, K=-I, k=torch.zeros(1))
        >>> one = GeometricHorizonModel(mdp.velocity_field(gamma=0.5), event_shape=(1,), gamma=0.5)
        >>> model = ComposedHorizonModel([one], [mdp.policy], gamma=0.75)     # horizon 4 from a model of horizon 2
        >>> s, g = torch.zeros(5, 1), torch.Generator().manual_seed(0)
        >>> model.sample(s, mdp.policy(s), 7, generator=g).shape
        torch.Size([7, 5, 1])
    """

    has_density = False

    def __init__(self, models: Sequence[HorizonModel], policies: Sequence[Policy], gamma: float) -> None:
        super().__init__(gamma, None, None)
        if len(policies) != len(models):
            raise ValueError(f"policies were {len(policies)}, but should be as many as models, {len(models)}.")
        self.weights = composition_weights([model.gamma for model in models], gamma)
        self.models, self.policies = nn.ModuleList(models), tuple(policies)

    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw `n` independent future states for every row, with shape `(n, batch, d)`."""
        first = self._model(0)
        x = first.sample(state, action, n, generator=generator)
        rows, k = x.flatten(0, 1), 0
        going = self._unstopped(torch.arange(len(rows), device=x.device), first, generator)
        while len(going):
            k = min(k + 1, len(self.models) - 1)
            model, here = self._model(k), rows[going]
            rows[going] = model.sample(here, self.policies[k](here), 1, generator=generator)[0]
            going = self._unstopped(going, model, generator)
        return rows.view_as(x)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        """Raise a `TypeError`: there is no density."""
        raise TypeError("a composition has no log_prob: its samples are the ends of chains of samples.")

    def _model(self, k: int) -> HorizonModel:
        model = self.models[k]
        assert isinstance(model, HorizonModel)
        return model

    def _unstopped(self, going: Tensor, model: HorizonModel, generator: torch.Generator | None) -> Tensor:
        """Return the rows whose chain goes on after a model of discount beta, with chance 1 - (1-gamma)/(1-beta)."""
        u = torch.rand(len(going), generator=generator, dtype=torch.float64, device=going.device)
        return going[u >= (1 - self.gamma) / (1 - model.gamma)]
