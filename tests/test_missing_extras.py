"""Without an extra the pipeline says in one sentence how to install it, and the library works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.test_packaging import DOMAINS, GYMNASIUM, PIPELINE, ROOT

# Python imports this module when it starts: the finders of modules then know nothing of the hidden ones.
SITECUSTOMIZE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in {hidden} else self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def python(*arguments: str, without: Collection[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in the project's folder as if some packages were not installed."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(hidden=set(without)))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "command",
    ["pipelines.orchestration status", "pipelines.stages.prepare --dataset moons", "pipelines.reporting.readme"],
)
def test_a_command_of_the_pipeline_ends_in_one_sentence(command: str, tmp_path: Path) -> None:
    result = python("-m", *command.split(), without=PIPELINE | GYMNASIUM, tmp_path=tmp_path)
    (sentence,) = result.stderr.splitlines()
    assert sentence.endswith("run `pip install -e '.[pipeline]'` in the project's folder.")
    assert (result.returncode, result.stdout) == (1, "")


@pytest.mark.parametrize("module", sorted(PIPELINE))
def test_an_import_names_the_missing_module(module: str, tmp_path: Path) -> None:
    result = python("-c", "import pipelines.config.params", without={module}, tmp_path=tmp_path)
    *_, error = result.stderr.splitlines()
    assert error.startswith("ModuleNotFoundError: ")
    assert f"({module})" in error
    assert "pip install -e '.[pipeline]'" in error


def test_the_library_works_without_the_extras(tmp_path: Path) -> None:
    code = "import flowmatch_core as fm; print(*(getattr(fm, name) for name in fm.__all__))"
    result = python("-c", code, without=PIPELINE | GYMNASIUM, tmp_path=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        *(
            (f"from pipelines.environments.{kind} import *; build(Settings())", "dm_control", "dmc")
            for kind in ("cheetah", "walker", "quadruped")
        ),
        ("from pipelines.policies.train import recipe; recipe('walker_walk')", "stable-baselines3", "policies"),
    ],
)
def test_a_domain_and_its_training_name_their_extra(code: str, package: str, extra: str, tmp_path: Path) -> None:
    result = python("-c", code, without=DOMAINS, tmp_path=tmp_path)
    *_, error = result.stderr.splitlines()
    assert error.startswith("pipelines.base.errors.UserError: ")
    assert f"the package {package}, which is not installed; run `pip install -e '.[{extra}]'`." in error


def test_the_pipeline_does_not_ask_for_gymnasium(tmp_path: Path) -> None:
    result = python("-m", "pipelines.orchestration", "--help", without=GYMNASIUM, tmp_path=tmp_path)
    assert result.returncode == 0, result.stderr
