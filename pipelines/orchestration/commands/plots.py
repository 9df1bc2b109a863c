"""Draw DVC's plots as a page that needs no network.

DVC's own page loads Vega from a content delivery network, so that it is blank without one. This command writes a
template that contains Vega, and names it in `.dvc/config.local`, so that `dvc plots show` and `dvc plots diff` use it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.base import files, layout
from pipelines.base.errors import UserError
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


def run(options: argparse.Namespace) -> int:
    """Write the page and print its address.

    Raises:
        UserError: There is no curve to draw.
    """
    with _workspace.held(options) as here:
        if not any((here / layout.LOGS).glob("*/*.csv")):
            raise UserError(f"profile {options.profile} has no loss curve to draw; train models by `make repro` first.")
        root = Path.cwd()
        file = str(template(root))
        settings = ["config", "--local", "plots.html_template", file]
        page = ["plots", "show", "--html-template", file]
        return _dvc(settings, root) or _dvc(page, here)


def _dvc(arguments: Sequence[str], folder: Path) -> int:
    """Run DVC, which says itself what is wrong, and return the exit status."""
    command = [sys.executable, "-m", "dvc", *arguments]
    return int(subprocess.run(command, cwd=folder, env=runner.environment(""), check=False).returncode != 0)


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
