"""A log of one's own: recorded episodes of a table, of D4RL or Minari (HDF5), or of a folder of ExORL.

Next state and next action are those of the next row of the episode. A row is one step: a state, the action taken there,
and what the step earned and led to. The last row of an episode is therefore a step only if the log has the state after
it, in columns of next states or as the last observation of an array. Where it has none, a terminal flag on the last row
is taken for the row's own state, the last one that the log knows.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
from pydantic import Field

from pipelines.base import metric_keys, plugins
from pipelines.base.errors import UserError, did_you_mean
from pipelines.environments import Array, Log, Logged
from pipelines.environments import _entry_point as entry_points
from pipelines.environments._entry_point import EntryPoint, load
from pipelines.environments._logs import HDF5, TABLES, Fields, Reader, Rows, reader

DEFAULTS: Mapping[str, Any] = {
    "gamma": 0.95,
    "transitions": "all",
    "rollouts": None,
    "length": None,
    "starts": None,
    "reward": None,
}
"""The keys of every environment, of a log that says nothing about them."""

Names = str | Annotated[tuple[str, ...], Field(min_length=1)]


class Settings(plugins.Settings):
    """The files of a log and the meaning of its columns."""

    file: Path | Annotated[tuple[Path, ...], Field(min_length=1)] = Field(
        description="parquet, csv, tsv or hdf5 (Minari, D4RL), a list or a pattern of them, the folder of a Minari "
        "data set, or a folder of ExORL episodes; relative to params.yaml"
    )
    state: Names = Field(
        "s*", description="columns of the state, or how they begin (s*); those of an array are s0, s1, ..."
    )
    action: Names = Field("a*", description="columns of the action, or how they begin; those of an array are a0, ...")
    episode: str = Field("episode", description="column with the name of the episode, whose rows stand together")
    next_state: Names | None = Field(
        None, description="columns of the next state; null: the state of the next row of the episode"
    )
    policy: EntryPoint | None = Field(
        None,
        description="package.module:function from states (n, d) to actions (n, a): the policy of the models; null: the "
        "one that made the log, whose next action is the logged one",
    )
    terminal: str | None = Field(None, description="column that is true where a step ends in a terminal state")
    timeout: str | None = Field(
        None, description="column that is true where a time limit cut the episode off, which is never a terminal"
    )
    reward: str | None = Field(None, description="`reward` of the entry")


@final
class Transitions(Log):
    """Recorded episodes; every component of the state is also a reward."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reader: Reader = reader(_paths(settings))
        self.fields = _fields(settings, self.reader)
        self.state_names, self.action_names = self.fields.state, self.fields.action
        self.reward = self.fields.reward
        self.act = None if settings.policy is None else load(settings.policy, (len(self.action_names),))
        self.truth = "held-out episodes" if self.act is None else "no reference"
        self._rewards: dict[str, Callable[[Array], Array]] = {}
        if settings.reward is not None and ":" in settings.reward:
            self._rewards = {settings.reward: load(settings.reward, ())}
        named = ", ".join(map(str, _patterns(settings)))
        whose = "the policy that made it" if self.act is None else f"another policy, {settings.policy}"
        self.source = f"the log {named} and {whose}"
        self.fidelity = (
            "held-out episodes: one logged continuation of a start is the truth, which is a draw of it where the "
            "process is random; the floor is that of another episode, from the logged state and action nearest to it"
            if self.act is None
            else "no reference: nobody logged this policy's future, so that there is the Bellman residual alone"
        )

    def rewards(self, state: Array) -> dict[str, Array]:
        """Return every component of the state under its name, and the user's reward."""
        components = {name: state[:, i] for i, name in enumerate(self.state_names)}
        return components | {name: reward(state) for name, reward in self._rewards.items()}

    def reward_names(self) -> tuple[str, ...]:
        """Return the components, the user's reward and the logged one."""
        return (*self.state_names, *self._rewards, *([self.reward] if self.reward else []))

    def episodes(self) -> Iterator[Logged]:
        """Yield the episodes that have a step.

        Raises:
            UserError: An episode cannot be read, or has what it should not: the message names it.
        """
        for rows in self.reader.rows(self.fields):
            episode = _episode(rows)
            if len(episode.states) > 1:
                yield episode


def sources(settings: Settings, mirror: Path | None) -> dict[str, Path]:
    """Return the files of the log, and the modules of the policy and of the reward.

    Raises:
        UserError: A file or a module does not exist.
    """
    found = dict[str, Path]()
    for path in _paths(settings):
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in inside:
            found[metric_keys.free(file.relative_to(path.parent).as_posix(), found)] = file
    own = [settings.reward] if settings.reward and ":" in settings.reward else []
    return found | entry_points.sources(*filter(None, [settings.policy]), *own)


