"""The start states of an evaluation, and samples of the truth that models are compared with there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import geometric
from pipelines import store
from pipelines.errors import UserError


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
    states, actions = store.columns("state", names), store.columns("action", provenance["action_names"])
    table = store.read_table(folder / "evaluation.parquet", ["episode", "step", *states, *actions])
    episodes = table["episode"].nunique()
    if len(table) % episodes:
        raise UserError(
            f"{folder / 'evaluation.parquet'} has {len(table)} rows for {episodes} episodes; expected episodes of one "
            "length: collect again with `make repro`."
        )

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
    wait = geometric(gamma, (n, episodes), generator=generator, device=starts.states.device)
    return starts.states[torch.arange(episodes, device=wait.device), wait.clamp(max=rows - 1)]
