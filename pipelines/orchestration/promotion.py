"""Decide after a run which version of each model is the champion: the alias `champion` in MLflow's registry.

The challenger of a model is its newest version without a decision whose weights are those of the run's folder. It
becomes the champion if there is none, or if it is better than the champion beyond the error on the same held-out rows.
Else the champion stays, with the reason. Only decided versions count: a decision that could not be made, because the
champion's files are gone or do not fit, is `undecided` and is made again by the next run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from pipelines.base import files, layout
from pipelines.base.errors import UserError, did_you_mean
from pipelines.config import params as parameters
from pipelines.config.params import Params
from pipelines.orchestration import runner
from pipelines.orchestration.text import aligned
from pipelines.runs import records
from pipelines.runs.champions import Registry, Version
from pipelines.runs.versions import name_of

if TYPE_CHECKING:
    from pipelines.orchestration.contest import Contest, Scores, Verdict

Outcome = Literal["promoted", "kept", "undecided"]

_TAG = "promotion"  # the outcome; details are tags `promotion.<name>`


@dataclass(frozen=True)
class Decision:
    """Whether a challenger became the champion of its model, and why.

    Attributes:
        model: Name in MLflow's registry.
        outcome: `promoted`, `kept` (the champion stays) or `undecided` (it stays, and the operator must act).
        challenger: Version that was decided on.
        champion: Version that was champion before; None if there was none.
        metric: Name of the score, of which less is better.
        challenger_score: Mean score of the challenger.
        champion_score: Mean score of the champion.
        difference: The champion's score minus the challenger's.
        bound: One-sided lower bound of the difference.
        level: Confidence of the bound.
        pairs: Number of rows or start states that both were scored on.
        test: Hash of these rows.
        reason: Why, as a clause.
        time: When it was decided, UTC.
        invocation: Name of the run.
    """

    model: str
    outcome: Outcome
    challenger: int
    champion: int | None
    metric: str
    challenger_score: float | None
    champion_score: float | None
    difference: float | None
    bound: float | None
    level: float
    pairs: int
    test: str
    reason: str
    time: str
    invocation: str

    def row(self) -> dict[str, Any]:
        """Return the decision as a row of a table for the operator."""
        return {
            "model": self.model,
            "outcome": self.outcome,
            "reason": self.reason,  # early, because Prefect's page is narrow
            "challenger": f"version {self.challenger}",
            "champion before": "none" if self.champion is None else f"version {self.champion}",
            "score": self.metric,
            "challenger's": _number(self.challenger_score),
            "champion's": _number(self.champion_score),
            "pairs": self.pairs,
        }


def decide(workspace: Path, invocation: str | None = None) -> list[Decision]:
    """Decide the champion of every model that was trained in a folder and has no decision yet.

    Args:
        workspace: Folder of the run.
        invocation: Name of the run, on which the decisions are filed; by default the one that trained the model.

    Raises:
        UserError: `operation.promote.models` has an unknown name, there is no store, or data of the folder are damaged.
    """
    params = parameters.load(workspace / "params.yaml")
    trained = dict(_trained(params, workspace))
    chosen = params.operation.promote.models
    for name in chosen or ():
        if name not in trained:
            raise UserError(
                f"params.yaml: operation.promote.models has {name!r}, which no run has trained here; expected of "
                f"{', '.join(trained) or 'none'}{did_you_mean(name, trained)}"
            )
    registry = Registry()
    records.home().mkdir(parents=True, exist_ok=True)
    with FileLock(records.home() / "promote.lock"), TemporaryDirectory() as scratch:
        judge = _Judge(workspace, params, registry, Path(scratch), invocation)
        found = [
            judge.decide(model, networks)
            for model, networks in trained.items()
            if model in (chosen or trained) and _has_reference(params, workspace, model)
        ]
    return [decision for decision in found if decision is not None]


def _has_reference(params: Params, workspace: Path, model: str) -> bool:
    """Return whether there is a truth to score a model with; a log has none for another policy than its own."""
    data = model.partition(".")[0]
    folder = workspace / layout.collected(data)
    return data not in params.environments or files.read_json(layout.provenance(folder))["truth"] != "no reference"


def decide_apart(workspace: Path, invocation: str) -> list[Decision]:
    """Return the decisions of `decide`, made in a process of its own.

    Raises:
        UserError: It failed; the message is its last line.
    """
    command = [sys.executable, "-m", "pipelines.orchestration", "promote", "--json"]
    command += ["--workspace", str(workspace), "--invocation", invocation]
    environment = runner.environment(invocation)
    made = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8"
    )
    try:
        return [Decision(**row) for row in json.loads(made.stdout)]
    except ValueError:
        raise UserError((made.stderr.strip() or "the decision ended without a message").splitlines()[-1]) from None


def crown(model: str, version: str) -> str:
    """Make a version the champion by hand and return a sentence about it.

    Raises:
        UserError: There is no such model or version.
    """
    registry = Registry()
    before = registry.champion(model)
    chosen = _find(registry, model, version)
    if before == chosen.number:
        return f"version {version} of {model} is the champion already."
    registry.crown(model, chosen.number, before)
    registry.tag(model, chosen.number, {_TAG: "by hand", f"{_TAG}.time": _now()})
    return f"version {version} of {model} is the champion{f', after version {before}' if before else ''}."


def roll_back(model: str) -> str:
    """Make the previous champion of a model the champion again and return a sentence about it.

    Raises:
        UserError: There is no such model, or it had no champion before.
    """
    registry = Registry()
    now = registry.champion(model)
    before = None if now is None else _find(registry, model, str(now)).previous
    if now is None or before is None:
        have = "no champion" if now is None else f"version {now} as its champion, and none before it"
        raise UserError(f"{model} has {have}; {_by_hand(model)}.")
    registry.crown(model, _find(registry, model, before).number, None)
    registry.tag(model, now, {_TAG: "rolled back", f"{_TAG}.time": _now()})
    return f"version {before} of {model} is the champion again, in place of version {now}."


def table(decisions: Sequence[Decision]) -> str:
    """Return the decisions as text, one line each under a head."""
    rows = [decision.row() for decision in decisions]
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return aligned(lines)


def _trained(params: Params, workspace: Path) -> Iterator[tuple[str, dict[int, Path]]]:
    """Yield the models whose networks are in a folder, by their name without the profile."""
    for entries, methods in (
        (params.datasets, params.density.methods),
        (params.environments, params.successor.methods),
    ):
        for data in entries:
            for method in methods:
                networks = layout.networks(workspace / layout.models(data, method))
                if networks:
                    yield f"{data}.{method}", networks


@dataclass(frozen=True)
class _Judge:
    """The decisions on the models of one folder."""

    workspace: Path
    params: Params
    registry: Registry
    scratch: Path
    invocation: str | None

    def decide(self, model: str, networks: dict[int, Path]) -> Decision | None:
        """Decide on the challenger of a model and write the decision; None if there is no challenger."""
        from pipelines.orchestration.contest import Verdict

        name = name_of(model, self.params.profile)
        versions = self.registry.versions(name)
        now = self.registry.champion(name) if versions else None
        champion = next((version for version in versions if version.number == now), None)
        challenger = self._challenger(versions, champion, networks)
        if challenger is None:
            return None
        contest = self._contest(model, challenger, champion)
        own, other = contest.score(networks), None
        outcome: Outcome = "undecided"
        try:
            verdict, other = self._verdict(contest, own, networks, champion)
            outcome = "promoted" if verdict.better else "kept"
        except UserError as error:
            cause = str(error).rstrip(".")
            verdict = Verdict(False, f"the champion cannot be compared ({cause}); {_by_hand(name)}")
        decision = Decision(
            model=name,
            outcome=outcome,
            challenger=challenger.number,
            champion=now,
            metric=contest.metric,
            challenger_score=own.mean,
            champion_score=None if other is None else other.mean,
            difference=verdict.difference,
            bound=verdict.bound,
            level=self.params.operation.promote.level,
            pairs=len(own.values),
            test=contest.digest,
            reason="; ".join(filter(None, (verdict.reason, contest.note))),
            time=_now(),
            invocation=self.invocation or self.registry.invocation(challenger),
        )
        self._write(decision, challenger)
        return decision

    def _contest(self, model: str, challenger: Version, champion: Version | None) -> Contest:
        """Return the rows that both models are scored on, and keep with the challenger which rows it was trained on."""
        from pipelines.orchestration.contest import DensityContest, SuccessorContest

        data = model.partition(".")[0]
        if data in self.params.environments:
            return SuccessorContest(self.workspace, self.params, data)
        known = None if champion is None else self.registry.rows(champion)
        contest = DensityContest(self.workspace, self.params, data, known)
        self.registry.keep_rows(challenger, contest.training)
        if champion is not None and known is None:
            contest.note = "it is not known which rows the champion was trained on"
        return contest

    def _verdict(
        self, contest: Contest, own: Scores, networks: dict[int, Path], champion: Version | None
    ) -> tuple[Verdict, Scores | None]:
        """Return the verdict on the challenger, and the scores of the champion.

        Raises:
            UserError: The champion cannot be loaded, or does not describe the same rows.
        """
        from pipelines.orchestration.contest import Verdict, check_comparable, compare, weights

        settings, other = self.params.operation.promote, None
        if champion is not None:
            theirs = self.registry.networks(champion, self.scratch)
            if weights(theirs) == weights(networks):
                return Verdict(False, "the same weights as the champion", 0.0), own
            check_comparable(networks, theirs)
            other = contest.score(theirs)
        return compare(own, other, settings.level, settings.pairs), other

    def _challenger(
        self, versions: Sequence[Version], champion: Version | None, networks: dict[int, Path]
    ) -> Version | None:
        """Return the newest version with these networks, if neither it nor a newer one is decided."""
        from pipelines.orchestration.contest import weights

        ours = weights(networks)
        for version in versions:
            if version == champion or version.tags.get(_TAG, "undecided") != "undecided":
                return None
            try:
                found = self.registry.networks(version, self.scratch)
            except UserError:
                continue
            if weights(found) == ours:
                return version
        return None

    def _write(self, decision: Decision, challenger: Version) -> None:
        """Write a decision; the tag with the outcome comes last, so that one that was interrupted is made again."""
        values = asdict(decision)
        skipped = ("model", "challenger", "outcome")
        tags = {
            f"{_TAG}.{key}": str(value) for key, value in values.items() if value is not None and key not in skipped
        }
        self.registry.tag(decision.model, decision.challenger, tags)
        self.registry.file(values, challenger, decision.invocation)
        if decision.outcome == "promoted":
            self.registry.crown(decision.model, decision.challenger, decision.champion)
        self.registry.tag(decision.model, decision.challenger, {_TAG: decision.outcome})


def _find(registry: Registry, model: str, version: str) -> Version:
    """Return a version by its number.

    Raises:
        UserError: There is no such version.
    """
    found = {str(one.number): one for one in registry.versions(model)}
    if version not in found:
        raise UserError(f"{model} has no version {version!r} in MLflow, only {', '.join(sorted(found, key=int))}.")
    return found[version]


def _by_hand(model: str) -> str:
    """Return the end of a sentence about a champion that only the operator can choose."""
    return f'choose one by `make promote ARGS="--set {model} <version>"`'


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
