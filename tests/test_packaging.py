"""What is installed: the distributions of the library, what they ask for, and what importing it costs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import flowmatch_core

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SIX = {"torch", "torchdiffeq", "numpy", "scipy", "pot", "zuko"}
FOLDERS = ("flowmatch_core", "pipelines", "tests", "benchmarks", "peers", "docs", "examples")
IMPORTED_AS = {
    "griffelib": "griffe",
    "pillow": "PIL",
    "pot": "ot",
    "psycopg2-binary": "psycopg2",
    "pyyaml": "yaml",
    "ruamel-yaml": "ruamel",
    "scikit-learn": "sklearn",
    "vl-convert-python": "vl_convert",
}
NOT_IMPORTED = {"fastapi"}  # a bound for what prefect brings


def distributions(requirements: list[str]) -> set[str]:
    """The normalised names of requirements, without versions and extras."""
    names = {match[0] for line in requirements if (match := re.match(r"[A-Za-z0-9._-]+", line))}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def importable(requirements: list[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in distributions(requirements)}


CORE = importable(PROJECT["dependencies"])
PIPELINE = importable(EXTRAS["pipeline"]) - NOT_IMPORTED
GYMNASIUM = importable(EXTRAS["gymnasium"])
DOMAINS = {name for extra in ("dmc", "policies") for name in importable(EXTRAS[extra])}
SCALE = {name for extra in ("dask", "ray", "postgres", "s3", "minari") for name in importable(EXTRAS[extra])} - PIPELINE


def imports(path: Path) -> Iterator[str]:
    """Top-level names of everything a file imports: at its top, in a function, or by a literal name."""
    by_name = {"import_module"}
    if path.is_relative_to(ROOT / "flowmatch_core"):
        by_name.add("required")  # flowmatch_core._require; its tests give it names of nothing
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(module)), *_]
            ) if called in by_name:
                yield module.partition(".")[0]


def third_party(*files: Path) -> set[str]:
    """What files import beside the standard library and the project."""
    return {name for file in files for name in imports(file)} - sys.stdlib_module_names - set(FOLDERS)


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command that succeeds."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it, as an index would have them."""
    dist, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():  # a build writes beside its sources, so it has a copy, with all that might slip in
        if path.is_file() and path.suffix in {".cff", ".in", ".lock", ".md", ".toml", ".yaml", ""}:
            shutil.copy(path, source)
    for folder in FOLDERS:
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, dist, cwd=source)
    (archive,) = dist.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", dist, archive, cwd=source)
    return dist


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed without its dependencies: those are the environment's."""
    site = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=site)
    return site


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    library = {name for name in names if name.startswith("flowmatch_core/")}
    metadata = f"flowmatch-{flowmatch_core.__version__}.dist-info/"
    assert all(name.startswith(metadata) for name in names - library)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flowmatch_core").rglob("*.py")}
    assert library == sources | {"flowmatch_core/py.typed"}


def test_the_source_distribution_holds_what_the_wheel_needs_and_says_what_changed(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()} - {""}
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "pyproject.toml",
        "flowmatch_core/py.typed",
    } <= names
    assert not [name for name in names if re.match("(pipelines|tests|benchmarks|peers|docs|examples|data)(/|$)", name)]


def test_the_metadata_asks_for_the_six_and_has_one_version(wheel: Path) -> None:
    with ZipFile(wheel) as opened:
        metadata = Parser().parsestr(opened.read(f"flowmatch-{flowmatch_core.__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == flowmatch_core.__version__
    assert metadata["License-Expression"] == "MIT"
    asked = metadata.get_all("Requires-Dist", [])
    assert distributions([line for line in asked if "extra ==" not in line]) == SIX
    assert {"pipeline", "gymnasium", "docs", "test", "lint"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_installed_library_runs_the_first_example_of_the_readme(site: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    example = next(block for block in blocks if "cfm_loss" in block)
    where = "\nimport flowmatch_core\nprint(flowmatch_core.__file__)\n"
    *printed, file = run(sys.executable, "-c", example + where, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert Path(file) == site / "flowmatch_core" / "__init__.py"
    assert re.search(r"\d\.\d", "\n".join(printed))


def test_the_library_loads_no_package_of_the_pipeline(site: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys, flowmatch_core as fm\n"
        "for name in fm.__all__: getattr(fm, name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    loaded = set(json.loads(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))))
    assert {"flowmatch_core", "torch"} <= loaded
    assert not loaded & (PIPELINE | NOT_IMPORTED | GYMNASIUM | {"pipelines"})


def test_the_library_imports_its_six_dependencies() -> None:
    assert distributions(PROJECT["dependencies"]) == SIX
    assert third_party(*python_files("flowmatch_core")) == CORE


def test_the_pipeline_imports_its_extra() -> None:
    assert third_party(*python_files("pipelines")) - CORE - SCALE - DOMAINS == PIPELINE | GYMNASIUM


def test_tests_import_what_the_extras_declare() -> None:
    declared = CORE | PIPELINE | GYMNASIUM | SCALE | DOMAINS | importable(EXTRAS["test"] + EXTRAS["test-slow"])
    assert third_party(*python_files("tests")) <= declared


def test_examples_import_the_library_and_their_extra() -> None:
    """One that shows the pipeline needs the pipeline's extra, too."""
    scripts = python_files("examples")
    for script in scripts:
        allowed = CORE | importable(EXTRAS["examples"]) | {other.stem for other in scripts}
        assert third_party(script) <= (allowed | PIPELINE if "pipelines" in set(imports(script)) else allowed), script


def test_the_site_is_built_with_its_extra() -> None:
    assert third_party(*python_files("docs")) <= CORE | importable(EXTRAS["docs"])


@pytest.mark.parametrize("folders", [("benchmarks",), ("peers", "benchmarks")], ids=lambda folders: folders[0])
def test_comparisons_import_what_their_requirements_name(folders: tuple[str, ...]) -> None:
    files = [file for folder in folders for file in sorted((ROOT / folder).glob("requirements*.txt"))]
    lines = [line for file in files for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert third_party(*python_files(folders[0])) <= importable(lines)


def test_the_lock_pins_every_declared_distribution_and_names_no_place() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[^\s/@:]+( ; [^/:]+)?", line)]
    declared = PROJECT["dependencies"] + [line for extra in EXTRAS.values() for line in extra]
    assert distributions(declared) <= distributions(lines)


def test_make_installs_what_each_extra_declares() -> None:
    named = re.findall(r"--editable '\.\[([a-z0-9,-]+)\]'", (ROOT / "Makefile").read_text())
    installed = {name for extras in named for extra in extras.split(",") for name in distributions(EXTRAS[extra])}
    assert {name for extra in EXTRAS.values() for name in distributions(extra)} == installed
