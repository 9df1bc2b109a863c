"""Write the report: one self-contained HTML page and its pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import files, layout, metric_keys
from pipelines.config.params import Params
from pipelines.reporting import ranking
from pipelines.reporting.figures import curves, style
from pipelines.reporting.figures import density as density_figures
from pipelines.reporting.figures import successor as successor_figures
from pipelines.reporting.labels import label
from pipelines.reporting.tables import ORDER
from pipelines.runs.context import Stage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
TERMS = {"direct": "direct term", "bootstrap": "bootstrap term"}
SCATTERED = 160  # colours of a picture of points, which are shades of a few
OPEN = 3  # so many environments stand open on the page
SHORT = 300  # letters of notes that are not folded
VERDICTS = {word: word.lower() for word in ("holds", "FAILS", "open", "diverged", "measured")}


@dataclass
class Section:
    """A part of the page; `lead` is what it says in a sentence."""

    id: str
    title: str
    text: str = ""
    lead: str = ""
    figures: list[dict[str, str]] = field(default_factory=list)


class Page:
    """What is on the page so far, and the folder that keeps each picture as a file of its own."""

    def __init__(self, figures: Path) -> None:
        self.short = Section("results", "In short")
        self.overall = ""
        self.tables: list[dict[str, Any]] = []
        self.environments: list[Section] = []
        self.others: list[Section] = []
        self.folder = figures

    def picture(self, section: Section, name: str, figure: Figure, caption: str, colours: int = SCATTERED) -> None:
        """Save a figure as a file and put it on the page; few colours make a small file."""
        from matplotlib import pyplot as plt
        from PIL import Image

        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        plt.close(figure)
        file = self.folder / f"{name}.png"
        picture = Image.open(drawn).convert("RGB")
        if colours:
            picture = picture.quantize(colours, dither=Image.Dither.NONE)
        picture.save(file, optimize=True)
        self.image(section, file, caption)

    def image(self, section: Section, file: Path, caption: str) -> None:
        """Put a picture that is there on the page."""
        section.figures.append({"png": base64.b64encode(file.read_bytes()).decode(), "caption": caption})


def write(stage: Stage) -> None:
    """Write the page and its pictures."""
    params = stage.params
    with stage.output(layout.REPORT) as folder:
        layout.figures(folder).mkdir(parents=True)
        page = Page(layout.figures(folder))
        metrics = {name: _metrics(name) for name in params.environments}
        for name in params.environments:
            _environment(page, params, name, metrics[name])
        _short(page, params, metrics)
        page.tables = [table for name in ORDER if (table := _table(name))["rows"]]
        if params.datasets:
            _densities(page, params)
        _experiments(page, params)
        html = render(page, params)
        layout.page(folder).write_text(html)
    stage.log(f"{len(html) / 1e6:.1f} MB")
    stage.record.artifact(layout.page(layout.REPORT))
    stage.record.artifact(layout.figures(layout.REPORT))


def render(page: Page, params: Params) -> str:
    """The page as HTML; whatever a text holds, it stays text."""
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True)
    return environment.get_template("report.html.j2").render(
        params=params,
        page=page,
        fold=len(page.environments) > OPEN,
        short=SHORT,
        verdict=verdict,
        yaml=yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110),
    )


def verdict(column: str, cell: str) -> str:
    """The style of a table's cell: that of the verdict which it is, or begins with in the column of verdicts.

    >>> verdict("verdict", "open, each seed in range")
    'open'
    >>> verdict("verdict", "FAILS by far"), verdict("smaller EMD", "diverged"), verdict("claim", "open water")
    ('fails', 'diverged', '')
    """
    return VERDICTS.get(cell.split(" ")[0].rstrip(",") if column == "verdict" else cell, "")


def _short(page: Page, params: Params, metrics: Mapping[str, ranking.Cells]) -> None:
    """What a reader should see first, below the sentences of the environments."""
    page.overall = ranking.overall(params, metrics) if len(metrics) > 1 else ""
    caption = (
        "EMD over the floor of each environment, with 95 % intervals; a cross is a method that diverged. MC-CFM, "
        "which sees the policy's own rollouts, and the oracle, the closed form, do not compete."
    )
    page.picture(page.short, "emd", curves.against_floor(metrics), caption)
    for name, group in ranking.horizon_groups(params).items():
        caption = (
            f"{', '.join(group.values())}: the same but for γ, and the episodes' length and the target's step that go "
            "with it. The dashed lines are the floors; a cross at the top is a method that diverged."
        )
        figure = curves.horizons({gamma: metrics[environment] for gamma, environment in group.items()})
        page.picture(page.short, f"{name}-horizons", figure, caption)


def _environment(page: Page, params: Params, name: str, metrics: ranking.Cells) -> None:
    entry, folder, collected = params.environments[name], layout.samples(name), layout.collected(name)
    provenance = files.read_json(layout.provenance(collected))
    names, bounds, walls = provenance["state_names"], provenance["bounds"], provenance["walls"]
    evaluation = files.read_table(layout.evaluation(collected))
    starts = evaluation.loc[evaluation["step"] == 0, metric_keys.columns("state", names)]
    truth = files.read_table(layout.truth(layout.evaluations(name)))
    diverged = [method for method, cell in metrics.items() if cell.get("diverged")]
    samples, ways = {}, {}
    for method in params.successor.methods:
        if (file := layout.sampled(folder, method)).exists():
            table = files.read_table(file, finite=False)  # a panel counts what is not
            samples[method] = table[table["seed"] == params.successor.seeds[0]]
        if (file := layout.trajectory(folder, method)).exists():
            ways[method] = files.read_table(file)
    rivals = ranking.rivals(params, name, metrics)
    text = f"{ranking.details(params, name, metrics, rivals)} {provenance['source']} ({provenance['fidelity']})."
    section = Section(name, name, text, ranking.ranking(rivals, len(params.successor.seeds)))
    page.environments.append(section)
    plane = len(names) > 1
    if samples and plane:
        caption = (
            f"Where the policy will be (γ = {entry.gamma:g}): truth and samples of every method (seed "
            f"{params.successor.seeds[0]}), one row a start state (red)."
        )
        figure = successor_figures.occupancy(truth, samples, starts, bounds, walls, diverged)
        page.picture(section, f"{name}-occupancy", figure, caption)
    file = layout.value_map(folder)
    if file.exists() and (values := files.read_table(file))["method"].nunique() > 1:  # more than the truth
        caption = (
            f"The value of {entry.reward} under the policy, V(s, π(s)), from each position at rest: truth, methods "
            f"(seed {params.successor.seeds[0]}) and, below each, its error. The samples of a position are few."
        )
        page.picture(
            section, f"{name}-values", successor_figures.value_maps(values, bounds, walls, diverged), caption, 0
        )
    if ways and plane:
        caption = "Samples of the first start state (red) on their way from noise (t = 0) to where the policy will be."
        shown = bounds if walls else style.around(truth[truth["start"] == 0])
        figure = density_figures.paths(ways, walls=walls, bounds=shown, start=starts.iloc[0, :2].tolist())
        page.picture(section, f"{name}-path", figure, caption)
    logs = {method: _curve(name, method) for method in params.successor.methods if entry.runs(method)}
    caption = "Losses over training, means over seeds. Their minima differ between methods and are not zero."
    page.picture(section, f"{name}-loss", curves.losses(logs, TERMS), caption)


def _densities(page: Page, params: Params) -> None:
    methods, first = list(params.density.methods), params.density.seeds[0]
    section = Section("densities", "Densities")
    page.others.append(section)
    metrics = {name: _metrics(name) for name in params.datasets}
    caption = "EMD over the floor of each data set, mean over seeds."
    page.picture(section, "densities-emd", curves.against_floor(metrics), caption)
    plane: dict[str, tuple[pd.DataFrame, dict[str, pd.DataFrame]]] = {}
    for name in params.datasets:
        columns = files.read_json(layout.provenance(layout.prepared(name)))["columns"]
        test = files.read_table(layout.part(layout.prepared(name), "test"))
        tables = {m: files.read_table(layout.sampled(layout.samples(name), m)) for m in methods}
        samples = {m: table.loc[table["seed"] == first, columns] for m, table in tables.items()}
        if len(columns) == 2:
            plane[name] = test, samples
        elif params.datasets[name].kind == "digits":
            page.picture(
                section, f"{name}-images", density_figures.digits(test, samples), f"{name}: test images and samples."
            )
    if plane:
        figure = density_figures.densities(
            {n: test for n, (test, _) in plane.items()}, {n: s for n, (_, s) in plane.items()}
        )
        page.picture(section, "densities", figure, "Samples against data.")
    for name in plane:
        folder = layout.samples(name)
        ways = {m: files.read_table(layout.trajectory(folder, m)) for m in methods}
        caption = f"{name}: the probability path, from noise (t = 0) to data (t = 1)."
        page.picture(section, f"{name}-path", density_figures.paths(ways), caption)
        velocities = {m: files.read_table(layout.field(folder, m)) for m in methods}
        caption = f"{name}: the velocity field in standardised units, coloured by speed."
        page.picture(section, f"{name}-field", density_figures.fields(velocities), caption)
    for name in params.datasets:
        logs = {m: _curve(name, m) for m in methods}
        caption = f"{name}: training loss, mean over seeds; its minimum is not zero, and differs between couplings."
        page.picture(section, f"{name}-loss", curves.losses(logs, {"loss": "loss"}), caption)


def _experiments(page: Page, params: Params) -> None:
    for name in params.experiments:
        folder = layout.experiment(name)
        summary = files.read_json(layout.summary(folder))
        section = Section(name, summary["title"], summary["notes"])
        page.others.append(section)
        file = page.folder / f"{name}.png"
        file.write_bytes(files.read_bytes(layout.figure(folder)))
        page.image(section, file, summary["caption"])


def _metrics(name: str) -> dict[str, dict[str, Any]]:
    metrics: dict[str, dict[str, Any]] = files.read_json(layout.metrics(name))
    return metrics


def _curve(name: str, method: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(layout.curve(name, method))


def _table(name: str) -> dict[str, Any]:
    """A table that the tables stage wrote, for the template: with the names of methods."""
    table: dict[str, Any] = files.read_json(layout.table(layout.TABLES, name, "json"))
    for place, column in enumerate(table["columns"]):
        if column in ("method", "against") or column.startswith("smaller"):
            for row in table["rows"]:
                row[place] = label(row[place])
    return {**table, "id": f"table-{name}"}
