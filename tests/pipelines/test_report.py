"""The report: what it says follows from the metrics, pictures hide nothing, and texts stay texts."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pipelines.base import files, layout
from pipelines.config import params, yaml_files
from pipelines.config.params import Params
from pipelines.reporting import facts, labels, ranking, report
from pipelines.reporting.facts import Facts
from pipelines.reporting.figures import curves, successor
from pipelines.reporting.figures import density as density_figures
from pipelines.reporting.report import Incomplete
from pipelines.runs.records import Record, RunRecord

ROOT = Path(__file__).parents[2]
PARAMS = params.load(ROOT / "params.yaml")


def cell(emd: float, width: float | None = 0.05, luck: tuple[int, ...] = (-1, 0, 1), **others: Any) -> dict[str, Any]:
    """Metrics of a method at a floor of .1, so that emd / floor is ten times the EMD; `luck` orders its seeds."""
    if width is None:
        return {"emd": emd, "emd_seed0": emd, **others}
    seeds = {f"emd_seed{seed}": emd * (1 + width * step) for seed, step in enumerate(luck)}
    return {"emd": emd, "emd_low": emd * (1 - width), "emd_high": emd * (1 + width), **seeds, **others}


def metrics(**methods: dict[str, Any]) -> dict[str, Any]:
    return {"floor": {"emd": 0.1, "mse_v": 0.2}, **methods}


def ranked(environment: str = "spiral", **methods: dict[str, Any]) -> str:
    return ranking.ranking(ranking.rivals(PARAMS, environment, metrics(**methods)))


def changed(**changes: Any) -> Params:
    return Params.model_validate(yaml_files.merge(PARAMS.model_dump(mode="json"), changes))


# ---- sentences ----


def test_the_best_off_policy_method_is_named_with_its_ratio_and_the_others_behind() -> None:
    said = ranked(mc_cfm=cell(0.11), td_cfm=cell(1.16), td_cfm_coupled=cell(0.9), td2_cfm=cell(0.41))
    assert said == (
        "TD²-CFM has the smallest EMD of the off-policy methods, 4.1 × the floor; then TD-CFM(C) 9 ×, TD-CFM 11.6 ×."
    )


def test_neither_the_policys_rollouts_nor_the_closed_form_win() -> None:
    cells = metrics(mc_cfm=cell(0.11), oracle=cell(0.1), td_cfm=cell(1.0), td2_cfm=cell(0.4))
    among = ranking.rivals(PARAMS, "spiral", cells)
    assert list(among) == ["td_cfm", "td2_cfm"]
    assert ranking.details(PARAMS, "spiral", cells, among) == (
        "For reference: MC-CFM, trained on the policy's own rollouts, 1.1 ×; the closed form 1 ×."
    )


def test_n_step_returns_are_taken_on_the_policy_and_do_not_compete() -> None:
    several = changed(successor={"methods": {"td_cfm": {"fit": {"returns": 3}}}})
    cells = metrics(td_cfm=cell(0.2), td2_cfm=cell(0.4))
    assert list(ranking.rivals(several, "spiral", cells)) == ["td2_cfm"]


def test_a_difference_that_seeds_do_not_agree_on_is_no_win() -> None:
    other = (1, -1, 0)
    close = ranked(td_cfm=cell(1.16), td_cfm_coupled=cell(0.43, luck=other), td2_cfm=cell(0.41))
    assert "not significantly different over 3 seeds: TD-CFM(C) 4.3 ×; then TD-CFM 11.6 ×." in close
    for apart in (cell(0.43, 0.001, other), cell(0.43)):  # little luck; or the same luck, which the pairs take out
        width = 0.001 if apart["emd_seed0"] > 0.42 else 0.05
        assert "significantly" not in ranked(td_cfm_coupled=apart, td2_cfm=cell(0.41, width))


def test_one_seed_has_no_interval_and_no_tie() -> None:
    said = ranked(td_cfm_coupled=cell(0.41, None), td2_cfm=cell(0.4, None))
    assert "4 × the floor (one seed, so no interval); then TD-CFM(C) 4.1 ×." in said


@pytest.mark.parametrize("lost", [{"emd": 0.01, "diverged": True}, {"emd": None, "diverged": True}])
def test_what_diverged_is_named_and_never_best(lost: dict[str, Any]) -> None:
    said = ranked(td_cfm=lost, td2_cfm=cell(0.4))
    assert said.startswith("TD²-CFM has the smallest EMD") and said.endswith("; TD-CFM diverged.")
    assert ranked(td_cfm=lost, td2_cfm=lost) == "No off-policy method has an EMD: TD-CFM and TD²-CFM diverged."


def test_a_method_that_was_not_run_is_not_spoken_of() -> None:
    said = ranked(td_cfm={"skipped": "spiral does not list it"}, td2_cfm=cell(0.4))
    assert "TD-CFM" not in said.replace("TD²-CFM", "")
    assert ranked() == "No off-policy method has an EMD."


def test_a_variant_does_not_compete_with_its_own_method() -> None:
    both = changed(successor={"methods": {"td2_cfm_curved": {"loss": "td2_cfm"}}})
    rivals = ranking.rivals(both, "spiral", metrics(td2_cfm=cell(0.4), td2_cfm_curved=cell(0.3), td_cfm=cell(0.9)))
    assert set(rivals) == {"td_cfm", "td2_cfm"}
    assert list(ranking.rivals(both, "spiral", metrics(td2_cfm_curved=cell(0.3)))) == ["td2_cfm_curved"]


def test_values_are_told_beside_their_floor() -> None:
    cells = metrics(td_cfm=cell(1, mse_v=9.0), td2_cfm=cell(2, mse_v=0.5))
    said = ranking.details(PARAMS, "spiral", cells, ranking.rivals(PARAMS, "spiral", cells))
    assert said == "MSE(V): TD²-CFM 0.5, at a floor of 0.2."


def test_overall_counts_wins_ties_and_divergence() -> None:
    maze = metrics(td_cfm=cell(1.16), td_cfm_coupled=cell(0.42, luck=(1, -1, 0)), td2_cfm=cell(0.41))
    spiral = metrics(td_cfm={"emd": 1e9, "diverged": True}, td_cfm_coupled=cell(0.9), td2_cfm=cell(0.4))
    assert ranking.overall(PARAMS, {"maze_loop": maze, "spiral": spiral}) == (
        "Smallest EMD of the off-policy methods, or not significantly different from it: "
        "TD²-CFM in 2 of 2 (median 4.05 × the floor); "
        "TD-CFM(C) in 1 of 2 (median 6.6 × the floor); TD-CFM in 0 of 2 (median 11.6 × the floor, diverged in 1)."
    )


# ---- groups of environments that differ in gamma ----


def horizons(**changes: dict[str, Any]) -> dict[str, dict[float, str]]:
    maze = PARAMS.environments["maze_loop"].model_dump(mode="json")
    more = {name: {**maze, **change} for name, change in changes.items()}
    return ranking.horizon_groups(changed(environments=more))


def test_environments_that_differ_in_gamma_are_a_group_in_its_order() -> None:
    found = horizons(maze_loop_g99={"gamma": 0.99, "length": 1000}, maze_loop_g80={"gamma": 0.8})
    assert found == {"maze_loop": {0.8: "maze_loop_g80", 0.95: "maze_loop", 0.99: "maze_loop_g99"}}
    assert list(found["maze_loop"]) == [0.8, 0.95, 0.99]


@pytest.mark.parametrize("other", [{"task": "square"}, {"action_repeat": 1}, {"reward": "square"}, {"gamma": 0.95}])
def test_others_are_none(other: dict[str, Any]) -> None:
    assert horizons(other={"gamma": 0.99, **other}) == {}


# ---- pictures ----


def points(*rows: tuple[float, float], start: int = 0) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["x", "y"]).assign(start=start)


def words(figure: Figure) -> list[str]:
    """Every text in the panels of a figure, their titles too."""
    found = [text.get_text() for axis in figure.axes for text in (axis.title, *axis.texts)]
    plt.close(figure)
    return [text for text in found if text]


BOX, WALLS = [-1.0, -1.0, 1.0, 1.0], [[-0.1, -0.5, 0.1, 0.5]]
INSIDE = [(0.5, 0.5)] * 97


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        ([(0.0, 0.0)] * 3, None),
        ([(2.0, 0.0), (0.0, 2.0), (-2.0, 0.0)], "3 % not shown"),
        ([(0.0, -2.0)] + [(0.0, 0.0)] * 200, "<1 % not shown"),
        ([(9.0, 9.0)] * 97, "50 % not shown"),
        ([(np.nan, 0.0), (0.0, np.inf), (0.0, 2.0)], "3 % not shown"),
    ],
)
def test_samples_beyond_a_panel_are_counted_in_it(lost: list[tuple[float, float]], text: str | None) -> None:
    samples = {"td_cfm": points(*INSIDE, *lost)}
    drawn = words(successor.occupancy(points(*INSIDE), samples, points((0.0, 0.9)), BOX, WALLS))
    assert [word for word in drawn if "not shown" in word] == ([text] if text else [])


def test_every_method_is_drawn_with_its_truth_and_divergence_in_its_title() -> None:
    methods = ["mc_cfm", "td_cfm", "td_cfm_coupled", "td2_cfm", "td_dd", "td2_dd", "gan", "vae"]
    samples = {method: points(*INSIDE) for method in methods}
    drawn = words(successor.occupancy(points(*INSIDE), samples, points((0.0, 0.9)), BOX, WALLS, ["td_dd"]))
    expected = [labels.label(method) for method in methods]
    expected[4] = "TD-DD (diverged)"
    assert [word for word in drawn if word != "truth"] == expected
    assert drawn.count("truth") == 2  # before each of two rows


def test_a_value_map_shows_the_error_of_every_method_and_a_hole_where_there_is_no_position() -> None:
    place = pd.DataFrame({"x": [-0.5, 0.5, -0.5], "y": [-0.5, -0.5, 0.5]})
    tables = [place.assign(method="truth", value=[0.0, 1.0, 2.0]), place.assign(method="gan", value=[3.0, 4.0, 5.0])]
    figure = successor.value_maps(pd.concat(tables), BOX, WALLS)
    meshes = [axis.collections[0] for axis in figure.axes if axis.collections]
    assert [int(np.ma.getmaskarray(mesh.get_array()).sum()) for mesh in meshes[:3]] == [1, 1, 1]
    assert meshes[0].get_clim() == meshes[1].get_clim() == (0.0, 2.0)
    assert meshes[2].get_array().compressed().tolist() == [3.0] * 3  # too large is positive
    assert words(figure) == ["truth", "GAN", "error, rms 3"]


def test_a_method_that_diverged_leaves_the_colours_of_errors_to_the_others() -> None:
    place = pd.DataFrame({"x": [-0.5, 0.5, -0.5], "y": [-0.5, -0.5, 0.5]})
    values = {"truth": [0.0, 1.0, 2.0], "td2_cfm": [0.5, 1.5, 2.5], "td_cfm": [1e6, 1e6, 1e6]}
    table = pd.concat(place.assign(method=method, value=value) for method, value in values.items())
    for diverged, largest in ((["td_cfm"], 0.5), ([], 2.0)):
        figure = successor.value_maps(table, BOX, WALLS, diverged)
        meshes = [axis.collections[0] for axis in figure.axes if axis.collections]
        assert [mesh.get_clim() for mesh in meshes[3:5]] == [(-largest, largest)] * 2
        plt.close(figure)


@pytest.mark.parametrize("diverged", [True, False])
def test_a_method_that_is_far_off_is_a_cross_and_does_not_stretch_the_axis(diverged: bool) -> None:
    cells = metrics(td_cfm={"emd": 1e9, "emd_low": -1e9, "emd_high": 3e9, "diverged": diverged}, td2_cfm=cell(0.4))
    figure = curves.against_floor({"maze_loop": cells})
    axis = figure.axes[0]
    assert axis.get_xlim()[1] < 20
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] <= axis.get_xlim()[1] for line in crosses] == [True]
    plt.close(figure)


def test_horizon_curves_are_of_methods_with_two_gammas() -> None:
    cells = {
        0.9: metrics(td_cfm=cell(0.4, mse_v=1.0), td2_cfm=cell(0.3, mse_v=0.5), gan=cell(2.0, mse_v=3.0)),
        0.99: metrics(td_cfm={"diverged": True}, td2_cfm=cell(0.5, mse_v=0.7)),
    }
    figure = curves.horizons(cells, 5)
    legend = figure.axes[1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["TD-CFM", "TD²-CFM"]
    lines = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(lines[1].get_xydata(), [[50, 3], [500, 5]])
    values = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(values[1].get_xydata(), [[50, 0.5 / 10**2], [500, 0.7 / 100**2]])
    assert [len(line.get_xdata()) for line in figure.axes[1].lines if line.get_marker() == "x"] == [1, 0]
    plt.close(figure)


# ---- the page ----


def facts_of(**changes: Any) -> Facts:
    """Facts about a run of two stages."""
    stage = Record(
        stage="prepare@moons", invocation="7-1.50", workspace=".", pid=7, created=1.5, started=2.0, params={},
        status="FINISHED", ended=9.5,
    )  # fmt: skip
    last = replace(stage, stage="report", status="RUNNING", ended=None)
    known: dict[str, Any] = {
        "invocation": "7-1.50",
        "made": datetime(2026, 11, 27, 3, 5, tzinfo=UTC),
        "seconds": 3700.0,
        "commits": ("0123456789abcdef",),
        "dirty": False,
        "machine": "Some CPU, 2 cores",
        "software": "Python 3.11.7, torch 2.13.0",
        "tracker": facts.LOCAL_UI,
        "stages": (stage, last),
    }
    return Facts(**{**known, **changes})


def page(
    tmp_path: Path,
    environments: int = 1,
    text: str = "text",
    run: Facts | None = None,
    incomplete: Incomplete | None = None,
) -> str:
    made = report.Page(tmp_path, incomplete)
    made.overall = text
    made.tables = [
        {
            "id": "table-claims",
            "name": "claims",
            "csv": "YQ==",
            "title": "Claims",
            "columns": ["method", "verdict"],
            "words": [0, 1],
            "rows": [[text, verdict] for verdict in ("holds", "FAILS", "open", "diverged", "measured", "not run")],
            "notes": [text, "a note"],
        }
    ]
    made.environments = [report.Section(f"maze{i}", f"maze{i}", text, text) for i in range(environments)]
    made.others = [report.Section("other", text, text, figures=[{"png": "", "caption": text}])]
    return report.render(made, PARAMS, run or facts_of())


def test_texts_stay_texts(tmp_path: Path) -> None:
    html = page(tmp_path, text='<script>alert("x")</script>')
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 12  # every place that shows one


def test_many_environments_are_folded_and_a_link_leads_into_each(tmp_path: Path) -> None:
    few, many = page(tmp_path, 2), page(tmp_path, 15)
    assert few.count('<details class="part" open>') == 2
    assert many.count('<details class="part">') == 15 and 'class="part" open' not in many
    assert all(f'href="#maze{i}"' in many and f'<div id="maze{i}">' in many for i in range(15))
    assert 'href="#table-claims"' in many and 'id="table-claims"' in many


def test_long_notes_are_folded_and_short_ones_are_not(tmp_path: Path) -> None:
    assert '<details class="notes">' not in page(tmp_path)
    assert "<summary>Notes (2)</summary>" in page(tmp_path, text="long " * 100)


def test_verdicts_have_their_styles(tmp_path: Path) -> None:
    html = page(tmp_path)
    for word, style in (("holds", "holds"), ("FAILS", "fails"), ("open", "open"), ("measured", "measured")):
        assert f'<td class="word {style}">{word}</td>' in html
    assert '<td class="word ">not run</td>' in html


def test_tables_name_methods_as_people_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layout.TABLES.mkdir(parents=True)
    rows = '[["maze_loop", "td2_cfm"], ["maze_loop", "floor"]]'
    content = f'{{"title": "", "columns": ["environment", "method"], "words": [], "rows": {rows}, "notes": []}}'
    layout.table(layout.TABLES, "successor", "json").write_text(content)
    layout.table(layout.TABLES, "successor", "csv").write_text("environment,method\n")
    table = report._table(layout.TABLES, "successor")
    assert table["rows"] == [["maze_loop", "TD²-CFM"], ["maze_loop", "floor"]]
    assert base64.b64decode(table["csv"]) == b"environment,method\n"


def test_the_page_tells_when_by_which_code_and_where_it_was_made(tmp_path: Path) -> None:
    html = page(tmp_path)
    for told in (
        '<time datetime="2026-11-27T03:05:00+00:00">2026-11-27 03:05 UTC</time>',
        "2 stages in 1 h 1 min",
        "<code>0123456789</code>",
        "Some CPU, 2 cores",
        "Python 3.11.7, torch 2.13.0",
        '<a href="http://127.0.0.1:5000">http://127.0.0.1:5000</a> after <code>make ui</code>',
        "<code>tags.`flowmatch.invocation` = '7-1.50'</code>",
        '<td class="word">prepare@moons</td><td class="word">finished</td><td>8 s</td>',
        '<td class="word">report</td><td class="word">running</td><td>–</td>',
    ):
        assert told in html, told
    assert "uncommitted" not in html
    assert "uncommitted changes" in page(tmp_path, run=facts_of(dirty=True))
    assert "<dt>Commit</dt><dd>none " in page(tmp_path, run=facts_of(commits=()))


def test_a_link_to_a_server_has_no_secret(tmp_path: Path) -> None:
    address = facts.tracker("https://me:hunter2@mlflow.example:8443/runs?token=hunter2#hunter2")
    html = page(tmp_path, run=facts_of(tracker=address))
    assert '<a href="https://mlflow.example:8443/runs">' in html
    assert "hunter2" not in html and "make ui" not in html
    for uri in ("postgresql://me:hunter2@host/runs", "sqlite:///runs.db", "", "http://["):
        assert facts.tracker(uri) == facts.LOCAL_UI


def test_facts_are_those_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path))
    monkeypatch.setenv("FLOWMATCH_INVOCATION", "nightly")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record = RunRecord.start("prepare@moons", {})
    record.record.started -= 60
    record.record.commit, record.record.dirty = "abc", True
    record.finish("FAILED", "the disk is full")
    found = facts.gather("nightly")
    assert 60 <= found.seconds < 3600
    assert (found.commits, found.dirty, found.tracker) == (("abc",), True, facts.LOCAL_UI)
    assert [stage.stage for stage in found.stages] == ["prepare@moons"]
    assert facts.failures(found.stages) == {"prepare@moons": "the disk is full"}
    ends = [replace(record.record, stage=word, status=word, message=None) for word in ("FINISHED", "RUNNING", "KILLED")]
    assert facts.failures(ends) == {"KILLED": "KILLED"}
    assert facts.gather("another").stages == ()


def test_the_machine_is_named_with_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path))
    assert facts.gather("none").machine.endswith("GiB memory, NVIDIA H100, NVIDIA H100")
    driver.write_text("#!/bin/sh\necho no device was found\nexit 9\n")
    assert facts.gather("none").machine.endswith("GiB memory, no GPU")


class Loaded(HTMLParser):
    """What a browser would load for a page, or run in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "link", "iframe", "object") else []
        sources = {key: value or "" for key, value in attrs if key in ("src", "srcset")}
        self.found += [f"{key}={value}" for key, value in sources.items() if not value.startswith("data:")]


