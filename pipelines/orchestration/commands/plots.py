"""Draw DVC's plots as a page that needs no network.

DVC's own page loads Vega from a content delivery network, so that it is blank without one. This command writes a
template that contains Vega, and names it in `.dvc/config.local`, so that `dvc plots show` and `dvc plots diff` use it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from pipelines.base import files
from pipelines.orchestration import runner
from pipelines.orchestration.commands import _workspace

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{{refresh_tag}}
<title>DVC plots</title>
<style>body {{ font-family: system-ui, sans-serif; }} table {{ border-spacing: 15px; }}</style>
<script>{vega}</script>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)
    parser.add_argument("targets", nargs="*", help="files of plots (default: all in dvc.yaml)")


def run(options: argparse.Namespace) -> int:
    """Write the page and print its address."""
    here = _workspace.prepare(options)
    root = Path.cwd()
    file = template(root)
    dvc = [sys.executable, "-m", "dvc"]
    env = runner.environment("")
    subprocess.run([*dvc, "config", "--local", "plots.html_template", str(file)], cwd=root, env=env, check=True)
    return subprocess.run(
        [*dvc, "plots", "show", "--html-template", str(file), *options.targets], cwd=here, env=env, check=False
    ).returncode


def template(root: Path) -> Path:
    """Return DVC's template of a page with Vega, Vega-Lite and Vega-Embed, and write it if it is not there."""
    file = root / ".dvc" / "tmp" / "plots.html"
    if not file.exists():
        from vl_convert import javascript_bundle

        with files.replacing(file) as temporary:
            temporary.write_text(
                _PAGE.format(vega=javascript_bundle("window.vegaEmbed = vegaEmbed;")), encoding="utf-8"
            )
    return file
