"""Episodes of ExORL (arXiv 2201.13425) from a local folder; nothing is downloaded.

A file `*.npz` is one episode with the arrays `observation`, `action` and `discount` (T + 1 rows each; others are
ignored). Row t contains the action that *led to* observation t, so a transition is (observation[t - 1], action[t],
observation[t]), and the first action has no meaning. `discount` is 0 where observation t is terminal; it is 1 at the
end of an episode that a time limit cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator

from pipelines.base import plugins
from pipelines.base.errors import UserError
from pipelines.environments import Array, Beginning, Environment, Episodes, Simulator, Steps
from pipelines.environments import _entry_point as entry_points
from pipelines.environments._entry_point import EntryPoint, load
from pipelines.environments._logs import exorl_arrays, exorl_files


class Settings(plugins.Settings):
    """The location of the episodes, and the simulator for rollouts of the policy."""

    directory: Path = Field(description="folder with the episodes, one .npz each at any depth, relative to params.yaml")
    simulator: dict[str, Any] = Field(
        description="the environment with the episodes' dynamics, as a separate entry: `kind` and its settings "
        "(for point_mass_maze {kind: maze, task: loop, action_repeat: 1}); its rollouts are the evaluation truth"
    )
    policy: EntryPoint | None = Field(
        None,
        description="package.module:function from observations (n, d) to actions (n, a), which replaces the policy of "
        "the simulator; only for a `Simulator`",
    )

    @field_validator("simulator")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        kind = value.get("kind")
        if not isinstance(kind, str) or kind == "exorl":
            raise ValueError("it should have the key kind, an environment whose steps can be computed")
        settings = plugins.load("pipelines.environments", kind).Settings
        try:
            settings.model_validate(_without_kind(value))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"its {where} does not fit: {first['msg']}") from None
        return value


@final
class Exorl(Environment):
    """Recorded transitions; states, policy, rollouts and rewards are those of the simulator.

    The episodes are read in one fixed random order, so that a shorter table is a random sample of them.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.files = exorl_files(settings.directory, "directory")
        module = plugins.load("pipelines.environments", settings.simulator["kind"])
        self.simulator: Environment = module.build(module.Settings.model_validate(_without_kind(settings.simulator)))
        self.state_names, self.action_names = self.simulator.state_names, self.simulator.action_names
        self.bounds, self.walls = self.simulator.bounds, self.simulator.walls
        self.beginnings, self.thread_safe = self.simulator.beginnings, self.simulator.thread_safe
        self.source = f"{len(self.files)} episodes recorded by ExORL (arXiv 2201.13425); {self.simulator.source}"
        self.fidelity = f"recorded transitions; rollouts: {self.simulator.fidelity}"
        self._policy: Callable[[Array], Array] = self.simulator.policy
        if settings.policy is not None:
            if not isinstance(self.simulator, Simulator):
                raise UserError(
                    f"exorl has the policy {settings.policy!r}, but {settings.simulator['kind']} follows one of its "
                    "own; expected the policy in one place: write it into `simulator`."
                )
            self._policy = load(settings.policy, (len(self.action_names),))
        else:
            self.family = self.simulator.family

    def policy(self, state: Array) -> Array:
        """Return the actions of the user's policy, or of the simulator's."""
        return self._policy(state)

    def checks(self, rng: np.random.Generator) -> list[str]:
        """Try the simulator."""
        return self.simulator.checks(rng)

    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """Draw start states of the simulator."""
        return self.simulator.starts(rng, n)

    def available(self) -> int:
        """Return the number of transitions in all episodes."""
        return int(self._ends[-1])

    def transitions(self, rows: range, length: int, rng: np.random.Generator) -> Steps:
        """Return the recorded rows of these numbers; the generator is not used."""
        parts, begin = [], rows.start
        while begin < rows.stop:
            place = int(np.searchsorted(self._ends, begin, side="right"))
            stop = min(rows.stop, int(self._ends[place]))
            skipped = begin - int(self._ends[place - 1] if place else 0)
            parts.append(self._read(int(self._order[place]))[skipped : skipped + stop - begin])
            begin = stop
        return Steps.join(*parts)

    def episodes(self, beginning: Beginning, n: int, length: int, rng: np.random.Generator) -> Episodes:
        """Draw rollouts in the simulator."""
        if isinstance(self.simulator, Simulator) and self.family is None:
            return self.simulator.follow(self._policy, beginning, n, length, rng)
        return self.simulator.episodes(beginning, n, length, rng)

    def acted(self, act: Callable[[Array], Array], n: int, length: int, rng: np.random.Generator) -> Array:
        """Return the states of episodes in the simulator."""
        return self.simulator.acted(act, n, length, rng)

    def expert(self, reward: str) -> Callable[[Array], Array] | None:
        """Return the good policy that the simulator knows for a reward."""
        return self.simulator.expert(reward)

    def rewards(self, state: Array) -> dict[str, Array]:
        """Return the rewards of the simulator, not the recorded ones."""
        return self.simulator.rewards(state)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.random.default_rng(0).permutation(len(self.files))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Number of the row after the last one of each episode, in the fixed order."""
        lengths = np.array([len(exorl_arrays(file, ("discount",))[0]) - 1 for file in self.files])
        return lengths[self._order].cumsum()

    def _read(self, number: int) -> Steps:
        """Return all transitions of an episode."""
        file = self.files[number]
        observation, action, discount = exorl_arrays(file, ("observation", "action", "discount"))
        rows = len(discount)
        for name, found, width in (
            ("observation", observation, len(self.state_names)),
            ("action", action, len(self.action_names)),
            ("discount", discount, 1),
        ):
            if found.shape != (rows, width):
                raise UserError(
                    f"{file} has the array {name!r} of shape {found.shape}; expected {(rows, width)}, as in "
                    f"{self.settings.simulator['kind']}: choose the simulator whose episodes these are."
                )
        return Steps(
            observation[:-1],
            action[1:],
            observation[1:],
            discount[1:, 0] == 0,
            np.full(rows - 1, number),
            np.arange(rows - 1),
            np.full(rows - 1, "recorded"),
        )


def sources(settings: Settings, mirror: Path | None) -> dict[str, Path]:
    """Return the episodes, and the modules of the policy and of the simulator.

    Raises:
        UserError: The folder contains no episodes, or a module does not exist.
    """
    found = {
        path.relative_to(settings.directory).as_posix(): path for path in exorl_files(settings.directory, "directory")
    }
    simulator = plugins.load("pipelines.environments", settings.simulator["kind"])
    of_simulator = getattr(simulator, "sources", None)
    if of_simulator is not None:
        found |= of_simulator(simulator.Settings.model_validate(_without_kind(settings.simulator)), mirror)
    return found | entry_points.sources(*filter(None, [settings.policy]))


def build(settings: Settings) -> Exorl:
    """Return the environment of a folder of episodes.

    Raises:
        UserError: The folder contains no episodes, or the simulator cannot be built.
    """
    return Exorl(settings)


def _without_kind(simulator: dict[str, Any]) -> dict[str, Any]:
    return {name: setting for name, setting in simulator.items() if name != "kind"}
