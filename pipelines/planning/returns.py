"""Returns of planners in the environment, beside those of the best single policy and of planning by simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from flowmatch_core.intervals import t_interval
from flowmatch_core.successor import GeometricHorizonModel
from pipelines import environments
from pipelines.base import device, files, layout, metric_keys, seeding
from pipelines.base.errors import UserError
from pipelines.config.catalog import ORACLE
from pipelines.config.params import CandidateLaw, Params, PlanSettings
from pipelines.environments import Array, Environment, Family, Simulator
from pipelines.evaluation import cells, models
from pipelines.evaluation.cells import Cell
from pipelines.planning import singles
from pipelines.planning.choices import ByModel, BySimulation, Choose
from pipelines.planning.planner import Planner
from pipelines.runs.context import Stage

SINGLE, SIMULATION, EXPERT = "single", "simulation", "expert"
ALONE = "none"
"""Law of a method that draws no candidates."""


class Episodes(NamedTuple):
    """What a method did in the episodes of a seed.

    Attributes:
        returns: Rows (reward, method, law, seed, episode, return).
        paths: States and the w followed in them, of a seed that is drawn.
    """

    returns: pd.DataFrame
    paths: pd.DataFrame | None = None


class Actor(Protocol):
    """A policy of a batch of episodes, such as a `Planner`."""

    @property
    def w(self) -> Array | None:
        """What it follows in the family, (n, dw); None if it is outside the family."""

    def act(self, state: Array) -> Array:
        """Return the action in each row's state."""


@dataclass(frozen=True)
class Fixed:
    """One policy of a family for each episode."""

    family: Family
    w: Array

    def act(self, state: Array) -> Array:
        """Return the action in each row's state."""
        return self.family.act(state, self.w)


@dataclass(frozen=True)
class Known:
    """A policy outside the family."""

    policy: Callable[[Array], Array]
    w: None = None

    def act(self, state: Array) -> Array:
        """Return the action in each row's state."""
        return self.policy(state)


class Watched:
    """The actions of an actor, which keeps the w that it follows."""

    def __init__(self, actor: Actor) -> None:
        self.actor, self.followed = actor, list[Array]()

    def __call__(self, state: Array) -> Array:
        """Return the action in each row's state."""
        action = self.actor.act(state)
        if self.actor.w is not None:
            self.followed.append(self.actor.w)
        return action


def plan(stage: Stage, environment: str) -> None:
    """Act in an environment with the models of every method, and write returns, paths and metrics."""
    work = Comparison.of(stage, environment)
    methods = [*work.references, *work.methods]
    every = [Cell(method, seed) for method in methods for seed in work.seeds(method)]
    for reward, w in work.defaults.items():
        stage.log(f"{reward}: the best of {work.settings.singles} policies has w = {np.round(w, 3).tolist()}")
    found = cells.each(stage, work, every, device.use(stage.params.device, stage.params.threads))
    returns = pd.concat([one.returns for one in found.values()], ignore_index=True)
    with stage.output(layout.plans(environment)) as folder:
        files.write_table(layout.episodes(folder), returns)
        drawn = [one.paths for one in found.values() if one.paths is not None]
        files.write_table(layout.paths(folder), pd.concat(drawn, ignore_index=True))
    with stage.output(layout.planned(environment)) as temporary:
        files.write_json(temporary, summary(returns))


