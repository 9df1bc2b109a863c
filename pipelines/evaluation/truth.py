"""Start states of an evaluation, samples of the truth, and properties of samples that need no truth.

These properties are the reward of each sample and the share of samples outside the range of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import geometric
from pipelines.base import files, layout, metric_keys
from pipelines.base.errors import UserError

if TYPE_CHECKING:
    from pipelines.environments import Array, Environment

# A model has diverged when more than the share DIVERGED of its samples is outside the data's range, widened by MARGIN
# of its width on each side. Measured for TD-CFM on the maze: at most 0.15 % for inaccurate models (EMD 0.13 to 0.26 m,
# gamma .95 and .99, 300 and 3000 steps), 4 % to 39 % for diverged ones (logit-normal flow times: samples metres away
# from an arena of 0.6 m, EMD 0.23 to 1.1 m). With half the margin, 4 % are outside in either case.
MARGIN, DIVERGED = 1.0, 0.01


@dataclass(frozen=True)
class Starts:
    """Rollouts of the policy from start states.

    Attributes:
        names: Names of the state components.
        states: States from S_0 on, (starts, length + 1, d).
        action: First action A_0, (starts, a).
    """

    names: list[str]
    states: Tensor
    action: Tensor

    @property
    def state(self) -> Tensor:
        """First states S_0, (starts, d)."""
        return self.states[:, 0]

    def first(self, n: int) -> Starts:
        """Return the first `n` rollouts."""
        return replace(self, states=self.states[:n], action=self.action[:n])


def read(folder: Path, device: torch.device) -> Starts:
    """Read the evaluation rollouts of an environment."""
    return _read(folder, layout.evaluation(folder), device)[""]


def counterfactuals(folder: Path, device: torch.device) -> dict[str, Starts]:
    """Read the rollouts from start states with another `state` or `action`; empty if there are none."""
    path = layout.counterfactual(folder)
    return _read(folder, path, device, "exchanged") if path.exists() else {}


def _read(folder: Path, path: Path, device: torch.device, kind: str | None = None) -> dict[str, Starts]:
    """Read the rollouts of a table, by kind."""
    provenance = files.read_json(layout.provenance(folder))
    names = provenance["state_names"]
    states, actions = metric_keys.columns("state", names), metric_keys.columns("action", provenance["action_names"])
    table = files.read_table(path, ["episode", "step", *states, *actions, *([kind] if kind else [])])
    groups = {"": table} if kind is None else {str(key): group for key, group in table.groupby(kind)}

    def starts(group: pd.DataFrame) -> Starts:
        episodes = group["episode"].nunique()
        if len(group) % episodes:
            raise UserError(
                f"{path} has {len(group)} rows for {episodes} episodes; expected episodes of one "
                "length: collect again with `make repro`."
            )

        def tensor(columns: list[str]) -> Tensor:
            values = torch.tensor(group[columns].to_numpy(float), device=device)  # in double precision
            return values.reshape(episodes, -1, len(columns))

        return Starts(names, tensor(states), tensor(actions)[:, 0])

    return {key: starts(group) for key, group in groups.items()}


def truth(starts: Starts, mdp: LinearGaussianMDP | None, gamma: float, n: int, generator: torch.Generator) -> Tensor:
    """Return samples of the true successor measure at every start state, (n, starts, d).

    They come from the closed form if there is one. Otherwise they are S_T of the rollout with T ~ Geometric(1 - gamma),
    drawn with replacement, where a T beyond the rollout's end counts as its end; this is exact if policy and dynamics
    are deterministic.
    """
    if mdp is not None:
        return mdp.successor(starts.state, starts.action, gamma).sample(n, generator=generator)
    episodes, rows, _ = starts.states.shape
    wait = geometric(gamma, (n, episodes), generator=generator, device=starts.states.device)
    return starts.states[torch.arange(episodes, device=wait.device), wait.clamp(max=rows - 1)]


def true_mean(starts: Starts, mdp: LinearGaussianMDP | None, gamma: float) -> Tensor:
    """Return the mean of the true successor measure at every start state, (starts, d)."""
    if mdp is not None:
        return mdp.successor(starts.state, starts.action, gamma).mean
    later = starts.states[:, 1:]
    weight = (1 - gamma) * gamma ** torch.arange(later.shape[1], dtype=later.dtype, device=later.device)
    weight[-1] = 1 - weight[:-1].sum()  # the mass beyond the end of the rollout is assigned to its last state
    return torch.einsum("t,ntd->nd", weight, later)


def table(x: Tensor, names: Sequence[str], **more: int) -> pd.DataFrame:
    """Return samples (n, starts, d) as rows, with the number of the start state and constant columns."""
    rows = pd.DataFrame(x.flatten(0, 1).cpu().numpy(), columns=list(names))
    return rows.assign(**more, start=np.tile(np.arange(x.shape[1]), x.shape[0]))


def rewards(environment: Environment, name: str, x: Tensor) -> Array:
    """Return a reward of states (..., d), NaN where a state is not finite."""
    flat = x.reshape(-1, x.shape[-1]).double().cpu()
    value = environment.rewards(flat.nan_to_num(0.0, 0.0, 0.0).numpy())[name]
    return np.where(flat.isfinite().all(-1).numpy(), value, np.nan).reshape(x.shape[:-1])


def outside(x: Tensor, provenance: Mapping[str, Any]) -> float:
    """Return the share of samples (..., d) with a component that is not finite or outside the widened data range.

    Args:
        x: Samples.
        provenance: Description of the environment's transitions, with their range.
    """
    low, high = (torch.tensor(provenance[end], dtype=x.dtype, device=x.device) for end in ("low", "high"))
    margin = MARGIN * (high - low)
    within = (x >= low - margin) & (x <= high + margin)  # false where x is not a number
    return 1 - float(within.all(-1).double().mean())
