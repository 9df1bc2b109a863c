"""What the project says about working on it is true: workflows, hooks, make targets, changelog, citation."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
import yaml

import flowmatch_core

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
HOOKS = [
    hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]
]
TEXTS = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", ".github/pull_request_template.md")


def make(*arguments: str) -> str:
    """The standard output of make, which finds no settings of an outer make."""
    environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "VENV"}}
    result = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return result.stdout


def refusal(file: Path, schema: str) -> str:
    """What the schema that check-jsonschema ships says against a file: nothing, if it is valid."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    result = subprocess.run(
        [*command, "--force-filetype", "yaml", str(file)], capture_output=True, text=True, check=False
    )
    return "" if result.returncode == 0 else result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        *((path, "github-workflows") for path in WORKFLOWS),
        *((path, "github-issue-forms") for path in FORMS),
        (ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml", "github-issue-config"),
        (ROOT / "CITATION.cff", "citation-file-format"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_files_for_the_hosting_site_are_valid(file: Path, schema: str, tmp_path: Path) -> None:
    assert refusal(file, schema) == ""
    broken = tmp_path / file.name
    broken.write_text(f"{file.read_text()}\nunknown_key: 1\n")
    assert "unknown_key" in refusal(broken, schema)


def steps() -> Iterator[dict[str, object]]:
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            yield from job["steps"]


def test_workflows_may_read_and_no_more_and_pin_what_they_use() -> None:
    assert WORKFLOWS
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert not [name for name, job in workflow["jobs"].items() if "permissions" in job]
        assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    used = [str(step["uses"]) for step in steps() if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in used)


def test_tests_run_on_every_version_of_python_that_the_metadata_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {match[1] for line in project["classifiers"] if (match := re.search(r"Python :: (3\.\d+)$", line))}
    jobs = [job for path in WORKFLOWS for job in yaml.safe_load(path.read_text())["jobs"].values()]
    tested = [job["strategy"]["matrix"]["python"] for job in jobs if "strategy" in job]
    assert [set(versions) for versions in tested] == [named]
    assert project["requires-python"] == f">={min(named, key=lambda version: int(version[2:]))}"


def test_ci_runs_lint_and_tests() -> None:
    assert "make lint test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make lint", "make test", "make docs PYTHON=python"} <= {str(step.get("run")) for step in steps()}
    assert re.search(r'ruff" check .* && \S*ruff" format --check .* && \S*mypy"', make("--dry-run", "lint"))


def test_make_alone_lists_every_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    lines = make().splitlines()
    assert [line.split()[1] for line in lines] == re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)
    assert {line.split()[1] for line in lines} == set(phony.split())
    assert len({len(line) - len(line[2:].split(maxsplit=2)[2]) for line in lines}) == 1, "columns are not aligned"


