"""Write the report: one self-contained HTML page and its figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import files, layout, metric_keys
from pipelines.config.params import Params
from pipelines.config.yaml_files import write_yaml
from pipelines.reporting import facts, ranking
from pipelines.reporting.facts import Facts
from pipelines.reporting.figures import curves, style
from pipelines.reporting.figures import density as density_figures
from pipelines.reporting.figures import planning as planning_figures
from pipelines.reporting.figures import successor as successor_figures
from pipelines.reporting.labels import label
from pipelines.reporting.tables import ORDER, physics_steps
from pipelines.reporting.tables.density import said
from pipelines.reporting.tables.literature import beaten
from pipelines.runs.context import Stage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
IMAGES = {"digits": density_figures.digits, "bsds300": density_figures.patches}
"""Kinds of data sets whose rows are drawn as images."""
DRAWN = 10_000  # maximum number of test rows in a picture
TERMS = {"direct": "direct term", "bootstrap": "bootstrap term"}
SCATTERED = 160  # colours in the palette of a scatter plot, which uses shades of few colours
OPEN = 3  # maximum number of environments, or of data sets, that are shown unfolded
SHORT = 300  # maximum number of characters of notes that are shown unfolded
VERDICTS = {
    **{word: word.lower() for word in ("holds", "FAILS", "open", "diverged", "measured")},
    "not significant": "open",
}


@dataclass
class Section:
    """A section of the page.

    Attributes:
        id: Anchor.
        title: Heading.
        text: Paragraph below the heading.
        lead: Summary in one sentence.
        figures: Figures as base64 PNG with captions.
        notes: Sentences below the figures.
        parts: Sections inside this one, which can be folded.
    """

    id: str
    title: str
    text: str = ""
    lead: str = ""
    figures: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Section] = field(default_factory=list)


@dataclass(frozen=True)
class Incomplete:
    """What a page that a failed run leaves does not have.

    Attributes:
        failed: Reason by failed stage.
        missing: Entries of params.yaml without results, as texts.
    """

    failed: Mapping[str, str]
    missing: Sequence[str]


class Page:
    """The contents of the page, and the folder in which each figure is saved as a file."""

    def __init__(self, figures: Path, incomplete: Incomplete | None = None) -> None:
        self.short = Section("results", "Summary")
        self.overall = ""
        self.incomplete = incomplete
        self.tables: list[dict[str, Any]] = []
        self.environments: list[Section] = []
        self.others: list[Section] = []
        self.folder = figures

    def picture(self, section: Section, name: str, figure: Figure, caption: str, colours: int = SCATTERED) -> None:
        """Save a figure as a file and add it to a section; a small palette makes a small file."""
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
        """Add an existing picture to a section."""
        section.figures.append({"png": base64.b64encode(file.read_bytes()).decode(), "caption": caption})


def write(stage: Stage) -> None:
    """Write the page and its figures."""
    with stage.output(layout.REPORT) as folder:
        compose(stage.params, folder, layout.TABLES, facts.gather(stage.record.invocation))
        stage.log(f"{layout.page(folder).stat().st_size / 1e6:.1f} MB")
    stage.record.artifact(layout.page(layout.REPORT))
    stage.record.artifact(layout.figures(layout.REPORT))


def compose(params: Params, folder: Path, tables: Path, run: Facts, incomplete: Incomplete | None = None) -> None:
    """Write the page and its figures into a folder.

    Args:
        params: Contents of params.yaml; every entry has results.
        folder: Folder of the page.
        tables: Folder of the tables.
        run: Facts about the run.
        incomplete: What the run did not produce, if it failed.
    """
    layout.figures(folder).mkdir(parents=True)
    page = Page(layout.figures(folder), incomplete)
    metrics = {name: _metrics(name) for name in params.environments}
    for name in params.environments:
        _environment(page, params, name, metrics[name])
    if metrics:
        _short(page, params, metrics)
    page.tables = [table for name in ORDER if (table := _table(tables, name))["rows"]]
    if params.datasets:
        _densities(page, params)
    for name in params.plans:
        _plans(page, params, name)
    _experiments(page, params)
    layout.page(folder).write_text(render(page, params, run), encoding="utf-8")


def render(page: Page, params: Params, run: Facts) -> str:
    """Return the page as HTML, with all texts escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True)
    return environment.get_template("report.html.j2").render(
        params=params,
        page=page,
        run=run,
        duration=facts.duration,
        most=OPEN,
        short=SHORT,
        verdict=verdict,
        yaml=write_yaml(params.model_dump(mode="json"), default_flow_style=None, width=110),
    )


