"""Start states of an evaluation, samples of the truth, and properties of samples that need no truth.

These properties are the reward of each sample and the share of samples outside the range of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import geometric
from pipelines.base import files, layout, metric_keys
from pipelines.base.errors import UserError
from pipelines.environments import Array, Log, Process

Reward = Callable[[Array], Array]
"""A reward of states, (n, d) -> (n,)."""

# A model has diverged when more than the share DIVERGED of its samples is outside the data's range, widened by MARGIN
# of its width on each side. Measured for TD-CFM on the maze: at most 0.15 % for inaccurate models (EMD 0.13 to 0.26 m,
# gamma .95 and .99, 300 and 3000 steps), 4 % to 39 % for diverged ones (logit-normal flow times: samples metres away
# from an arena of 0.6 m, EMD 0.23 to 1.1 m). With half the margin, 4 % are outside in either case.
MARGIN, DIVERGED = 1.0, 0.01
REWARD_ROWS = 50_000  # training rows by which a logged reward becomes a function of the state


@dataclass(frozen=True)
class Starts:
    """Rollouts of the policy from start states.

    Attributes:
        names: Names of the state components.
        states: States from S_0 on, (starts, length + 1, d).
        actions: Actions from A_0 on, (starts, length + 1, a).
        terminal: Whether the state is terminal, (starts, length + 1).
    """

    names: list[str]
    states: Tensor
    actions: Tensor
    terminal: Tensor

    @property
    def state(self) -> Tensor:
        """First states S_0, (starts, d)."""
        return self.states[:, 0]

    @property
    def action(self) -> Tensor:
        """First actions A_0, (starts, a)."""
        return self.actions[:, 0]

    def first(self, n: int) -> Starts:
        """Return the first `n` rollouts."""
        return replace(self, states=self.states[:n], actions=self.actions[:n], terminal=self.terminal[:n])


def read(folder: Path, device: torch.device) -> Starts:
    """Read the evaluation rollouts of an environment."""
    return _read(folder, layout.evaluation(folder), device)[""]


def neighbours(folder: Path, device: torch.device) -> Starts | None:
    """Read the other logged futures of the start states of a log; None where there is no log or no reference."""
    path = layout.neighbours(folder)
    return _read(folder, path, device)[""] if path.exists() else None


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
        episodes = _count(path, group)

        def tensor(columns: list[str]) -> Tensor:
            values = torch.tensor(group[columns].to_numpy(float), device=device)  # in double precision
            return values.reshape(episodes, -1, len(columns))

        # rollouts with a replaced state are those of a simulator, which has no terminal states
        over = group["terminal"] if "terminal" in group else np.zeros(len(group), dtype=bool)
        terminal = torch.tensor(np.asarray(over, dtype=bool), device=device).reshape(episodes, -1)
        return Starts(names, tensor(states), tensor(actions), terminal)

    return {key: starts(group) for key, group in groups.items()}


def _count(path: Path, table: pd.DataFrame) -> int:
    """Return the number of episodes of a table, which have one length."""
    episodes: int = table["episode"].nunique()
    if len(table) % episodes:
        raise UserError(
            f"{path} has {len(table)} rows for {episodes} episodes; expected episodes of one "
            "length: collect again with `make repro`."
        )
    return episodes


def returns(folder: Path, reward: str, gamma: float) -> Array:
    r"""Return $\sum_{k \ge 0} \gamma^k r(S_{k+1})$ of every evaluation rollout, whose last reward goes on for ever."""
    path, column = layout.evaluation(folder), f"reward_{reward}"
    table = files.read_table(path, ["episode", column])
    along = table[column].to_numpy(dtype=np.float64).reshape(_count(path, table), -1)[:, 1:]
    value: Array = along @ weights(gamma, along.shape[1]) / (1 - gamma)
    return value


def weights(gamma: float, steps: int) -> Array:
    """Return the probabilities of the steps 1, 2, ... of a geometric horizon; the last has the mass beyond it."""
    weight = (1 - gamma) * gamma ** np.arange(steps, dtype=np.float64)
    weight[-1] = 1 - weight[:-1].sum()
    return weight


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
    weight = torch.tensor(weights(gamma, later.shape[1]), dtype=later.dtype, device=later.device)
    return torch.einsum("t,ntd->nd", weight, later)


def bootstrap(starts: Starts, later: Tensor, gamma: float, generator: torch.Generator) -> Tensor:
    r"""Return samples of $(1-\gamma)\delta_{S_1} + \gamma m(\cdot|S_1,A_1)$ at every start state, (n, starts, d).

    Args:
        starts: Start states, with the state after them; it is the whole future where it is terminal.
        later: Samples of m at S_1 and A_1, (n, starts, d).
        gamma: Discount per transition.
        generator: Source of randomness.
    """
    u = torch.rand(later.shape[:2], generator=generator, device=later.device)
    stay = (u >= gamma) | starts.terminal[:, 1]
    return torch.where(stay[..., None], starts.states[:, 1], later)


def table(x: Tensor, names: Sequence[str], **more: int) -> pd.DataFrame:
    """Return samples (n, starts, d) as rows, with the number of the start state and constant columns.

    These further columns have names that no component of the state has (see `metric_keys.free`).
    """
    rows = pd.DataFrame(x.flatten(0, 1).cpu().numpy(), columns=list(names))
    constant = {metric_keys.free(name, names): value for name, value in more.items()}
    return rows.assign(**constant, **{metric_keys.free("start", names): np.tile(np.arange(x.shape[1]), x.shape[0])})


def reward_of(process: Process, name: str, folder: Path) -> Reward:
    """Return a reward as a function of the state.

    A logged reward is that of the training row whose next state is nearest, in units of standard deviations.
    """
    if isinstance(process, Log) and name == process.reward:
        return _nearest(folder)
    return lambda state: process.rewards(state)[name]


def _nearest(folder: Path) -> Reward:
    from scipy.spatial import cKDTree

    provenance = files.read_json(layout.provenance(folder))
    path, names = layout.transitions(folder), metric_keys.columns("next_state", provenance["state_names"])
    file = files.open_table(path, [*names, "reward"])
    every = -(-file.metadata.num_rows // REWARD_ROWS)  # rows apart, so that they come from the whole log
    parts, passed = list[Array](), 0
    for group in range(file.metadata.num_row_groups):
        rows = files.read_group(path, file, group, [*names, "reward"]).to_pandas()
        parts.append(rows[[*names, "reward"]].to_numpy(dtype=np.float64)[-passed % every :: every])
        passed += len(rows)
    known, scale = np.concatenate(parts), np.array(provenance["scale"])
    tree = cKDTree(known[:, :-1] / scale)
    return lambda state: np.asarray(known[tree.query(state / scale)[1], -1])


def rewards(reward: Reward, x: Tensor) -> Array:
    """Return a reward of states (..., d), NaN where a state is not finite."""
    flat = x.reshape(-1, x.shape[-1]).double().cpu()
    value = reward(flat.nan_to_num(0.0, 0.0, 0.0).numpy())
    return np.where(flat.isfinite().all(-1).numpy(), value, np.nan).reshape(x.shape[:-1])


def unit(provenance: Mapping[str, Any], device: torch.device) -> Tensor | None:
    """Return the unit of distances: the standard deviations of a log's states, whose columns may be of any kind."""
    return None if provenance["truth"] == "simulator" else scale(provenance, device)


def scale(provenance: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return the standard deviations of an environment's states."""
    return torch.tensor(provenance["scale"], dtype=torch.float64, device=device)


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
