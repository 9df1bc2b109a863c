"""Write the report: one self-contained HTML page and its pictures."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import store
from pipelines.params import Params
from pipelines.stage import DATA, Stage, run
from pipelines.tables import ORDER

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent.parent / "templates"
CURVES = {"loss": "total loss", "direct": "direct term", "bootstrap": "bootstrap term"}


@dataclass
class Section:
    """A part of the page."""

    id: str
    title: str
    text: str = ""
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)


class Page:
    """The sections made so far and the folder that keeps each picture as a file of its own."""

    def __init__(self, figures: Path) -> None:
        self.sections: list[Section] = []
        self.folder = figures

    def add(self, section: Section) -> Section:
        self.sections.append(section)
        return section

    def picture(self, section: Section, name: str, figure: Figure, caption: str) -> None:
        """Save a figure as a file and put it on the page."""
        from matplotlib import pyplot as plt

        file = self.folder / f"{name}.png"
        figure.savefig(file, metadata={"Software": None})
        plt.close(figure)
        self.image(section, file, caption)

    def image(self, section: Section, file: Path, caption: str) -> None:
        """Put a picture that is there on the page."""
        section.figures.append({"png": base64.b64encode(file.read_bytes()).decode(), "caption": caption})


def main(stage: Stage) -> None:
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    params = stage.params
    with stage.output(DATA / "report") as folder:
        (folder / "figures").mkdir(parents=True)
        page = Page(folder / "figures")
        _summary(page, params)
        for name in params.environments:
            _environment(page, params, name)
        _densities(page, params)
        _experiments(page, params)
        environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True)
        html = environment.get_template("report.html.j2").render(
            params=params,
            sections=page.sections,
            yaml=yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110),
        )
        (folder / "index.html").write_text(html)
    stage.record.artifact(DATA / "report" / "index.html")
    stage.record.artifact(DATA / "report" / "figures")


def _summary(page: Page, params: Params) -> None:
    from pipelines import figures

    metrics = {name: _metrics(name) for name in (*params.environments, *params.datasets)}
    section = page.add(Section("results", "Results"))
    section.tables = [_table(name) for name in ORDER]
    caption = "Which method wins where: EMD over the floor of the data, mean over start states and seeds."
    page.picture(section, "emd", figures.against_floor(metrics), caption)


def _environment(page: Page, params: Params, name: str) -> None:
    from pipelines import figures

    provenance = store.read_json(DATA / "transitions" / name / "provenance.json")
    names = provenance["state_names"]
    evaluation = store.read_table(DATA / "transitions" / name / "evaluation.parquet")
    starts = evaluation.loc[evaluation["step"] == 0, store.columns("state", names)]
    samples = {}
    for method in params.successor.methods:
        if "skipped" not in _metrics(name).get(method, {"skipped": ""}):
            table = store.read_table(DATA / "samples" / name / f"{method}.parquet", finite=False)
            samples[method] = table[table["seed"] == params.successor.seeds[0]]
    truth = store.read_table(DATA / "evaluations" / name / "truth.parquet")
    section = page.add(Section(name, name, f"{provenance['source']} ({provenance['fidelity']})."))
    page.picture(
        section,
        f"{name}-occupancy",
        figures.occupancy(truth, samples, starts, provenance["bounds"], provenance["walls"]),
        f"Where the policy will be (γ = {params.environments[name].gamma:g}): truth and samples of every method, one "
        "row a start state (red).",
    )
    logs = {method: _curve(name, method) for method in params.successor.methods}
    for term in ("direct", "bootstrap"):
        caption = f"{CURVES[term].capitalize()}, mean over seeds. The minima differ between methods and are not zero."
        page.picture(section, f"{name}-{term}", figures.curves(logs, term, CURVES[term]), caption)


def _densities(page: Page, params: Params) -> None:
    from pipelines import figures

    methods, first = list(params.density.methods), params.density.seeds[0]
    section = page.add(Section("densities", "Densities"))
    plane: dict[str, tuple[pd.DataFrame, dict[str, pd.DataFrame]]] = {}
    for name in params.datasets:
        columns = store.read_json(DATA / "prepared" / name / "provenance.json")["columns"]
        test = store.read_table(DATA / "prepared" / name / "test.parquet")
        tables = {m: store.read_table(DATA / "samples" / name / f"{m}.parquet") for m in methods}
        samples = {m: table.loc[table["seed"] == first, columns] for m, table in tables.items()}
        if len(columns) == 2:
            plane[name] = test, samples
        elif params.datasets[name].kind == "digits":
            page.picture(section, f"{name}-images", figures.digits(test, samples), f"{name}: test images and samples.")
    if plane:
        figure = figures.densities({n: test for n, (test, _) in plane.items()}, {n: s for n, (_, s) in plane.items()})
        page.picture(section, "densities", figure, "Samples against data.")
    for name in plane:
        folder = DATA / "samples" / name
        ways = {m: store.read_table(folder / f"{m}.path.parquet") for m in methods}
        caption = f"{name}: the probability path, from noise (t = 0) to data (t = 1)."
        page.picture(section, f"{name}-path", figures.paths(ways), caption)
        velocities = {m: store.read_table(folder / f"{m}.field.parquet") for m in methods}
        caption = f"{name}: the velocity field in standardised units, coloured by speed."
        page.picture(section, f"{name}-field", figures.fields(velocities), caption)
    for name in params.datasets:
        logs = {m: _curve(name, m) for m in methods}
        caption = f"{name}: training loss, mean over seeds; its minimum is not zero, and differs between couplings."
        page.picture(section, f"{name}-loss", figures.curves(logs, "loss", "loss"), caption)


def _experiments(page: Page, params: Params) -> None:
    for name in params.experiments:
        folder = DATA / "experiments" / name
        summary = store.read_json(folder / "summary.json")
        section = page.add(Section(name, summary["title"], summary["notes"]))
        file = page.folder / f"{name}.png"
        file.write_bytes(store.read_bytes(folder / "figure.png"))
        page.image(section, file, summary["caption"])


def _metrics(name: str) -> dict[str, dict[str, Any]]:
    metrics: dict[str, dict[str, Any]] = store.read_json(DATA / "metrics" / f"{name}.json")
    return metrics


def _curve(name: str, method: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(DATA / "logs" / name / f"{method}.csv")


def _table(name: str) -> dict[str, Any]:
    """A table that the tables stage wrote, for the template."""
    table: dict[str, Any] = store.read_json(DATA / "tables" / f"{name}.json")
    return table


if __name__ == "__main__":
    run(main)