def summary(returns: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the mean return by reward and method, `return_<law>` with its 95 % t interval and each seed's value."""
    found: dict[str, dict[str, Any]] = {}
    for (reward, method, law), rows in returns.groupby(["reward", "method", "law"], sort=False):
        seeds = rows.groupby("seed")["return"].mean()
        name = "return" if law == ALONE else f"return_{law}"
        over = t_interval(seeds.tolist())
        cell = found.setdefault(str(reward), {}).setdefault(str(method), {"seeds": len(seeds)})
        cell[name] = over.mean
        if over.n > 1:
            cell |= {f"{name}_low": over.low, f"{name}_high": over.high}
        cell |= {metric_keys.seed_key(name, int(str(seed))): float(value) for seed, value in seeds.items()}
    return found


@dataclass(frozen=True)
class Comparison:
    """The episodes of one environment, the same starts for every method; it is pickled for other processes.

    Attributes:
        params: Contents of params.yaml.
        environment: Name of the environment.
        defaults: The best single policy, w_r, of each reward.
    """

    params: Params
    environment: str
    defaults: Mapping[str, Array]

    @classmethod
    def of(cls, stage: Stage, environment: str) -> Comparison:
        """Return the comparison of an environment, with the best single policies.

        Raises:
            UserError: It has no family or not every reward, nobody can act in it, or a method has no flow.
        """
        settings = stage.params.plans[environment]
        built, family = cls(stage.params, environment, {}).built()
        unknown = [reward for reward in settings.rewards if reward not in built.reward_names()]
        if unknown:
            raise UserError(
                f"params.yaml: plans.{environment}.rewards has {unknown[0]!r}; expected of "
                f"{', '.join(built.reward_names())}."
            )
        rng = stage.rng("plan", environment, SINGLE)
        found = singles.best(built, family, settings.rewards, settings.singles, rng, settings.length)
        return cls(stage.params, environment, found)

    @property
    def settings(self) -> PlanSettings:
        """Settings of the planning."""
        return self.params.plans[self.environment]

    @property
    def methods(self) -> list[str]:
        """Methods with whose models it plans.

        Raises:
            UserError: One of them has no flow.
        """
        successor, entry = self.params.successor, self.params.environments[self.environment]
        flows = [
            method
            for method in successor.methods_for(entry)
            if successor.methods[method].loss.name != ORACLE and successor.methods[method].loss.spec.path
        ]
        wanted = list(self.settings.methods or flows)
        others = [method for method in wanted if method not in flows]
        if others:
            raise UserError(
                f"params.yaml: plans.{self.environment}.methods has {others[0]!r}, which is no flow; expected of "
                f"{', '.join(flows)}."
            )
        return wanted

    @property
    def references(self) -> list[str]:
        """What the planners with models are compared with, as far as the environment has it."""
        built, _ = self.built()
        known = any(built.expert(reward) is not None for reward in self.settings.rewards)
        return [SINGLE, *([EXPERT] if known else []), *([SIMULATION] if isinstance(built, Simulator) else [])]

    def seeds(self, method: str) -> tuple[int, ...]:
        """Return the training seeds of a method; a reference has those of all methods, each with its own starts."""
        successor, entry = self.params.successor, self.params.environments[self.environment]
        if method in successor.methods:
            return successor.seeds_for(entry, method)
        return tuple(sorted({seed for name in self.methods for seed in successor.seeds_for(entry, name)}))

    def built(self) -> tuple[Environment, Family]:
        """Return the environment and its family.

        Raises:
            UserError: It has no family.
        """
        entry = self.params.environments[self.environment]
        built = environments.build(entry.kind, entry.settings())
        if not isinstance(built, Environment) or built.family is None:
            raise UserError(
                f"params.yaml: plans has {self.environment!r}, which has no family of policies; expected an "
                "environment with `policy` and `w`, or the maze with family: goals."
            )
        return built, built.family

    def __call__(self, cell: Cell, send: Callable[[str], None]) -> Episodes:
        """Return the episodes of a method and a seed, and send the mean return of each task."""
        settings, (built, family) = self.settings, self.built()
        drawn = cell.seed == self.seeds(cell.method)[0]
        returns, paths = list[pd.DataFrame](), list[pd.DataFrame]()
        for reward, law, actor in self._actors(cell, built, family):
            act = Watched(actor)
            # the same generator for every method: the same starts, and the same noise where the dynamics have some
            along = built.acted(act, settings.episodes, settings.length, self._rng("episodes", cell.seed))
            total = built.rewards(along[:, 1:].reshape(-1, along.shape[-1]))[reward].reshape(len(along), -1).sum(1)
            about = {"reward": reward, "method": cell.method, "law": law, "seed": cell.seed}
            returns.append(pd.DataFrame({**about, "episode": range(len(along)), "return": total}))
            send(f"{cell}: {reward}{'' if law == ALONE else f', {law}'}: return {total.mean():.1f}")
            if drawn and act.followed and law in (ALONE, settings.laws[-1]):
                paths.append(_path(about, along[:, :-1], np.stack(act.followed, 1), built, family))
        return Episodes(pd.concat(returns, ignore_index=True), pd.concat(paths, ignore_index=True) if paths else None)

    def _actors(self, cell: Cell, built: Environment, family: Family) -> Iterator[tuple[str, str, Actor]]:
        """Yield the reward, the law of candidates and the policy of every task of a method."""
        settings, model = self.settings, self._model(cell) if cell.method in self.methods else None
        for reward in settings.rewards:
            if cell.method == SINGLE:
                yield reward, ALONE, Fixed(family, np.tile(self.defaults[reward], (settings.episodes, 1)))
            elif cell.method == EXPERT:
                expert = built.expert(reward)
                if expert is not None:
                    yield reward, ALONE, Known(expert)
            else:
                for law in settings.laws:
                    yield reward, law, self._planner(cell, built, family, model, reward, law)

    def _model(self, cell: Cell) -> GeometricHorizonModel:
        settings, chosen = self.settings, device.resolve(self.params.device)
        model = models.load(
            self.params, self.environment, cell.method, cell.seed, chosen, settings.solver, settings.steps
        )
        assert isinstance(model, GeometricHorizonModel), cell.method
        return model

    def _planner(
        self,
        cell: Cell,
        built: Environment,
        family: Family,
        model: GeometricHorizonModel | None,
        reward: str,
        law: CandidateLaw,
    ) -> Planner:
        settings, gamma = self.settings, self.params.environments[self.environment].gamma
        rng = self._rng("candidates", cell.seed, reward, law)

        def of(state: Array) -> Array:
            return built.rewards(state)[reward]

        choose: Choose
        if model is None:
            assert isinstance(built, Simulator)
            choose = BySimulation(built, family, of, gamma, settings.simulated, self._rng("simulation", cell.seed))
        else:
            chosen = device.resolve(self.params.device)
            key = ("plan", self.environment, cell.seed, reward, law)
            noise = seeding.generator(self.params.seed, *key, device=chosen)
            choose = ByModel(model, of, settings.samples, settings.margin, noise)
        return Planner(
            family, choose, self.defaults[reward], law, candidates=settings.candidates, every=settings.every, rng=rng
        )

    def _rng(self, *key: object) -> np.random.Generator:
        return np.random.default_rng(seeding.derived_seed(self.params.seed, "plan", self.environment, *key))


def _path(about: Mapping[str, Any], states: Array, w: Array, built: Environment, family: Family) -> pd.DataFrame:
    """Return one row per episode and step, with the state and the w that is followed."""
    episodes, steps, _ = states.shape
    named = [*metric_keys.columns("state", built.state_names), *metric_keys.columns("w", family.names)]
    rows = pd.DataFrame(np.concatenate([states, w], -1).reshape(episodes * steps, -1), columns=named)
    return rows.assign(**about, episode=np.arange(episodes).repeat(steps), step=np.tile(np.arange(steps), episodes))
