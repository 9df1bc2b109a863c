"""Every example runs, leaves a picture, and prints the numbers that `examples/README.md` promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(p for p in (ROOT / "examples").glob("*.py") if not p.name.startswith("_"))
PICTURES = ROOT / "docs" / "examples"

STEPS = re.compile(r"^((?:TRAINING_)?STEPS, .* = )(\d+)", re.MULTILINE)
UNTRAINED = ("_output.py", "sde_vs_ode.py")
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
PRINTED = re.compile(rf"^(?P<label>.+): (?P<value>{NUMBER}) ± (?P<error>{NUMBER})$")
PROMISED = re.compile(rf"^\| `(\w+\.py)` \| (.+?) \| ({NUMBER}) \| ({NUMBER}) \| .+ \|$", re.MULTILINE)


def promised(script: str) -> dict[str, tuple[float, float]]:
    """The ranges of the README by the label of the printed line."""
    return {label: (float(low), float(high)) for name, label, low, high in PROMISED.findall(README) if name == script}


def check_picture(path: Path) -> None:
    """A picture has a sensible size on disk and on the page, and something on it in more than one place."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert 10_000 < path.stat().st_size < 200_000
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L"), dtype=float)
    height, width = grey.shape
    assert 600 <= width <= 1500
    assert 250 <= height <= 1000
    for half in (grey[:, : width // 2], grey[:, width // 2 :]):
        assert half.std() > 10, "one half of the picture is blank"


@pytest.fixture(scope="module")
def shortened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples with a tenth of their training."""
    folder = tmp_path_factory.mktemp("examples")
    for file in (ROOT / "examples").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        tenth = STEPS.sub(lambda match: f"{match[1]}{int(match[2]) // 10}", source)
        (folder / file.name).write_text(tenth, encoding="utf-8")
        assert tenth != source or file.name in UNTRAINED, file.name
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_shortened_example_prints_its_lines_and_leaves_one_picture(
    script: Path, shortened: Path, tmp_path: Path
) -> None:
    found = run(shortened / script.name, tmp_path)
    if script.name in UNTRAINED:
        check_ranges(script.name, found)


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name not in UNTRAINED], ids=lambda p: p.stem)
def test_an_example_prints_the_numbers_that_are_promised(script: Path, tmp_path: Path) -> None:
    check_ranges(script.name, run(script, tmp_path))


def run(script: Path, tmp_path: Path) -> dict[str, float]:
    """Run an example, which leaves one picture and prints a number with its error for each label of the README."""
    picture = tmp_path / "out" / "picture.png"
    here = tmp_path / "here"
    here.mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--out", str(picture)],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]

    *lines, last = result.stdout.splitlines()
    assert last == f"picture: {picture}"
    assert list(here.iterdir()) == []
    assert list(picture.parent.iterdir()) == [picture]
    check_picture(picture)

    found = {}
    for line in lines:
        match = PRINTED.match(line)
        assert match, f"not a number with its error: {line}"
        assert float(match["error"]) >= 0, line
        found[match["label"]] = float(match["value"])
    assert 2 <= len(found) <= 6
    assert found.keys() == promised(script.name).keys()
    return found


def check_ranges(script: str, found: dict[str, float]) -> None:
    ranges = promised(script)
    outside = {label: value for label, value in found.items() if not ranges[label][0] <= value <= ranges[label][1]}
    assert not outside, outside


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_listed_documented_and_shown(script: Path) -> None:
    assert re.search(rf"^\| `{script.name}` \| [^|]+(\\\|[^|]+)* \| \d+ \|$", README, re.MULTILINE)
    source = script.read_text(encoding="utf-8")
    assert f"\nRun: python examples/{script.name} [--out PICTURE.png]\n" in source
    # public names only, through the top of the library
    assert "\nimport flowmatch_core as fm\n" in source
    assert not re.search(r"from flowmatch_core|import flowmatch_core\.|from pipelines|import pipelines", source)
    check_picture(PICTURES / f"{script.stem}.png")


def test_nothing_is_listed_or_shown_without_its_example() -> None:
    names = {script.name for script in SCRIPTS}
    assert len(names) == 10
    assert set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE)) == names
    assert {path.name for path in PICTURES.iterdir()} == {f"{script.stem}.png" for script in SCRIPTS}


def test_pictures_that_users_make_are_not_committed() -> None:
    assert "/examples/output/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