def test_the_page_needs_no_network_and_follows_the_readers_colours(tmp_path: Path) -> None:
    html = page(tmp_path)
    assert Loaded(html).found == []
    assert "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html and '<html lang="en">' in html
    assert '<a href="data:text/csv;charset=utf-8;base64,YQ==" download="claims.csv">' in html


def test_colours_have_the_contrast_of_wcag_aa() -> None:
    style = (report.TEMPLATES / "report.html.j2").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{([^}]*)\}", style))
    for colours in (light, dark):
        for ground in ("page", "panel"):
            for name in ("text", "muted", "link", "good", "bad", "open"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def contrast(one: str, other: str) -> float:
    """The ratio of luminances of WCAG 2."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_page_of_a_failed_run_begins_with_what_failed_and_what_is_missing(tmp_path: Path) -> None:
    lost = Incomplete({"train_density@moons-cfm": "the loss is <NaN>"}, ["data set moons"])
    html = page(tmp_path, incomplete=lost)
    begin = html.index('<div class="incomplete" role="alert">')
    assert begin < html.index('<p class="lead">')
    said = re.sub(r"<[^>]+>|\s+", " ", html[begin : html.index("</div>", begin)])
    assert "1 stage failed. Missing on this page: data set moons." in re.sub(r" +", " ", said)
    assert "<b>train_density@moons-cfm</b>: the loss is &lt;NaN&gt;" in html
    assert "(incomplete)" in html and "incomplete)" not in page(tmp_path)
    assert "did not finish" in page(tmp_path, incomplete=Incomplete({}, ["data set moons"]))


# ---- an environment's section ----


def section(folder: Path, monkeypatch: pytest.MonkeyPatch, columns: list[str]) -> list[str]:
    """The pictures of an environment whose only method has samples, particles and a map of the truth alone."""
    monkeypatch.chdir(folder)
    data, rows = Path("data"), pd.DataFrame({name: np.linspace(-1, 1, 20) for name in columns})
    states = {f"state_{name}": rows[name] for name in columns}
    described = {"state_names": columns, "bounds": [-1, -1, 1, 1], "walls": [], "source": "s", "fidelity": "f"}
    files.write_json(data / "transitions/spiral/provenance.json", described)
    files.write_table(data / "transitions/spiral/evaluation.parquet", pd.DataFrame({"step": 0, **states}))
    files.write_table(data / "evaluations/spiral/truth.parquet", rows.assign(start=0))
    files.write_table(data / "samples/spiral/td2_cfm.parquet", rows.assign(seed=0, start=0))
    files.write_table(data / "samples/spiral/td2_cfm.path.parquet", rows.assign(time=1.0, start=0))
    truth = pd.DataFrame({"x": [0.0, 1.0], "y": [0.0, 1.0], "method": "truth", "value": [1.0, 2.0]})
    files.write_table(data / "samples/spiral/value_map.parquet", truth)
    for method in PARAMS.successor.methods:
        (data / "logs/spiral").mkdir(parents=True, exist_ok=True)
        (data / f"logs/spiral/{method}.csv").write_text("step\n")
    page = report.Page(folder)
    report._environment(page, PARAMS, "spiral", metrics(td2_cfm=cell(0.4)))
    return sorted(file.stem for file in folder.glob("*.png"))


def test_a_map_of_the_truth_alone_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert section(tmp_path, monkeypatch, ["x", "y"]) == ["spiral-loss", "spiral-occupancy", "spiral-path"]


def test_a_state_of_one_dimension_has_no_plane_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert section(tmp_path, monkeypatch, ["x"]) == ["spiral-loss"]


# ---- the section of densities ----


def dataset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, columns: list[str], conditions: list[dict[str, Any]], **data: Any
) -> report.Section:
    """The section of a data set with two methods, of which one has particles; `data` are its columns."""
    monkeypatch.chdir(folder)
    table, methods = pd.DataFrame(data), ("cfm", "ot_cfm")
    files.write_table(layout.part(layout.prepared("mine"), "test"), table)
    seed, clock = ("seed_" if "seed" in data else "seed"), ("time_" if "time" in columns else "time")
    for method in methods:
        rows = pd.concat([table.assign(**{seed: s}) for s in (0, 1)])
        files.write_table(layout.sampled(layout.samples("mine"), method), rows)
        layout.curve("mine", method).parent.mkdir(parents=True, exist_ok=True)
        layout.curve("mine", method).write_text("step,loss,val_loss\n50,2,\n100,1.5,1.8\n200,1.4,1.7\n300,1.3,1.9\n")
    states = pd.concat([table[columns].assign(**{clock: t}) for t in (0.0, 1.0)])
    files.write_table(layout.trajectory(layout.samples("mine"), "cfm"), states)
    two = {name: choice for name, choice in PARAMS.density.methods.items() if name in methods}
    density = PARAMS.density.model_copy(update={"methods": two, "seeds": (0, 1)})
    provenance = {"kind": "table", "columns": columns, "conditions": conditions}
    section = report.Section("mine", "mine")
    cells = {"floor": {}, "cfm": {"chosen_step": 200.0}, "ot_cfm": {}}
    params_ = PARAMS.model_copy(update={"density": density, "datasets": {"mine": PARAMS.datasets["moons"]}})
    report._dataset(report.Page(folder), section, params_, provenance, cells)
    return section


RNG = np.random.default_rng(0)
WORDS = {"name": "kind", "kind": "words", "levels": ["a", "b"]}
AGE = {"name": "age", "kind": "number"}
GIVEN = {"kind": RNG.choice(["a", "b"], 40), "age": RNG.normal(size=40)}


@pytest.mark.parametrize(
    ("columns", "conditions", "pictures"),
    [
        (["x"], [], ["mine-columns", "mine-loss"]),
        (["x"], [WORDS], ["mine-columns", "mine-loss"]),
        (["x", "y"], [], ["mine-loss", "mine-path", "mine-samples"]),
        (["x", "y"], [AGE], ["mine-loss", "mine-path", "mine-samples"]),
        (["seed", "time"], [WORDS, AGE], ["mine-loss", "mine-path", "mine-samples"]),
        (["x", "time", "a column with a rather long name"], [], ["mine-columns", "mine-loss", "mine-pairs"]),
        ([f"c{i}" for i in range(14)], [WORDS], ["mine-columns", "mine-loss", "mine-pairs"]),
    ],
)
def test_a_table_of_any_width_with_any_names_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: list[str], conditions: list[Any], pictures: list[str]
) -> None:
    data = {name: RNG.normal(size=40) for name in columns}
    given = {one["name"]: GIVEN[one["name"]] for one in conditions}
    section = dataset(tmp_path, monkeypatch, columns, conditions, **data, **given)
    assert sorted(file.stem for file in tmp_path.glob("*.png")) == pictures
    captions = " ".join(figure["caption"] for figure in section.figures)
    assert all(one["name"] in captions for one in conditions[:1])
    assert ("first 12 of 14" in captions) == (len(columns) == 14)


def test_groups_of_a_condition_are_its_words_or_thirds_of_the_rows() -> None:
    test = pd.DataFrame({"kind": [*"aaabbc"], "age": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "ones": 1.0})
    found = density_figures.groups(WORDS, test)(pd.DataFrame({"kind": ["b", "z"]}))
    assert list(found) == ["kind = b", np.nan]
    assert list(found.cat.categories) == ["kind = a", "kind = b", "kind = c"]
    thirds = density_figures.groups(AGE, test)(test)
    assert thirds.value_counts(sort=False).tolist() == [2, 2, 2] and thirds.is_monotonic_increasing is not None
    assert list(thirds.cat.categories) == ["age < 1.667", "age 1.667 to 3.333", "age ≥ 3.333"]
    assert set(density_figures.groups({"name": "ones", "kind": "number"}, test)(test)) == {"ones"}


def test_histograms_show_shares_and_pairs_the_right_columns() -> None:
    data = pd.DataFrame({"x": [0.0, 1.0], "y": [0.0, 2.0], "z": [0.0, 3.0]})
    figure = density_figures.histograms({"x": {"data": data["x"], "cfm": pd.Series([0.0, 0.0, 0.0, 9.0])}})
    heights = [patch.get_data().values.sum() for patch in figure.axes[0].patches]
    assert heights == pytest.approx([1.0, 0.75])  # a quarter of the samples is beyond the panel
    plt.close(figure)
    figure = density_figures.pairs({"data": data, "cfm": 2 * data}, ["x", "y", "z"])
    drawn = [axis.collections[0].get_offsets().tolist() for axis in figure.axes]
    assert drawn == [
        [[0, 0], [a, b]]
        for scale in (1, 2)
        for a, b in ((scale, 2 * scale), (scale, 3 * scale), (2 * scale, 3 * scale))
    ]
    plt.close(figure)


def test_a_loss_curve_has_its_validation_loss_and_the_step_that_was_kept() -> None:
    table = pd.DataFrame(
        {"step": [50, 100, 150, 200], "loss": [3.0, 2.0, 1.5, 1.0], "val_loss": [np.nan, 2.0, np.nan, 1.8]}
    )
    closed = table.iloc[:1].assign(val_loss=1.0)  # a closed form has no curve
    figure = curves.losses(
        {"cfm": table, "gaussian": closed}, {"loss": "loss", "val_loss": "validation loss"}, {"cfm": 100.0}
    )
    lines = [axis.lines for axis in figure.axes]
    assert [[len(line.get_xdata()) for line in panel] for panel in lines] == [[4, 1], [2, 1]]
    assert [panel[1].get_xdata()[0] for panel in lines] == [100.0, 100.0]
    assert lines[1][1].get_ydata()[0] == 2.0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CFM"]
    plt.close(figure)


def test_a_data_set_is_told_in_one_sentence_and_folds_when_there_are_many(tmp_path: Path) -> None:
    cells: dict[str, Any] = {name: {"nll": 2.0} for name in PARAMS.density.methods}
    cells |= {"ot_cfm": {"nll": 1.5}, "floor": {"nll": 1.25}, "one Gaussian": {"nll": 3.0}}
    said = report._best(list(PARAMS.density.methods), cells)
    assert said == "OT-CFM has the lowest test NLL, 1.5 nats (the exact density 1.25, one Gaussian 3)."
    nothing = {name: {"nll": None} for name in ("floor", *PARAMS.density.methods)}
    assert report._best(list(PARAMS.density.methods), nothing) == "No method has a likelihood."
    made = report.Page(tmp_path)
    made.others = [report.Section("densities", "Densities", parts=[report.Section("mine", "mine", notes=["<b>note"])])]
    html = report.render(made, PARAMS, facts_of())
    assert '<details class="part" open>' in html and '<div id="mine">' in html and "<li>&lt;b&gt;note</li>" in html
    made.others[0].parts *= 5
    assert 'class="part" open' not in report.render(made, PARAMS, facts_of())


def test_no_entry_has_the_name_of_a_part_of_the_page() -> None:
    template = (report.TEMPLATES / "report.html.j2").read_text(encoding="utf-8")
    code = Path(report.__file__).read_text(encoding="utf-8")
    fixed = {*re.findall(r'id="([a-z_]+)"', template), *re.findall(r'Section\("(\w+)"', code)}
    assert len(fixed) >= 5
    assert fixed <= params.PAGE_PARTS
