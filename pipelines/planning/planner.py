"""The policy of generalised policy improvement among the policies of a family.

>>> import numpy as np
>>> from pipelines.environments import maze
>>> family = maze.Goals()
>>> nearest = lambda state, actions, w: np.abs(w - [0.1, 0.1]).sum(-1).argmin(1)  # in place of values
>>> planner = Planner(family, nearest, np.array([-0.2, 0.2]), rng=np.random.default_rng(0))
>>> planner.act(np.zeros((3, 4))).shape, planner.w.shape
((3, 2), (3, 2))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from pipelines.base.errors import UserError
from pipelines.config.params import CandidateLaw
from pipelines.environments import Array, Family

if TYPE_CHECKING:
    from pipelines.planning.choices import Choose

NEAR = 0.5  # standard deviations of the law by which local candidates differ from the default


def fresh(family: Family, law: CandidateLaw, default: Array, n: int, rng: np.random.Generator) -> Array:
    """Draw candidates from a law D(W), (n, dw).

    Args:
        family: Policies of the candidates.
        law: `train`: the law of the training; `random`: uniform between the bounds of w; `local`: normal around the
            default. Those outside the family's law are moved to the nearest vector within.
        default: The vector w_r of the task, (dw,).
        n: Number of candidates.
        rng: Source of randomness.
    """
    size = (n, len(family.names))
    match law:
        case "train":
            return family.draw(n, rng)
        case "random":
            return family.nearest(rng.uniform(family.low, family.high, size))
        case "local":
            deviation = family.units[1] / np.sqrt(len(family.names))
            return family.nearest(default + NEAR * deviation * rng.standard_normal(size))


@final
class Planner:
    r"""A policy that plans anew every few transitions, for a batch of independent episodes.

    The candidates in a state are $w_r$, the default of the task; the w that is followed; and new ones from D(W). The
    policy $\pi_w$ of the chosen one is followed until the next plan.

    Args:
        family: Policies among which it chooses.
        choose: Comparison of the candidates, such as `ByModel`.
        default: The vector w_r, (dw,).
        law: D(W); see `fresh`.
        candidates: Number of candidates, at least 2.
        every: Transitions between two plans.
        rng: Source of candidates.

    Attributes:
        w: Vectors that are followed, (n, dw); None before the first transition.

    Raises:
        UserError: The default is outside the law of the family, or there are too few candidates.

    References:
        Barreto et al. 2017, arXiv 1606.05312; Farebrother et al. 2025, arXiv 2503.09817, section 5.3.
    """

    w: Array | None

    def __init__(
        self,
        family: Family,
        choose: Choose,
        default: Array,
        law: CandidateLaw = "train",
        *,
        candidates: int = 16,
        every: int = 4,
        rng: np.random.Generator,
    ) -> None:
        if candidates < 2 or every < 1:
            raise UserError(
                f"candidates is {candidates} and every {every}; expected at least 2, the default and the present w, "
                "and at least 1."
            )
        family.check(default[None])
        self.family, self.choose, self.default, self.law = family, choose, default, law
        self.candidates, self.every, self.rng = candidates, every, rng
        self.reset()

    def reset(self) -> None:
        """Begin new episodes: the next action is planned."""
        self.w, self._since = None, 0

    def act(self, state: Array) -> Array:
        """Return the action in each row's state, (n, states) -> (n, actions).

        Rows are those of the call before, one transition later; call `reset` before other episodes.

        Raises:
            UserError: There are more or fewer rows.
        """
        if self.w is not None and len(self.w) != len(state):
            raise UserError(f"{len(state)} states follow {len(self.w)}; expected as many, or a reset() before.")
        if self.w is None or self._since == self.every:
            self.w, self._since = self._plan(state), 0
        self._since += 1
        return self.family.act(state, self.w)

    def _plan(self, state: Array) -> Array:
        rows, size = len(state), len(self.default)
        default = np.broadcast_to(self.default, (rows, size))
        present = default if self.w is None else self.w
        new = fresh(self.family, self.law, self.default, rows * (self.candidates - 2), self.rng)
        w = np.concatenate([default[:, None], present[:, None], new.reshape(rows, -1, size)], 1)
        actions = self.family.act(state.repeat(self.candidates, 0), w.reshape(-1, size))
        chosen = self.choose(state, actions.reshape(rows, self.candidates, -1), w)
        picked: Array = w[np.arange(rows), chosen]
        return picked
