"""Any Gymnasium environment with real vectors as observations and actions, by its id.

The observation is used as the state. Because the environment cannot be set to a state, transitions come from episodes:
with random actions, under the policy, or with both. With `w` the policy is a family of policies. An episode that the
environment terminates ends in a terminal state; one that a time limit cuts off does not.

An environment may keep state in its class or module, so one thread steps it, one instance after the other, unless the
entry says that it is safe. Some transitions are replayed before the tables are drawn.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from pydantic import Field

from pipelines.base.errors import UserError, first_line
from pipelines.environments import Array, Beginning, Environment, Episodes, Steps
from pipelines.environments import _entry_point as entry_points
from pipelines.environments._entry_point import EntryPoint, load
from pipelines.environments._family import LawSettings, Named

if TYPE_CHECKING:
    import gymnasium

Label = Literal["random", "policy", "visited"]
REPLAYED = 20  # transitions


class Settings(LawSettings):
    """The environment, its policy, and the behaviour that generates transitions."""

    id: str = Field(min_length=1, description='as `gymnasium.make` takes it: "Pendulum-v1", "package.module:Mine-v0"')
    policy: EntryPoint = Field(
        description="package.module:function from observations (n, d), and w (n, dw) of a family, to actions (n, a): "
        "deterministic, row by row, called from several threads if `thread_safe`; a change of its module is noticed"
    )
    behaviour: Literal["random", "policy", "mixed"] = Field(
        "random",
        description="random: episodes under uniformly random actions; policy: episodes under the policy; mixed: every "
        "other episode is random, in the others each action is the policy's or a random one, with equal odds",
    )
    rewards: dict[str, EntryPoint] = Field(
        {}, description="rewards of the state, each package.module:function from observations (n, d) to (n,)"
    )
    arguments: dict[str, bool | int | float | str] = Field({}, description="further arguments of `gymnasium.make`")
    thread_safe: bool = Field(
        False,
        description="whether several threads may use instances of the environment, and the policy, at once: they share "
        "no state; it pays where the steps release the global interpreter lock, as MuJoCo's do",
    )


@final
class Gymnasium(Environment):
    """A Gymnasium environment and a policy for it; every component of the observation is also a reward."""

    beginnings = ("start",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with closing(self._make()) as made:
            observations: Any = made.observation_space
            actions: Any = made.action_space
        for name, space in (("observation_space", observations), ("action_space", actions)):
            if not isinstance(space, _library().spaces.Box) or len(space.shape) != 1:
                raise UserError(f"{settings.id} has the {name} {space}; expected a Box with one axis.")
        self.low, self.high = actions.low.astype(np.float64), actions.high.astype(np.float64)
        self.action_type = actions.dtype
        self.thread_safe = settings.thread_safe
        if settings.behaviour != "policy" and not np.isfinite([self.low, self.high]).all():
            raise UserError(
                f"{settings.id} has no bounds on its actions, so none can be drawn at random; "
                "expected behaviour: policy, or a wrapper that rescales actions."
            )
        self.state_names = tuple(f"s{i}" for i in range(observations.shape[0]))
        self.action_names = tuple(f"a{i}" for i in range(actions.shape[0]))
        low, high = (np.clip(b[:2].astype(np.float64), -100, 100) for b in (observations.low, observations.high))
        self.bounds = (low[0], low[-1], high[0], high[-1])
        self.source = f"gymnasium {_library().__version__}, {settings.id}, policy {settings.policy}"
        self.fidelity = "gymnasium's own; one rollout a start is the truth, exact where the dynamics are deterministic"
        size = len(self.action_names)
        self.family = Named(settings.policy, settings.w, settings.draw, size) if settings.w else None
        self._policy = load(settings.policy, (size,))
        self._rewards = {name: load(entry, ()) for name, entry in settings.rewards.items()}
        rng = np.random.default_rng(0)  # report an error in the policy before anything runs
        self._one(rng)[0](self.starts(rng, 1))

    def checks(self, rng: np.random.Generator) -> list[str]:
        """Replay transitions with the same seeds, alone and in turns with another instance.

        Raises:
            UserError: `thread_safe` is true, but another instance or thread changes the transitions.
        """
        key, other = (int(k) for k in rng.integers(2**31, size=2))
        recorded, again = self._replay(key), self._replay(key)
        same = _equal(recorded, again)
        if same < REPLAYED:
            return [
                f"transitions replayed with the same seeds: {same} of {REPLAYED} equal, so that the environment or the "
                "policy does not honour seeds; collecting again gives other rows"
            ]
        beside = _equal(recorded, self._replay(key, other))
        if self.thread_safe:
            with ThreadPoolExecutor(2) as pool:
                first, _ = pool.map(self._replay, (key, other))
            beside = min(beside, _equal(recorded, first))
            if beside < REPLAYED:
                raise UserError(
                    f"{self.settings.id} is not thread-safe: beside another instance of it {beside} of {REPLAYED} "
                    "replayed transitions are equal; expected all, so remove thread_safe: true."
                )
        found = f"transitions replayed with the same seeds: {REPLAYED} of {REPLAYED} equal"
        if beside < REPLAYED:
            found += f", but {beside} beside another instance, so that instances share state; one at a time is used"
        return [found]

    def policy(self, state: Array) -> Array:
        """Return the actions of the user's function, which is a policy of its own without `w`."""
        return self._policy(state)

    def acted(self, act: Callable[[Array], Array], n: int, length: int, rng: np.random.Generator) -> Array:
        """Return the states of episodes in as many instances, which must not share state.

        A terminal state repeats until the end.
        """
        with ExitStack() as stack:
            made = [stack.enter_context(closing(self._make(max_episode_steps=-1))) for _ in range(n)]
            states = [np.stack([_vector(one.reset(seed=_seed(rng))[0]) for one in made])]
            over = np.zeros(n, dtype=bool)
            for step in range(length):
                action, following = act(states[-1]).astype(self.action_type), states[-1].copy()
                for i in np.flatnonzero(~over):
                    observation, _, over[i], cut, _ = made[i].step(action[i])
                    following[i] = _vector(observation)
                    if cut and not over[i] and step + 1 < length:
                        raise self._cut(step + 1, length)
                states.append(following)
        return np.stack(states, 1)

    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """Draw initial observations of episodes."""
        with closing(self._make()) as made:
            return np.stack([_vector(made.reset(seed=_seed(rng))[0]) for _ in range(n)])

    def transitions(self, rows: range, length: int, rng: np.random.Generator) -> Steps:
        """Return rows of as many episodes as needed; the environment's own time limit ends them, not `length`."""
        with closing(self._make()) as made:
            steps = list(islice(self._steps(made, rows.start, rng), len(rows)))
        return Steps(*(np.array(column) for column in zip(*steps, strict=True)))

    def episodes(self, beginning: Beginning, n: int, length: int, rng: np.random.Generator) -> Episodes:
        """Draw episodes without a time limit, from the environment's own start distribution."""
        states = np.empty((n, length + 1, len(self.state_names)))
        actions = np.empty((n, length + 1, len(self.inputs)))
        terminal = np.zeros((n, length + 1), dtype=bool)
        size = len(self.action_names)
        with closing(self._make(max_episode_steps=-1)) as made:
            for i in range(n):
                last, ended = 0, False
                act, actions[i, :, size:] = self._one(rng)
                for row in islice(self._episode(made, "policy", act, rng), length):
                    states[i, last], actions[i, last, :size], states[i, last + 1], ended = row
                    last += 1
                if last < length and not ended:
                    raise self._cut(last, length)
                states[i, last:], terminal[i, last:] = states[i, last], ended
                actions[i, last:, :size] = act(states[i, last : last + 1])
        return Episodes(states, actions, terminal)

    def _cut(self, steps: int, length: int) -> UserError:
        return UserError(
            f"{self.settings.id} cut an episode off after {steps} steps without terminating it; "
            f"expected {length} steps, so lower `length` or lift the limit by `arguments`."
        )

    def _one(self, rng: np.random.Generator) -> tuple[Callable[[Array], Array], Array]:
        """Return the policy of an episode and its w, (1, dw), which has no components where there is one policy."""
        family = self.family
        if family is None:
            return self.policy, np.empty((1, 0))
        w = family.draw(1, rng)
        return lambda state: family.act(state, w), w

    def rewards(self, state: Array) -> dict[str, Array]:
        """Return the user's rewards, and every component of the observation under its name."""
        components = {name: state[:, i] for i, name in enumerate(self.state_names)}
        return components | {name: reward(state) for name, reward in self._rewards.items()}

    def _label(self, episode: int) -> Label:
        if self.settings.behaviour == "mixed":
            return "visited" if episode % 2 else "random"
        return self.settings.behaviour

    def _replay(self, key: int, beside: int | None = None) -> list[Array]:
        """Return the next states of transitions that a key determines, in turns with those of another key, if any."""
        with ExitStack() as stack:
            walks = []
            for k in (key,) if beside is None else (key, beside):
                made = stack.enter_context(closing(self._make()))
                walks.append(islice(self._steps(made, 0, np.random.default_rng(k)), REPLAYED))
            return [first[2] for first, *_ in zip(*walks, strict=True)]

    def _steps(
        self, made: gymnasium.Env[Any, Any], episode: int, rng: np.random.Generator
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the fields of `Steps` of one episode after the other, without end."""
        for number in count(episode):
            label = self._label(number)
            for step, row in enumerate(self._episode(made, label, self._one(rng)[0], rng)):
                yield *row, number, step, label

    def _episode(
        self,
        made: gymnasium.Env[Any, Any],
        label: Label,
        act: Callable[[Array], Array],
        rng: np.random.Generator,
    ) -> Iterator[tuple[Array, Array, Array, bool]]:
        """Yield steps (state, action, next state, terminated) until the environment ends the episode."""
        odds = {"random": 1.0, "visited": 0.5, "policy": 0.0}[label]  # of a random action
        state, ended, cut = _vector(made.reset(seed=_seed(rng))[0]), False, False
        while not (ended or cut):
            action = rng.uniform(self.low, self.high) if rng.random() < odds else act(state[None])[0]
            observation, _, ended, cut, _ = made.step(action.astype(self.action_type))
            following = _vector(observation)
            yield state, action, following, bool(ended)
            state = following

    def _make(self, **arguments: Any) -> gymnasium.Env[Any, Any]:
        library = _library()
        try:
            made: gymnasium.Env[Any, Any] = library.make(
                self.settings.id, disable_env_checker=True, **{**self.settings.arguments, **arguments}
            )
        except (library.error.Error, ImportError, TypeError) as error:
            raise UserError(
                f"gymnasium cannot make {self.settings.id!r} ({first_line(error)}); expected an id that is "
                "registered here and its dependencies installed."
            ) from None
        return made


def sources(settings: Settings, mirror: Path | None) -> dict[str, Path]:
    """Return the files of the modules of the policy, the law of w, the rewards and an environment with its own module.

    Raises:
        UserError: A module does not exist.
    """
    own = [settings.id] if ":" in settings.id else []
    law = [settings.draw] if settings.draw else []
    return entry_points.sources(settings.policy, *settings.rewards.values(), *law, *own)


def build(settings: Settings) -> Gymnasium:
    """Return the environment of an id.

    Raises:
        UserError: Gymnasium is not installed, the id is unknown, or its spaces are not vectors of real numbers.
    """
    return Gymnasium(settings)


def _library() -> ModuleType:
    try:
        return importlib.import_module("gymnasium")
    except ImportError:
        raise UserError(
            "environments of the kind gymnasium need the package gymnasium, which is not installed; "
            "run `pip install -e '.[gymnasium]'`."
        ) from None


def _equal(first: list[Array], second: list[Array]) -> int:
    return sum(map(np.array_equal, first, second))


def _vector(observation: Any) -> Array:
    return np.array(observation, dtype=np.float64)  # a copy, because some environments reuse the returned array


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