def build(settings: Settings) -> Transitions:
    """Return the log of some files.

    Raises:
        UserError: A file or a column is missing.
    """
    return Transitions(settings)


def _patterns(settings: Settings) -> tuple[Path, ...]:
    return (settings.file,) if isinstance(settings.file, Path) else settings.file


def _paths(settings: Settings) -> list[Path]:
    """Return the files and folders of a log, those of a pattern in the order of their names."""
    found = list[Path]()
    for pattern in map(str, _patterns(settings)):
        here = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not here or not Path(here[0]).exists():
            raise UserError(
                f"file is {pattern!r}, which is not there; expected {', '.join((*TABLES, *HDF5))} or a folder, "
                "relative to params.yaml."
            )
        found += map(Path, here)
    return found


def _fields(settings: Settings, reader: Reader) -> Fields:
    """Return the columns that the settings name.

    Raises:
        UserError: There is no such column.
    """
    columns, defaults = reader.columns, reader.defaults()

    def column(key: str, name: str) -> str:
        if name not in columns:
            near = did_you_mean(name, columns, f", but {', '.join(columns)}.")
            raise UserError(f"{key} is {name!r}, and the log has no such column{near}")
        return name

    reward = settings.reward if settings.reward and ":" not in settings.reward else None
    terminal, timeout = settings.terminal or defaults.get("terminal"), settings.timeout or defaults.get("timeout")
    others = [settings.episode, terminal, timeout, "step", "time"]

    def several(key: str, names: Names, taken: list[str | None]) -> tuple[str, ...]:
        if isinstance(names, str) and names.endswith("*"):
            found = tuple(name for name in columns if name.startswith(names[:-1]) and name not in taken)
            if not found:
                raise UserError(
                    f"{key} is {names!r}; expected the beginning of columns of the log, which has {', '.join(columns)}."
                )
        else:
            found = tuple(column(key, name) for name in ([names] if isinstance(names, str) else names))
        twice = next((name for name in found if found.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{key} has {twice!r} twice; expected every column once.")
        return found

    explicit = list(settings.action) if isinstance(settings.action, tuple) else [settings.action]
    state = several("state", settings.state, [*others, reward, *explicit])
    action = several("action", settings.action, [*others, reward, *state])
    following = tuple[str, ...]()
    if settings.next_state is not None:
        following = several("next_state", settings.next_state, list(state))
        if len(following) != len(state):
            raise UserError(f"next_state has {len(following)} columns; expected as many as state, {len(state)}.")
    return Fields(
        state,
        action,
        column("episode", settings.episode),
        following,
        terminal and column("terminal", terminal),
        timeout and column("timeout", timeout),
        None if reward is None or reward in state else column("reward", reward),
    )


def _episode(rows: Rows) -> Logged:
    """Return an episode from its rows, which are checked.

    Raises:
        UserError: There is a number that is not finite, or an end in the middle, or a next state that does not follow.
    """
    where, count = f"{rows.file}: the episode {rows.name!r}", len(rows.action)
    for what, values in (
        ("state", rows.state),
        ("action", rows.action),
        ("next state", rows.next_state),
        ("reward", rows.reward),
    ):
        if values is not None and not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise UserError(
                f"{where} has a missing or infinite {what}, first in its row {row}; expected finite numbers: "
                "take the episode out, or fill the value in."
            )
    if len(rows.state) not in (count, count + 1):
        raise UserError(
            f"{where} has {len(rows.state)} states and {count} actions; expected as many, or one state more."
        )
    terminal, known = rows.terminal & ~rows.timeout, rows.next_state is not None or len(rows.state) > count
    last = count - 1 if known else max(count - 2, 0)  # the first row whose step may end the episode
    for what, flags in (("terminal", terminal), ("cut off by a timeout", rows.timeout)):
        if flags[:last].any():
            row = int(flags.argmax())
            raise UserError(
                f"{where} is {what} at its row {row} of {count} and goes on; expected that at its end only: give what "
                "follows a name of its own."
            )
    states = rows.state
    if rows.next_state is not None and len(states) == count:
        gap = np.abs(rows.next_state[:-1] - states[1:]) > 1e-4 * (1e-8 + np.abs(states).max(0) + np.ptp(states, 0))
        if gap.any():
            row = int(np.argwhere(gap)[0][0])
            raise UserError(
                f"{where} jumps: the next state of its row {row} is not the state of the row after it; expected an "
                "episode without gaps: give what follows a gap a name of its own."
            )
        states = np.concatenate([states, rows.next_state[-1:]])
    steps = len(states) - 1
    rewards = None if rows.reward is None else rows.reward[:steps]
    return Logged(rows.name, states, rows.action, rewards, bool(terminal[last:].any()))
