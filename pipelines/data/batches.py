"""Batches of an environment's tables for successor losses, standardised; constant components of states are left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
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

    Attributes:
        states: Names of the components of a state that vary, those of the batches.
        actions: Names of the components of an action.
        loc: Location of all components of a state, double precision.
        scale: Their scale.
        described: What a model needs beside them to work in the units of the environment.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        provenance = files.read_json(layout.provenance(folder))
        names: list[str] = provenance["state_names"]
        self.actions: list[str] = provenance["action_names"]
        self.loc, self.scale = (_units(provenance[name], device) for name in ("loc", "scale"))
        varying = [i for i, name in enumerate(names) if name not in provenance["constants"]]
        self.states = [names[i] for i in varying]
        self._state = self.loc[varying], self.scale[varying]
        self._action = tuple(_units(provenance[name], device) for name in ("action_loc", "action_scale"))
        keys = ("state_names", "action_names", "constants", "action_loc", "action_scale")
        self.described = {key: provenance[key] for key in keys}

    @cached_property
    def ends(self) -> bool:
        """Whether states may be terminal."""
        return streaming.any_true(layout.transitions(self.folder), "terminal")

    def transitions(self, n: int, rows_in_memory: int) -> tuple[Draw, Callable[[int], None]]:
        """Return a function that draws off-policy transitions, and a function that seeks a step.

        Args:
            n: Rows per batch.
            rows_in_memory: A longer table is streamed from disk.
        """
        path = layout.transitions(self.folder)
        columns = [*metric_keys.columns("state", self.states), *metric_keys.columns("next_state", self.states)]
        columns += [*metric_keys.columns("action", self.actions), *metric_keys.columns("next_action", self.actions)]
        loc, scale = (torch.cat([s, s, a, a]) for s, a in zip(self._state, self._action, strict=True))
        if self.ends:
            columns, loc, scale = [*columns, "terminal"], F.pad(loc, (0, 1)), F.pad(scale, (0, 1), value=1.0)
        read = streaming.read(
            path,
            columns,
            batch=n,
            limit=rows_in_memory,
            seed=torch.initial_seed(),
            loc=loc.float(),
            scale=scale.float(),
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

        def tensor(columns: list[str], loc: Tensor, scale: Tensor) -> Tensor:
            values = _units(table[columns].to_numpy(float), device).reshape(episodes, -1, len(columns))
            return ((values - loc) / scale).float()

        terminal = torch.tensor(table["terminal"].to_numpy(bool), device=device).reshape(episodes, -1)
        return tensor(states, *self._state), tensor(actions, *self._action), terminal

    def _places(self, n: int, before: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n episode numbers, and for each a step below `before`."""
        episodes, device = len(self._rollouts[0]), self.loc.device
        episode = torch.randint(episodes, (n,), generator=generator, device=device)
        return episode, torch.randint(before, (n,), generator=generator, device=device)


def _units(values: ArrayLike, device: torch.device) -> Tensor:
    """Return numbers in double precision, so that those far from zero keep their digits until they are centred."""
    return torch.tensor(np.asarray(values), dtype=torch.float64, device=device)