def test_make_docs_installs_its_extra_first_and_once(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    missing = make("--dry-run", "docs", f"VENV={tmp_path}")
    assert re.search(r"pip install [^\n]*'\.\[docs\]'.*mkdocs build --strict", missing, re.DOTALL)
    assert re.search(
        r"pip install [^\n]*'\.\[docs\]'.* -m pytest", make("--dry-run", "test", f"VENV={tmp_path}"), re.DOTALL
    )
    (tmp_path / ".docs-installed").touch()
    assert "pip install" not in make("--dry-run", "docs", f"VENV={tmp_path}")


@pytest.mark.parametrize("text", TEXTS)
def test_make_targets_and_files_that_texts_name_exist(text: str) -> None:
    content = (ROOT / text).read_text()
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = {word for line in re.findall(r"(?:`|^)make ([a-z -]+)", content, re.MULTILINE) for word in line.split()}
    assert named <= targets
    for path in re.findall(r"`((?:docs|tests|pipelines|flowmatch_core)/[\w./-]*)`", content):
        assert (ROOT / path).exists(), path


def test_the_table_of_rooms_names_the_folders_of_the_pipeline() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| room of `pipelines/` |")[2].partition("\n\n")[0]
    rooms = {path.name for path in (ROOT / "pipelines").iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == rooms


def test_hooks_need_no_network_and_are_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("pre-commit-hooks") for line in extras["lint"])
    for hook in HOOKS:
        folder, _, command = hook["entry"].split()[0].rpartition("/")
        assert (hook["language"], folder) == ("system", ".venv/bin"), hook["id"]
        assert (Path(sys.executable).parent / command).exists(), command
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config"], cwd=ROOT, check=True)


def test_version_changelog_and_citation_agree() -> None:
    released = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert released[0] == flowmatch_core.__version__
    assert released == sorted(released, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == flowmatch_core.__version__


@pytest.mark.parametrize("package", ["flowmatch_core", "pipelines"])
def test_the_changelog_names_where_modules_are_now(package: str) -> None:
    _, found, rest = (ROOT / "CHANGELOG.md").read_text().partition(f"0.2: `{package}.…` |\n| --- | --- |\n")
    assert found
    for row in rest.partition("\n\n")[0].splitlines():
        old, *new = re.findall(r"`([\w./]+)`", row)
        assert new, row
        assert all(exists(package, name) for name in new), row
        assert not (ROOT / package / old.replace(".", "/")).with_suffix(".py").exists(), f"{old} is still a file"


def exists(package: str, name: str) -> bool:
    """Whether a package has a module or a folder of that name."""
    path = ROOT / package / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def test_every_public_method_has_a_docstring_of_its_own_or_of_its_base() -> None:
    """Ruff's D102 asks for one in every override."""
    modules = [info.name for info in walk_packages(flowmatch_core.__path__, "flowmatch_core.") if "._" not in info.name]
    bare = []
    for module in map(import_module, modules):
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_"):
                public = (name for name in vars(cls) if not name.startswith("_"))
                members = ((name, inspect.getattr_static(cls, name)) for name in public)
                code = [name for name, value in members if inspect.isroutine(value) or isinstance(value, property)]
                bare += [f"{module.__name__}.{cls.__name__}.{name}" for name in code if not documented(cls, name)]
    assert bare == []


def documented(cls: type, name: str) -> bool:
    return any(getattr(vars(base)[name], "__doc__", None) for base in cls.__mro__ if name in vars(base))


def without_encoding(source: str) -> list[str]:
    """The calls that open text in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {word.arg for word in node.keywords}
            strings = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            binary = any(re.fullmatch(r"[rwax]\+?b\+?", string) for string in strings)
            module = ast.unparse(node.func).partition(".")[0]
            bytes_only = {"os", "Image", "PIL", "tarfile", "zipped"}  # `open` of these returns no text
            opens = name in {"read_text", "write_text", "open", "fdopen"} and not binary and module not in bytes_only
            if (opens or given & {"text", "universal_newlines"}) and "encoding" not in given:
                found.append(ast.unparse(node))
    return found


def test_every_text_is_utf_8_whatever_the_locale() -> None:
    assert without_encoding("p.open()\np.open('rb')\nopen(p, 'w')\nrun(c, text=True)\np.read_text('utf-8')") == [
        *("p.open()", "open(p, 'w')", "run(c, text=True)", "p.read_text('utf-8')")
    ]
    assert without_encoding("p.read_text(encoding='utf-8')\nrun(c)\nos.open(p, 1)") == []
    folders = ("flowmatch_core", "pipelines", "benchmarks", "peers", "docs", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    bad = {path.name: calls for path in sources if (calls := without_encoding(path.read_text(encoding="utf-8")))}
    assert bad == {}


def test_make_runs_in_a_folder_with_a_space_in_its_path(tmp_path: Path) -> None:
    root = tmp_path / "a project"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, root)
    python = root / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$0 $*"\n')
    python.chmod(0o755)
    (root / ".venv" / ".installed").touch()
    environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "VENV"}}
    result = subprocess.run(["make", "repro"], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == f"{python} -m pipelines.orchestration repro --profile default\n", result
