"""Batches of an environment's tables for successor losses, standardised; constant components of states are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from flowmatch_core.successor import Transitions, geometric, n_step
from pipelines import environments
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
        actions: Names of the components of an action; with a family, those of w are behind them.
        family: Policies of the environment that models are trained for, if there are several.
        loc: Location of all components of a state, double precision.
        scale: Their scale.
        described: What a model needs beside them to work in the units of the environment.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        provenance = files.read_json(layout.provenance(folder))
        names: list[str] = provenance["state_names"]
        self.actions: list[str] = provenance["action_names"]
        self.family = environments.restore(provenance).family if "family" in provenance else None
        self.horizon: int | None = provenance.get("length")
        self.loc, self.scale = (_double(provenance[name], device) for name in ("loc", "scale"))
        varying = [i for i, name in enumerate(names) if name not in provenance["constants"]]
        self.states = [names[i] for i in varying]
        self._state = self.loc[varying], self.scale[varying]
        self._constant = np.array([provenance["constants"].get(name, np.nan) for name in names])
        self._action = tuple(_double(provenance[f"action_{name}"], device) for name in ("loc", "scale"))
        keys = ("state_names", "action_names", "constants", "action_loc", "action_scale")
        self.described = {key: provenance[key] for key in keys}
        if self.family is not None:  # which a planner makes again
            self.described["family_of"] = {key: provenance[key] for key in ("kind", "settings")}

    @cached_property
    def ends(self) -> bool:
        """Whether states may be terminal."""
        return streaming.any_true(layout.transitions(self.folder), "terminal")

    def transitions(self, n: int, rows_in_memory: int) -> tuple[Draw, Callable[[int], None]]:
        """Return a function that draws off-policy transitions, and a function that seeks a step.

        With a family of policies every row of a batch has a new w, by which its next action is the policy's.

        Args:
            n: Rows per batch.
            rows_in_memory: A longer table is streamed from disk.
        """
        path = layout.transitions(self.folder)
        parts = {"state": self.states, "next_state": self.states, "action": self.actions, "next_action": self.actions}
        if self.family is not None:
            parts = {**parts, "action": self.actions[: -len(self.family.names)]}
            del parts["next_action"]
        sizes = [len(names) for names in parts.values()]
        columns = [column for part, names in parts.items() for column in metric_keys.columns(part, names)]
        units = [
            (self._state if "state" in part else self._action, size) for part, size in zip(parts, sizes, strict=True)
        ]
        loc, scale = (torch.cat([unit[which][:size] for unit, size in units]) for which in (0, 1))
        if self.ends:
            columns, loc, scale = [*columns, "terminal"], F.pad(loc, (0, 1)), F.pad(scale, (0, 1), value=1.0)
        read = streaming.read(
            path,
            columns,
            streaming.standardised(columns, loc, scale),
            batch=n,
            limit=rows_in_memory,
            seed=torch.initial_seed(),
            device=loc.device,
        )

        def draw(generator: torch.Generator) -> Transitions:
            drawn = read.draw(generator)
            state, next_state, action, *rest = torch.split(drawn[:, : sum(sizes)], sizes, 1)
            if rest:
                (next_action,) = rest
            else:
                action, next_action = self._of_family(action, next_state, generator)
            terminal = drawn[:, -1] > 0.5 if drawn.shape[1] > sum(sizes) else None
            return Transitions(state, action, next_state, next_action, terminal=terminal)

        return draw, read.seek

    def futures(self, n: int, gamma: float) -> Callable[..., tuple[Transitions, Tensor]]:
        """Return a function that draws states and on-policy future states, by other discounts if it is given `gamma`.

        A state is one that half of a rollout's steps follow, or in a log the steps that its provenance says, or a
        terminal state within fewer. Its future is the state T ~ Geometric(1 - gamma) steps later, or the last one of
        the episode.

        Raises:
            UserError: There is no such state.
        """
        episodes = self._episodes
        places = episodes.followed_by(self.horizon or episodes.longest // 2 + 1)
        if not len(places):
            raise UserError(
                f"{layout.rollouts(self.folder)} has no state that {self.horizon} steps or a terminal state follow; "
                "keep more episodes by `rollouts`, or lower `length`."
            )

        def draw(generator: torch.Generator, gamma: float | Tensor = gamma) -> tuple[Transitions, Tensor]:
            now = _choose(places, n, generator)
            wait = geometric(gamma, (n,), generator=generator, device=now.device)
            state, action = episodes.state, episodes.action
            batch = Transitions(state[now], action[now], state[now + 1], action[now + 1])
            return batch, state[torch.minimum(now + wait, episodes.last[now])]

        return draw

    def returns(self, n: int, gamma: float, steps: int) -> Callable[..., Transitions]:
        """Return a function that draws `steps`-step transitions of the policy's episodes, as `futures` does.

        A terminal state repeats until the end of a window; no window goes beyond an episode that was cut off.

        Raises:
            UserError: The episodes are shorter than `steps`.
        """
        episodes = self._episodes
        places = episodes.followed_by(steps)
        if not len(places):
            raise UserError(
                f"params.yaml: returns is {steps}, but a rollout has {episodes.longest} steps; expected no more."
            )
        ends = bool(episodes.terminal.any())

        def draw(generator: torch.Generator, gamma: float | Tensor = gamma) -> Transitions:
            first = _choose(places, n, generator)[:, None]
            window = torch.minimum(first + torch.arange(steps + 1, device=first.device), episodes.last[first])
            ended = episodes.terminal[window][:, 1:] if ends else None
            state, action = episodes.state[window], episodes.action[window]
            return n_step(state, action, gamma, terminal=ended, generator=generator)

        return draw

    def _of_family(self, action: Tensor, next_state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the actions and the next actions of policies with a new w for every row, each with w behind it."""
        family, (loc, scale), (at, unit) = self.family, self._action, self._state
        assert family is not None
        seed = torch.randint(2**63 - 1, (), generator=generator, device=action.device)
        w = family.draw(len(action), np.random.default_rng(int(seed)))
        state = np.tile(self._constant, (len(action), 1))
        state[:, np.isnan(self._constant)] = (next_state.double() * unit + at).cpu().numpy()
        following = _double(np.concatenate([family.act(state, w), w], 1), action.device)
        next_action = ((following - loc) / scale).float()
        return torch.cat([action, next_action[:, action.shape[1] :]], 1), next_action

    @cached_property
    def _episodes(self) -> _Episodes:
        states, actions = metric_keys.columns("state", self.states), metric_keys.columns("action", self.actions)
        table = files.read_table(layout.rollouts(self.folder), ["episode", *states, *actions, "terminal"])
        # a terminal state may repeat until the end of a table's episode: once is enough
        before = table.groupby("episode")["terminal"].shift(fill_value=False).to_numpy(dtype=bool)
        table = table[~before].reset_index(drop=True)
        rows, device = table.groupby("episode", sort=False)["terminal"], self.loc.device

        def standardised(columns: list[str], loc: Tensor, scale: Tensor) -> Tensor:
            return ((_double(table[columns].to_numpy(), device) - loc) / scale).float()

        last = np.arange(len(table)) + rows.cumcount(ascending=False).to_numpy()
        return _Episodes(
            standardised(states, *self._state),
            standardised(actions, *self._action),
            torch.tensor(table["terminal"].to_numpy(dtype=bool), device=device),
            torch.tensor(last, device=device),
        )


@dataclass(frozen=True)
class _Episodes:
    """Episodes of any lengths, one after another.

    Attributes:
        state: States, (rows, d).
        action: Actions, (rows, a).
        terminal: Whether the state is terminal, (rows,).
        last: Number of the last row of the row's episode, (rows,).
    """

    state: Tensor
    action: Tensor
    terminal: Tensor
    last: Tensor

    @property
    def left(self) -> Tensor:
        """Number of steps from each row to the end of its episode."""
        return self.last - torch.arange(len(self.last), device=self.last.device)

    @property
    def longest(self) -> int:
        """Number of steps of the longest episode."""
        return int(self.left.max())

    def followed_by(self, steps: int) -> Tensor:
        """Return the rows that so many steps follow, or a terminal state within fewer."""
        left = self.left
        return torch.nonzero((left >= steps) | ((left > 0) & self.terminal[self.last]))[:, 0]


def _choose(places: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n of the places."""
    return places[torch.randint(len(places), (n,), generator=generator, device=places.device)]


def _double(values: ArrayLike, device: torch.device) -> Tensor:
    """Return numbers in double precision, so that those far from zero keep their digits until they are centred."""
    return torch.tensor(np.asarray(values), dtype=torch.float64, device=device)
