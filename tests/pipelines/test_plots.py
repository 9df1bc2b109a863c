"""DVC's plots are drawn without a network."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipelines.base.errors import UserError
from pipelines.orchestration.commands import _workspace, plots
from tests.pipelines.conftest import write

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DVC's template, which takes seconds to make."""
    return plots.template(tmp_path_factory.mktemp("root"))


@pytest.fixture
def drawn(project: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one plot, after the command."""
    write(project, ".dvc/tmp/plots.html", template.read_text(encoding="utf-8"))
    write(project, "dvc.yaml", "plots:\n  - data/logs/moons/cfm.csv: {x: step, y: loss}\n")
    write(project, "data/logs/moons/cfm.csv", "step,loss\n0,3\n1,2\n2,1\n")
    monkeypatch.setattr(_workspace, "held", lambda options: nullcontext(project))
    assert plots.run(argparse.Namespace(profile="default")) == 0
    return project


def test_the_page_holds_what_draws_it(drawn: Path) -> None:
    page = (drawn / "dvc_plots" / "index.html").read_text(encoding="utf-8")
    assert "vegaEmbed(" in page and "data/logs/moons/cfm.csv" in page
    assert len(page) > 500_000  # Vega itself
    without_code = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", without_code) == []


def test_dvc_itself_needs_no_network_any_more(drawn: Path) -> None:
    command = [sys.executable, "-m", "dvc", "plots", "show", "--out", "shown"]
    subprocess.run(command, cwd=drawn, check=True, capture_output=True)
    page = (drawn / "shown" / "index.html").read_text(encoding="utf-8")
    assert "window.vegaEmbed=" in page and "<script src=" not in page


def test_nothing_to_draw_is_one_sentence(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workspace, "held", lambda options: nullcontext(project))
    with pytest.raises(UserError, match="profile smoke has no loss curve to draw; train models by `make repro` first"):
        plots.run(argparse.Namespace(profile="smoke"))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_without_network_draws_the_curve(drawn: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'browser'}"]
    page = (drawn / "dvc_plots" / "index.html").as_uri()
    command = [BROWSER, *flags, "--virtual-time-budget=8000", "--dump-dom", page]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "mark-line" in re.sub(r"<script.*?</script>", "", shown, flags=re.DOTALL)
