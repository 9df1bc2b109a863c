"""The documentation is true: its code runs and prints what the pages show, and what it names exists."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))

_FENCE = re.compile(
    r"^```(?P<language>python|text)\n(?P<code>.*?)^```|^<!-- within (?P<tolerance>[\d.]+)(?P<percent> %)? -->$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
_MARK = "=== end of block ==="


def blocks(page: str) -> list[tuple[str, str | None, float, float]]:
    """Every Python block of a page with the output shown below it, None without one, and its tolerances.

    Returns:
        For every block its code, the output, the absolute and the relative tolerance.
    """
    found: list[tuple[str, str | None, float, float]] = []
    absolute, relative, end = 0.0, 0.0, -1
    for match in _FENCE.finditer(page):
        below = end >= 0 and not page[end : match.start()].strip()  # directly below a Python block
        if match["tolerance"]:
            assert below, f"{match[0]} does not stand below a Python block"
            value = float(match["tolerance"])
            absolute, relative = (0.0, value / 100) if match["percent"] else (value, 0.0)
            end = match.end()
        elif match["language"] == "python":
            found.append((match["code"], None, 0.0, 0.0))
            absolute, relative, end = 0.0, 0.0, match.end()
        elif below:
            found[-1] = (found[-1][0], match["code"], absolute, relative)
            end = -1
    return found


def run_page(page: str) -> list[str]:
    """Run the Python blocks of a page in order in one process with one thread; what each of them prints."""
    code = f"\nprint({_MARK!r})\n".join(block for block, *_ in blocks(page))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split(f"{_MARK}\n")


def expect_same(shown: str, printed: str, absolute: float, relative: float) -> None:
    """The words are equal and the numbers close; an exact comparison where no tolerance is stated."""
    assert _NUMBER.sub("#", shown).split() == _NUMBER.sub("#", printed).split(), printed
    theirs, ours = ([float(n) for n in _NUMBER.findall(text)] for text in (shown, printed))
    # the tolerance of a page is for what a trained network makes of it; 1e-9 for what is written in other digits
    assert ours == pytest.approx(theirs, abs=absolute or 1e-9, rel=relative or 1e-9), printed


RUN = [*TUTORIALS, DOCS / "how-to" / "loss.md", DOCS / "how-to" / "network.md"]
LONG = ("choices",)  # half a minute
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path.stem in LONG else [], id=path.stem)
        for path in RUN
        if blocks(path.read_text())
    ],
)
def test_a_page_prints_what_it_shows(path: Path) -> None:
    page = path.read_text()
    printed = run_page(page)
    shown = blocks(page)
    assert any(output for _, output, _, _ in shown)
    for (_, output, absolute, relative), text in zip(shown, printed, strict=True):
        if output is None:
            assert text.strip() == "", f"{path.name} prints something that it does not show: {text}"
        else:
            expect_same(output, text, absolute, relative)


def test_the_decision_table_has_the_numbers_of_its_page() -> None:
    page = (DOCS / "tutorials" / "choices.md").read_text()
    printed = {number for _, output, _, _ in blocks(page) if output for number in _NUMBER.findall(output)}
    rows = re.findall(r"^\|(?! you want| ---)(.+)\|$", page.partition("## Decision table")[2], re.MULTILINE)
    measured = [row.rsplit("|", 1)[1].replace("with 2 steps", "") for row in rows]
    assert len(rows) >= 6
    for cell in measured:
        numbers = re.findall(r"\d+\.\d+", cell)
        assert numbers, cell
        assert set(numbers) <= printed, cell


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_python_that_is_not_run_is_python(path: Path) -> None:
    for code, *_ in blocks(path.read_text()):
        compile(code, path.name, "exec")


def test_the_own_environment_is_one() -> None:
    page = (DOCS / "how-to" / "environment.md").read_text()
    source = next(code for code, *_ in blocks(page) if "def build" in code)
    entry = next(
        entry["environments"]["drift"] for entry in yaml_blocks(page) if "drift" in entry.get("environments", {})
    )
    namespace: dict[str, Any] = {"__name__": "drift"}
    exec(compile(source, "drift.py", "exec"), namespace)
    environment = namespace["build"](namespace["Settings"]())
    rows = environment.transitions(range(40), entry["length"], np.random.default_rng(0))
    assert rows.state.shape == rows.next_state.shape == (40, 2)
    assert np.isfinite(rows.next_state).all()
    assert entry["reward"] in environment.rewards(rows.state)


def yaml_blocks(page: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in re.findall(r"^ *```yaml\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)]


# ---- what pages name ----


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[str]:
    """The lines of a page's shell blocks and the commands in its code spans."""
    fenced = re.findall(r"^ *```bash\n(.*?)^ *```", path.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in fenced for line in block.splitlines()]
    spans = re.findall(r"`((?:make|dvc|python|pip|prefect|\.venv/bin/\w+) [^`]+)`", prose(path))
    return [" ".join(line.split()) for line in (*lines, *spans) if line]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]+)?\)", prose(path)):
        file = path if not target else path.parent / target
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor[1:] in anchors(file), f"{target}{anchor}"


