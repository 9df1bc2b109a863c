"""Batches of an environment's tables for successor losses: states are standardised, actions are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flowmatch_core.successor import Transitions, geometric, n_step
from pipelines.base import files, layout, metric_keys
from pipelines.base.errors import UserError
from pipelines.data import streaming

Draw = Callable[[torch.Generator], Transitions]


class Batches:
    """Batches from the tables of one environment.

    Args:
        folder: Folder of the environment in `data/transitions`.
        device: Device of the batches.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        provenance = files.read_json(layout.provenance(folder))
        self.states: list[str] = provenance["state_names"]
        self.actions: list[str] = provenance["action_names"]
        self.loc, self.scale = (torch.tensor(provenance[name], device=device) for name in ("loc", "scale"))

    def transitions(self, n: int, rows_in_memory: int) -> tuple[Draw, Callable[[int], None]]:
        """Return a function that draws off-policy transitions, and a function that seeks a step.

        Args:
            n: Rows per batch.
            rows_in_memory: A longer table is streamed from disk.
        """
        path = layout.transitions(self.folder)
        columns = [*metric_keys.columns("state", self.states), *metric_keys.columns("next_state", self.states)]
        columns += [*metric_keys.columns("action", self.actions), *metric_keys.columns("next_action", self.actions)]
        columns += ["terminal"] if streaming.any_true(path, "terminal") else []
        loc, scale = self.loc, self.scale
        unscaled = len(columns) - 2 * len(self.states)
        read = streaming.read(
            path,
            columns,
            batch=n,
            limit=rows_in_memory,
            seed=torch.initial_seed(),
            loc=torch.cat([loc, loc, loc.new_zeros(unscaled)]),
            scale=torch.cat([scale, scale, scale.new_ones(unscaled)]),
        )
        sizes = [len(self.states)] * 2 + [len(self.actions)] * 2

        def draw(generator: torch.Generator) -> Transitions:
            drawn = read.draw(generator)
            state, next_state, action, next_action = torch.split(drawn[:, : sum(sizes)], sizes, 1)
            terminal = drawn[:, -1] > 0.5 if drawn.shape[1] > sum(sizes) else None
            return Transitions(state, action, next_state, next_action, terminal=terminal)

        return draw, read.seek

    def futures(self, n: int, gamma: float) -> Callable[[torch.Generator], tuple[Transitions, Tensor]]:
        """Return a function that draws states and on-policy future states.

        A state is one of an episode's first half; its future is the state T ~ Geometric(1 - gamma) steps later, or the
        last state of the episode.
        """
        state, action, _ = self._rollouts
        last = state.shape[1] - 1

        def draw(generator: torch.Generator) -> tuple[Transitions, Tensor]:
            episode, step = self._places(n, (last + 1) // 2, generator)
            wait = geometric(gamma, (n,), generator=generator, device=state.device)
            now, soon = (episode, step), (episode, step + 1)
            batch = Transitions(state[now], action[now], state[soon], action[soon])
            return batch, state[episode, (step + wait).clamp(max=last)]

        return draw

    def returns(self, n: int, gamma: float, steps: int) -> Draw:
        """Return a function that draws `steps`-step transitions of the policy's episodes.

        Raises:
            UserError: The episodes are shorter than `steps`.
        """
        state, action, terminal = self._rollouts
        length = state.shape[1] - 1
        if steps > length:
            raise UserError(f"params.yaml: returns is {steps}, but a rollout has {length} steps; expected no more.")
        ends = bool(terminal.any())

        def draw(generator: torch.Generator) -> Transitions:
            episode, first = self._places(n, length - steps + 1, generator)
            window = episode[:, None], first[:, None] + torch.arange(steps + 1, device=state.device)
            ended = terminal[window][:, 1:] if ends else None
            return n_step(state[window], action[window], gamma, terminal=ended, generator=generator)

        return draw

    @cached_property
    def _rollouts(self) -> tuple[Tensor, Tensor, Tensor]:
        """States (episodes, length + 1, d), actions, and whether the state is terminal (episodes, length + 1)."""
        states, actions = metric_keys.columns("state", self.states), metric_keys.columns("action", self.actions)
        path = layout.rollouts(self.folder)
        table = files.read_table(path, ["episode", *states, *actions, "terminal"])
        episodes, device = table["episode"].nunique(), self.loc.device

        def tensor(columns: list[str]) -> Tensor:
            values = torch.tensor(table[columns].to_numpy(), dtype=torch.float32, device=device)
            return values.reshape(episodes, -1, len(columns))

        return (tensor(states) - self.loc) / self.scale, tensor(actions), tensor(["terminal"])[..., 0] > 0.5

    def _places(self, n: int, before: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n episode numbers, and for each a step below `before`."""
        episodes, device = len(self._rollouts[0]), self.loc.device
        episode = torch.randint(episodes, (n,), generator=generator, device=device)
        return episode, torch.randint(before, (n,), generator=generator, device=device)
