"""`make` in a folder whose name has spaces and letters of any script."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
# Notes how it is called, and makes an environment that has itself as the interpreter.
printf '%s|' "$@" >> "$CALLS"; echo >> "$CALLS"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("name", ["my project", "größe 日本"])
def test_setup_and_what_follows_it_work_in_any_folder(tmp_path: Path, name: str) -> None:
    project, calls = tmp_path / name, tmp_path / "calls"
    project.mkdir()
    for file in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / file, project)
    python = project / "python of mine"
    python.write_text(PYTHON)
    python.chmod(0o755)
    seen = tmp_path / "a link"
    seen.symlink_to(project)

    def make(*arguments: str, cwd: Path = project) -> list[str]:
        calls.write_text("")
        env = {**os.environ, "CALLS": str(calls)}
        env = {key: value for key, value in env.items() if key not in ("MAKEFLAGS", "VENV", "PROFILE", "PORT", "ARGS")}
        done = subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.rstrip("|") for line in calls.read_text().splitlines()]

    check, venv, install = make("setup", "PYTHON='./python of mine'")
    assert check.startswith("-c|import sys") and venv == "-m|venv|.venv"
    assert install.startswith("-m|pip|install|") and "|--editable|.[" in install
    assert (project / ".venv" / ".installed").exists()
    assert make("setup") == []  # made once
    assert make("ui", "PORT=5055") == ["-m|pipelines.orchestration|ui|--port|5055"]
    status = ["-m|pipelines.orchestration|status|--profile|smoke"]
    assert make("status", "PROFILE=smoke") == status
    assert make("status", "PROFILE=smoke", cwd=seen) == status