def verdict(cell: str) -> str:
    """Return the CSS class of a table cell that is a verdict.

    >>> verdict("FAILS"), verdict("not significant"), verdict("open water")
    ('fails', 'open', '')
    """
    return VERDICTS.get(cell, "")


def _short(page: Page, params: Params, metrics: Mapping[str, ranking.EnvironmentCells]) -> None:
    """Add the summary: the overall ranking and the comparisons across environments."""
    page.overall = ranking.overall(params, metrics) if len(metrics) > 1 else ""
    caption = (
        "EMD divided by the mean floor of each environment, with its 95 % intervals over seeds; a cross marks a method "
        "that diverged. MC-CFM, which is trained on the policy's own rollouts, and the oracle, the closed form, are "
        "references and not ranked."
    )
    page.picture(page.short, "emd", curves.against_floor(metrics), caption)
    for name, group in ranking.horizon_groups(params).items():
        caption = (
            f"{', '.join(group.values())}: environments that differ only in γ, and in the episode length and the step "
            "of the target network, which depend on it. Dashed lines are the floors; a cross at the top marks a method "
            "that diverged."
        )
        cells = {gamma: metrics[environment] for gamma, environment in group.items()}
        figure = curves.horizons(cells, physics_steps(params.environments[name]))
        page.picture(page.short, f"{name}-horizons", figure, caption)


def _environment(page: Page, params: Params, name: str, metrics: ranking.EnvironmentCells) -> None:
    entry, folder, collected = params.environments[name], layout.samples(name), layout.collected(name)
    provenance = files.read_json(layout.provenance(collected))
    names, bounds, walls = provenance["state_names"], provenance["bounds"], provenance["walls"]
    evaluation = files.read_table(layout.evaluation(collected))
    starts = evaluation.loc[evaluation["step"] == 0, metric_keys.columns("state", names)]
    file = layout.truth(layout.evaluations(name))
    truth = _shown(files.read_table(file), names) if file.exists() else None  # there may be no reference
    diverged = [method for method, cell in metrics.items() if cell.get("diverged")]
    samples, trajectories = {}, {}
    for method in params.successor.methods:
        if (file := layout.sampled(folder, method)).exists():
            table = _shown(files.read_table(file, finite=False), names)  # panels count samples that are not finite
            samples[method] = table[table["seed"] == params.successor.seeds_for(entry, method)[0]]
        if (file := layout.trajectory(folder, method)).exists():
            trajectories[method] = _shown(files.read_table(file), names)
    rivals = ranking.rivals(params, name, metrics)
    text = f"{ranking.details(params, name, metrics, rivals)} {provenance['source']} ({provenance['fidelity']})."
    lead = ranking.ranking(rivals) if truth is not None else ranking.residuals(metrics)
    section = Section(name, name, text, lead)
    page.environments.append(section)
    film = layout.film(collected)
    if film.exists():
        file = page.folder / f"{name}-film.png"
        file.write_bytes(files.read_bytes(film))
        page.image(section, file, "The policy, in frames a tenth of a second apart.")
    plane = len(names) > 1
    if samples and plane:
        caption = (
            f"Future states of the policy (γ = {entry.gamma:g}): {'truth and ' if truth is not None else ''}samples of "
            "every method (its first seed), one row per start state (red). A panel states the share of its points "
            "beyond its edges as not shown."
        )
        figure = successor_figures.occupancy(truth, samples, starts, bounds, walls, diverged)
        page.picture(section, f"{name}-occupancy", figure, caption)
    file = layout.value_map(folder)
    if file.exists() and (values := files.read_table(file))["method"].nunique() > 1:  # more than the truth
        caption = (
            f"Value V(s, π(s)) of the reward {entry.reward} under the policy, from each position at rest: truth, and "
            "every method (its first seed) above its error. Errors include sampling noise, because "
            "there are few samples per position."
        )
        page.picture(
            section, f"{name}-values", successor_figures.value_maps(values, bounds, walls, diverged), caption, 0
        )
    if trajectories and plane:
        caption = "Samples of the first start state (red) along flow time, from noise (t = 0) to future states (t = 1)."
        shown = bounds if walls or truth is None else style.around(truth[truth["start"] == 0])
        figure = density_figures.paths(trajectories, walls=walls, bounds=shown, start=starts.iloc[0, :2].tolist())
        page.picture(section, f"{name}-path", figure, caption)
    logs = {method: _curve(name, method) for method in params.successor.methods if entry.runs(method)}
    caption = "Training losses, means over seeds. Their minima are not zero and differ between methods."
    page.picture(section, f"{name}-loss", curves.losses(logs, TERMS), caption)