def anchors(path: Path) -> set[str]:
    from markdown.extensions.toc import slugify

    return {slugify(title, "-") for title in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path: Path) -> None:
    from dvc.cli.parser import get_main_parser

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    dvc = get_main_parser()
    for command in commands(path):
        program, *words = shlex.split(command.removeprefix(".venv/bin/"))
        match program:
            case "make":
                targets = [word for word in words if "=" not in word]
                for target in targets:
                    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), command
                for profile in re.findall(r"PROFILE=([\w-]+)$", command):
                    assert profile in profiles() | own_names(path), command
            case "dvc":
                dvc.parse_args(words)  # raises where there is no such command or flag
                settings = [words[i + 1] for i, word in enumerate(words) if word in ("-S", "--set-param")]
                for setting in settings:
                    if not setting.startswith("+"):
                        assert_key(params, setting.partition("=")[0], command)
                for stage in re.findall(r"\b([a-z_]+)@", command):
                    assert stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"], command
            case "python":
                assert_python(words, command, path)
            case "torchrun":
                from torch.distributed.run import get_args_parser

                given = get_args_parser().parse_args(words)
                assert given.module and importlib.util.find_spec(given.training_script) is not None, command
            case "pip":
                assert words[0] == "install", command
            case _:
                assert program in {"source", "export", "prefect", "mlflow", "git", "cd", "pre-commit", "uv"}, command


def profiles() -> set[str]:
    folders = [ROOT / "pipelines" / "config" / "profiles", ROOT / "pipelines" / "profiles"]
    return {"default"} | {file.stem for folder in folders for file in folder.glob("*.yaml")}


def own_names(path: Path) -> set[str]:
    """The profiles that a page tells its reader to write."""
    return set(re.findall(r"^profile: (\w+)$", path.read_text(), re.MULTILINE))


def assert_python(words: list[str], command: str, path: Path) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).exists(), command
        return
    assert importlib.util.find_spec(words[1]) is not None, command
    if words[1] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), command
    if words[1] in ("pipelines", "pipelines.orchestration") and words[2] != "--help" and words[3:] != ["--help"]:
        from pipelines.orchestration.__main__ import parser

        options = parser().parse_args(words[2:])
        assert options.profile in profiles() | own_names(path), command


def assert_key(tree: dict[str, Any], key: str, where: str) -> None:
    for part in key.split("."):
        assert isinstance(tree, dict), f"{where}: {key}"
        assert part in tree, f"{where}: {key}"
        tree = tree[part]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_of_params_exist(path: Path) -> None:
    if path.name == "lecture-notes.md":
        pytest.skip("its names are those of modules, see tests/core/laws/test_docs_seeds.py")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    sections = "|".join(key for key, value in params.items() if isinstance(value, dict))
    for key in re.findall(rf"`((?:{sections})(?:\.\w+)+)`", prose(path)):
        assert_key(params, key, path.name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_code_spans_exist(path: Path) -> None:
    folders = "flowmatch_core|pipelines|tests|benchmarks|peers|examples|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./]*)`", prose(path)):
        assert (ROOT / name).exists() or name in promised(path), name


def promised(path: Path) -> set[str]:
    """The files that a page tells its reader to write: those whose block follows, or that it copies."""
    return set(re.findall(r"`([\w/]+\.(?:py|yaml))`:\n", path.read_text()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_library_exist(path: Path) -> None:
    import flowmatch_core as fm

    for name in re.findall(r"`fm\.(\w+)", prose(path)):
        assert hasattr(fm, name), name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# ---- the site ----


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder


def test_every_page_is_built(site: Path) -> None:
    for path in DOCS.rglob("*.md"):
        assert (site / path.relative_to(DOCS)).with_suffix(".html").exists(), path


def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    tag = re.compile(r"<(?:script|link|img|iframe|source|video|audio)\b[^>]*>")
    remote = re.compile(r"(?:src|href|srcset)=[\"']?(?:https?:)?//")
    for page in site.rglob("*.html"):
        found = [text for text in tag.findall(page.read_text()) if remote.search(text)]
        assert found == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet.name


def test_formulas_are_rendered(site: Path) -> None:
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    for page, text in pages.items():
        assert 'class="arithmatex"' not in text, page
        formulas = re.findall(r"<math.*?</math>", text, re.DOTALL)
        assert not [formula for formula in formulas if re.search(r"\\[a-zA-Z]", formula)], page
    assert "<math" in pages[site / "tutorials" / "likelihood.html"]
    assert "<math" in pages[site / "concepts" / "td-methods.html"]


def test_the_reference_has_every_public_name(site: Path) -> None:
    import flowmatch_core as fm

    text = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for name in set(fm.__all__) - {"__version__"}:
        assert re.search(rf'id="flowmatch_core\.[\w.]*\b{name}"', text), name


def test_a_td_loss_has_the_signature_of_its_calls(site: Path) -> None:
    page = (site / "api" / "successor.html").read_text()
    heading = page.index('id="flowmatch_core.successor.td2_cfm_loss"')
    text = re.sub(r"<[^>]+>", "", page[heading : heading + 20_000]).partition("td2_cfm_loss(")[2]
    signature = text.partition("\n)")[0]
    for argument in ("field", "target", "batch", "gamma", "path", "steps", "generator"):
        assert re.search(rf"\b{argument}: ", signature), argument
