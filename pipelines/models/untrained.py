"""Methods without trained networks on a data set or in an environment, and the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.base import files, layout
from pipelines.config.catalog import ORACLE
from pipelines.config.params import Params, Trained
from pipelines.runs.context import Stage


@dataclass(frozen=True)
class Untrained:
    """A method without trained networks on a data set or in an environment.

    Attributes:
        reason: Why there are none.
        file: File with the reason, which replaces the networks.
        model: Whether there is nevertheless a model, the closed form.
    """

    reason: str
    file: Path
    model: bool = False

    def write(self, stage: Stage, data: str, method: str) -> None:
        """Write the reason in place of the networks, and empty logs."""
        with stage.output(self.file.parent) as folder:
            files.write_json(folder / self.file.name, {"reason": self.reason})
        for path, content in (
            (layout.curve(data, method), "step\n"),
            (layout.final_losses(data, method), "{}\n"),
        ):
            with stage.output(path) as log:
                log.write_text(content, encoding="utf-8")
        stage.log(self.reason)


def not_listed(entry: Trained, data: str, method: str) -> Untrained | None:
    """Return that a data set or an environment does not list a method, or None if it does."""
    if entry.runs(method):
        return None
    return Untrained(f"{data} does not list it", layout.skipped(layout.models(data, method)))


def untrained(params: Params, environment: str, method: str) -> Untrained | None:
    """Return why a method trains no networks in an environment, or None if it trains them."""
    folder, entry, choice = (
        layout.models(environment, method),
        params.environments[environment],
        params.successor.methods[method],
    )
    if (other := not_listed(entry, environment, method)) is not None:
        return other
    provenance = files.read_json(layout.provenance(layout.collected(environment)))
    if choice.loss.name != ORACLE:
        on_policy = choice.loss.spec.needs == "futures" or params.successor.fit_for(entry, choice).on_policy
        if on_policy and provenance["truth"] == "no reference":
            return Untrained("it needs episodes of the policy, and the log is another one's", layout.skipped(folder))
        return None
    if not provenance["closed_form"]:
        return Untrained(f"{environment} has no closed form", layout.skipped(folder))
    return Untrained("the closed form, nothing to train", layout.closed_form(folder), model=True)