def _densities(page: Page, params: Params) -> None:
    section = Section("densities", "Densities")
    page.others.append(section)
    metrics = {name: _metrics(name) for name in params.datasets}
    provenance = {name: files.read_json(layout.provenance(layout.prepared(name))) for name in params.datasets}
    run = {name: params.density.methods_for(entry) for name, entry in params.datasets.items()}
    methods = {name: {m: metrics[name][m] for m in ("floor", *here)} for name, here in run.items()}
    caption = "EMD in units of the training rows' standard deviations, divided by the floor; mean over seeds."
    page.picture(section, "densities-emd", curves.against_floor(methods), caption)
    for name in params.datasets:
        lead = " ".join([_best(run[name], metrics[name]), *beaten(name, params, metrics)])
        part = Section(name, name, lead=lead, notes=[*said(name, metrics, provenance)])
        section.parts.append(part)
        _dataset(page, part, params, provenance[name], metrics[name])


def _best(methods: Sequence[str], cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return which method has the lowest test NLL, beside the closed forms."""
    found = {method: cells[method]["nll"] for method in methods if cells[method].get("nll") is not None}
    if not found:
        return "No method has a likelihood."
    best = min(found, key=lambda method: found[method])
    exact = [
        ("the exact density", cells["floor"].get("nll")),
        ("one Gaussian", cells.get(metric_keys.REFERENCE, {}).get("nll")),
    ]
    beside = ", ".join(f"{name} {value:.3g}" for name, value in exact if value is not None)
    return f"{label(best)} has the lowest test NLL, {found[best]:.3g} nats{f' ({beside})' if beside else ''}."


def _dataset(
    page: Page,
    section: Section,
    params: Params,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
) -> None:
    """Add the pictures of a data set to its section."""
    name, entry = section.id, params.datasets[section.id]
    methods = params.density.methods_for(entry)
    columns, conditions = provenance["columns"], provenance["conditions"]
    named = [*columns, *(condition["name"] for condition in conditions)]
    folder, seed = layout.samples(name), metric_keys.free("seed", named)
    test = files.read_table(layout.part(layout.prepared(name), "test"))[named]
    tables = {"data": test if len(test) <= DRAWN else test.sample(DRAWN, random_state=0)}
    for method in methods:
        table = files.read_table(layout.sampled(folder, method))
        tables[method] = table.loc[table[seed] == params.density.seeds_for(entry, method)[0], named].reset_index(
            drop=True
        )
    group, given = None, ""
    if conditions:
        group_of = density_figures.groups(conditions[0], tables["data"])
        group = {what: group_of(table) for what, table in tables.items()}
        given = f", by {conditions[0]['name']}"
    if (sizes := provenance.get("image")) is not None:
        word = next((one["name"] for one in conditions if one["kind"] == "words"), None)
        words = None if word is None else {what: table[word] for what, table in tables.items()}
        figure = density_figures.images(tables, columns, sizes, words)
        page.picture(section, f"{name}-images", figure, f"Test images and samples of every method{given}.", 0)
    elif provenance["kind"] in IMAGES:
        figure = IMAGES[provenance["kind"]](tables["data"], dict(list(tables.items())[1:]))
        page.picture(section, f"{name}-images", figure, "Test images and samples.")
    elif len(columns) == 2:
        caption = f"Test rows and samples of every method: {columns[1]} over {columns[0]}{given}."
        page.picture(section, f"{name}-samples", density_figures.planes(tables, group), caption)
    else:
        _columns(page, section, tables, columns, group, given)
    if len(columns) == 2:
        _flow(page, section, methods, metric_keys.free("time", columns))
    logs = {method: _curve(name, method) for method in methods}
    chosen = {method: metrics[method].get("chosen_step") for method in methods}
    caption = (
        "Training and validation loss, means over seeds; a point marks the network that was kept. Their minima are "
        "not zero and differ between methods."
    )
    terms = {"loss": "loss", "val_loss": "validation loss"}
    terms |= {f"tune_{term}": f"{title} of the second phase" for term, title in terms.items()}
    terms = {term: title for term, title in terms.items() if any(term in table for table in logs.values())}
    page.picture(section, f"{name}-loss", curves.losses(logs, terms, chosen), caption)


def _columns(
    page: Page,
    section: Section,
    tables: Mapping[str, pd.DataFrame],
    columns: Sequence[str],
    group: Mapping[str, pd.Series[Any]] | None,
    given: str,
) -> None:
    """Add histograms of columns, and pairs of columns where there are several."""
    shown = {column: {what: table[column] for what, table in tables.items()} for column in columns}
    if len(columns) == 1 and group is not None:
        names, only = list(group["data"].cat.categories), columns[0]
        shown = {n: {what: table.loc[group[what] == n, only] for what, table in tables.items()} for n in names}
    few = dict(list(shown.items())[: density_figures.SHOWN_COLUMNS])
    what = f"The first {len(few)} of {len(shown)} columns" if len(few) < len(shown) else "Columns"
    what = f"{columns[0]}{given}" if len(columns) == 1 else what
    caption = f"{what}: test rows (area) and samples of every method (lines); the share beyond a panel is left out."
    page.picture(section, f"{section.id}-columns", density_figures.histograms(few), caption, 0)
    if len(columns) > 1:
        paired = columns[: density_figures.SHOWN_PAIRED]
        count = f"the first {len(paired)} of {len(columns)} columns" if len(paired) < len(columns) else "columns"
        caption = f"Pairs of {count}{given}: test rows, and as many samples of every method."
        page.picture(section, f"{section.id}-pairs", density_figures.pairs(tables, paired, group), caption, 0)


def _flow(page: Page, section: Section, methods: Sequence[str], clock: str) -> None:
    """Add the states of particles and the velocity fields of the methods that have them."""
    name, folder = section.id, layout.samples(section.id)
    for read, what, draw, caption in (
        (
            layout.trajectory,
            "path",
            partial(density_figures.paths, clock=clock),
            "The probability path, from noise (t = 0) to data (t = 1).",
        ),
        (layout.field, "field", density_figures.fields, "The velocity field in standardised units, coloured by speed."),
    ):
        there = {method: files.read_table(read(folder, method)) for method in methods if read(folder, method).exists()}
        if there:
            page.picture(section, f"{name}-{what}", draw(there), caption)


def _plans(page: Page, params: Params, name: str) -> None:
    """Add the episodes of planners of an environment, a picture of each task."""
    settings, provenance = params.plans[name], files.read_json(layout.provenance(layout.collected(name)))
    family, found = provenance["family"], files.read_json(layout.planned(name))
    law = settings.laws[-1]
    text = (
        f"Generalised policy improvement among policies of a family ({family['source']}): every {settings.every} "
        f"transitions {settings.candidates} candidates are compared by {settings.samples} samples each, and one other "
        f"than the task's best single policy must exceed it by {settings.margin:g} standard errors."
    )
    section = Section(f"{name}-planning", f"Planning in {name}", text)
    page.others.append(section)
    paths = files.read_table(layout.paths(layout.plans(name)))
    for reward in settings.rewards:
        here = {str(method): rows for method, rows in paths[paths["reward"] == reward].groupby("method", sort=False)}
        returns = {m: found[reward][m].get("return", found[reward][m].get(f"return_{law}")) for m in here}
        best = max(returns, key=lambda method: returns[method])
        part = Section(f"{name}-{reward}", reward, lead=f"{label(best)} has the greatest return.")
        section.parts.append(part)
        figure = planning_figures.paths(here, provenance["bounds"], provenance["walls"], family["low"], family["high"])
        caption = (
            f"{reward}: episodes of the first seed from their starts (red), candidates of law {law}. The colour is "
            "the w of the policy that is followed, a cross its goal."
        )
        page.picture(part, f"{name}-{reward}", figure, caption, 0)


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


def _shown(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return samples with the columns `seed`, `start` and `time`, whatever the components of the state are called."""
    own = dict(zip(names, metric_keys.columns("state", names), strict=True))
    internal = {metric_keys.free(name, names): name for name in ("seed", "start", "time")}
    return table.rename(columns=own | internal)


def _curve(name: str, method: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(layout.curve(name, method))


def _table(folder: Path, name: str) -> dict[str, Any]:
    """Return a table that was written, with the display names of methods, and its CSV file as base64."""
    table: dict[str, Any] = files.read_json(layout.table(folder, name, "json"))
    for place, column in enumerate(table["columns"]):
        if column in ("method", "against") or column.startswith("smaller"):
            for row in table["rows"]:
                row[place] = label(row[place])
    csv = base64.b64encode(files.read_bytes(layout.table(folder, name, "csv"))).decode()
    return {**table, "id": f"table-{name}", "name": name, "csv": csv}
