"""The start states of an evaluation, and samples of the truth that models are compared with there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowmatch_core.oracles import LinearGaussianMDP
from pipelines import store


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


def read(folder: Path, device: torch.device) -> Starts:
    """Read the evaluation rollouts of an environment."""
    provenance = store.read_json(folder / "provenance.json")
    names = provenance["state_names"]
    states = [f"state_{name}" for name in names]
    actions = [f"action_{name}" for name in provenance["action_names"]]
    table = store.read_table(folder / "evaluation.parquet", ["episode", "step", *states, *actions])
    episodes = table["episode"].nunique()

    def tensor(columns: list[str]) -> Tensor:
        values = torch.tensor(table[columns].to_numpy(), dtype=torch.float32, device=device)
        return values.reshape(episodes, -1, len(columns))

    return Starts(names, tensor(states), tensor(actions)[:, 0])


def truth(starts: Starts, mdp: LinearGaussianMDP | None, gamma: float, n: int, generator: torch.Generator) -> Tensor:
    """Samples of the true successor measure at every start, (n, starts, d).

    From the closed form where there is one; otherwise S_T of the rollout with T ~ Geometric(1 - gamma), drawn with
    replacement (T beyond the rollout's end counts as its end): exact where policy and dynamics are deterministic.
    """
    if mdp is not None:
        return mdp.successor(starts.state, starts.action, gamma).sample(n, generator=generator)
    episodes, rows, _ = starts.states.shape
    u = torch.rand(n, episodes, generator=generator, dtype=torch.float64, device=starts.states.device)
    wait = 1 + torch.floor(torch.log1p(-u) / math.log(gamma)).long() if gamma else torch.ones_like(u).long()
    return starts.states[torch.arange(episodes, device=u.device), wait.clamp(max=rows - 1)]
