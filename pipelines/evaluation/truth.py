"""The start states of an evaluation, samples of the truth there, and what can be said of any samples by themselves:
their rewards, and whether they keep to the range of the data."""

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

# A model has diverged when more than the share DIVERGED of its samples lies outside the data's range, widened by MARGIN
# of its width on each side. Measured of TD-CFM on the maze: 0.15 % or less where it is merely bad (EMD 0.13 to 0.26 m,
# gamma .95 and .99, 300 and 3000 steps), 4 % to 39 % where its bootstrap explodes (logit-normal flow times: samples
# metres away from an arena of 0.6 m, EMD 0.23 to 1.1 m). With half the margin 4 % lie outside in either case.
MARGIN, DIVERGED = 1.0, 0.01


@dataclass(frozen=True)
class Starts:
    """Rollouts of the policy: `states` is (starts, length + 1, d) from S_0 on, `action` is A_0, (starts, a)."""

    names: list[str]
    states: Tensor
    action: Tensor

    @property
    def state(self) -> Tensor:
        """S_0, (starts, d)."""
        return self.states[:, 0]

    def first(self, n: int) -> Starts:
        """The first `n` of them."""
        return replace(self, states=self.states[:n], action=self.action[:n])


def read(folder: Path, device: torch.device) -> Starts:
    """Read the evaluation rollouts of an environment."""
    return _read(folder, layout.evaluation(folder), device)[""]


def counterfactuals(folder: Path, device: torch.device) -> dict[str, Starts]:
    """The same from the first start states with another `state` or another `action`; nothing where they are unknown."""
    path = layout.counterfactual(folder)
    return _read(folder, path, device, "exchanged") if path.exists() else {}


def _read(folder: Path, path: Path, device: torch.device, kind: str | None = None) -> dict[str, Starts]:
    """The rollouts of a table, those of each kind apart."""
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
            values = torch.tensor(group[columns].to_numpy(), dtype=torch.float32, device=device)
            return values.reshape(episodes, -1, len(columns))

        return Starts(names, tensor(states), tensor(actions)[:, 0])

    return {key: starts(group) for key, group in groups.items()}


def truth(starts: Starts, mdp: LinearGaussianMDP | None, gamma: float, n: int, generator: torch.Generator) -> Tensor:
    """Samples of the true successor measure at every start, (n, starts, d).

    From the closed form where there is one; otherwise S_T of the rollout with T ~ Geometric(1 - gamma), drawn with
    replacement (T beyond the rollout's end counts as its end): exact where policy and dynamics are deterministic.
    """
    if mdp is not None:
        return mdp.successor(starts.state, starts.action, gamma).sample(n, generator=generator)
    episodes, rows, _ = starts.states.shape
    wait = geometric(gamma, (n, episodes), generator=generator, device=starts.states.device)
    return starts.states[torch.arange(episodes, device=wait.device), wait.clamp(max=rows - 1)]


def true_mean(starts: Starts, mdp: LinearGaussianMDP | None, gamma: float) -> Tensor:
    """The mean of the true successor measure at every start, (starts, d), of which `truth` draws samples."""
    if mdp is not None:
        return mdp.successor(starts.state, starts.action, gamma).mean
    later = starts.states[:, 1:]
    weight = (1 - gamma) * gamma ** torch.arange(later.shape[1], dtype=later.dtype, device=later.device)
    weight[-1] = 1 - weight[:-1].sum()  # beyond the end of the rollout lies its last state
    return torch.einsum("t,ntd->nd", weight, later)


def table(x: Tensor, names: Sequence[str], **more: int) -> pd.DataFrame:
    """Samples (n, starts, d) as rows, with the number of the start and other columns that are the same in all."""
    rows = pd.DataFrame(x.flatten(0, 1).cpu().numpy(), columns=list(names))
    return rows.assign(**more, start=np.tile(np.arange(x.shape[1]), x.shape[0]))


def rewards(environment: Environment, name: str, x: Tensor) -> Array:
    """A reward of states (..., d), NaN where a state is not finite."""
    flat = x.reshape(-1, x.shape[-1]).double().cpu()
    value = environment.rewards(flat.nan_to_num(0.0, 0.0, 0.0).numpy())[name]
    return np.where(flat.isfinite().all(-1).numpy(), value, np.nan).reshape(x.shape[:-1])


def outside(x: Tensor, provenance: Mapping[str, Any]) -> float:
    """The share of samples (..., d) with a component that is not finite or beyond the widened range of the data.

    Arguments:
        provenance: of the environment's transitions, which holds the range.
    """
    low, high = (torch.tensor(provenance[end], dtype=x.dtype, device=x.device) for end in ("low", "high"))
    margin = MARGIN * (high - low)
    within = (x >= low - margin) & (x <= high + margin)  # false where x is not a number
    return 1 - float(within.all(-1).double().mean())
