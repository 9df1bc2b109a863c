"""The rooms of the library: which may import which, what they export, and what importing them loads."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowmatch_core

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flowmatch_core"
FILES = sorted(PACKAGE.rglob("*.py"))

# Floor by floor: a room is a module or a package of flowmatch_core, and imports the rooms in its row and no others.
FLOORS: list[dict[str, set[str]]] = [
    {"_conditions": set(), "_require": set(), "averaging": set(), "prefetch": set(), "times": set()},
    {"_jacobian": {"_conditions"}},
    {"field": {"_conditions", "_jacobian"}, "intervals": {"_require"}, "transport": {"_require"}},
    {"_tensors": {"field"}},
    {
        "_call": {"_conditions", "_tensors", "field"},
        "_flow": {"_conditions", "_tensors"},
        "_units": {"_tensors"},
        "whitening": {"_tensors"},
    },
    {
        "_bases": {"_flow", "_tensors"},
        "dequantise": {"_tensors"},
        "divergence": {"_call", "_conditions", "_jacobian", "_tensors", "field"},
        "guidance": {"_call", "_conditions", "_tensors", "field"},
        "marginals": {"_tensors", "_units"},
        "paths": {"_call", "_conditions", "_tensors", "field"},
    },
    {
        "_standardised": {"_conditions", "_flow", "_tensors", "_units", "marginals"},
        "networks": {"_call", "_conditions", "_tensors", "field", "paths"},
        "oracles": {"_tensors", "field", "paths"},
        "solvers": {"_call", "_conditions", "_require", "_tensors", "field", "paths"},
    },
    {
        "mixture": {"_conditions", "_flow", "_standardised", "_tensors", "marginals"},
        "normalizing": {"_conditions", "_flow", "_require", "_standardised", "_tensors", "marginals"},
        "_density": {"_call", "_conditions", "_jacobian", "_tensors", "divergence", "field", "solvers"},
    },
    {
        "couplings": {"_conditions", "_tensors", "field", "solvers", "transport"},
        "discrete": {"_call", "_conditions", "_flow", "_tensors", "field", "guidance", "solvers"},
        "flow": {
            *("_bases", "_call", "_conditions", "_density", "_flow", "_standardised", "_tensors"),
            *("divergence", "field", "marginals", "solvers"),
        },
        "metrics": {"_call", "_conditions", "_tensors", "field", "solvers", "transport"},
    },
    {
        "components": {"_conditions", "_flow", "_standardised", "flow", "marginals", "mixture"},
        "objectives": {
            *("_bases", "_call", "_conditions", "_density", "_jacobian", "_require", "_tensors"),
            *("couplings", "divergence", "field", "paths", "solvers"),
        },
        "successor": {
            "_call",
            "_conditions",
            "_tensors",
            "_units",
            "field",
            "flow",
            "networks",
            "paths",
            "solvers",
            "times",
        },
    },
    {"forward_backward": {"_tensors", "_units", "networks", "successor"}},
]
MAY_IMPORT = {room: rooms for floor in FLOORS for room, rooms in floor.items()}
CLOSED = {"discrete", "normalizing"}  # no other room imports them

# Public names that stay in their module and are not at the top of the package.
BELOW_THE_TOP = {
    "divergence": {"DivergenceMethod", "divergence", "divergence_per_probe", "prepared", "rademacher"},
    "field": {
        *("TimeSampler", "at_condition", "at_times", "cond_shape", "has_closed_form_divergence"),
        "velocity_and_divergence",
    },
    "guidance": {"check_guidance", "guidance_scale"},
    "intervals": {"ONE_SIDED", "difference", "ratio", "welch_difference", "welch_ratio"},
    "marginals": {"Identity", "Marginal", "Mixture", "Steps"},
    "normalizing": {"Architecture", "Glow", "MADE", "MAF", "NAF", "NSF", "Planar", "RealNVP", "Residual"},
    "solvers": {"Constant", "Custom", "Diffusion", "Proportional", "SDE_SOLVERS", "Tableau", "TimeGrid"},
    "successor": {"NoisePrediction"},  # is networks.NoisePrediction
    "transport": {"entropic_plan", "optimal_permutation", "optimal_plan"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.split(".")[1]


def inner_imports(path: Path) -> Iterator[str]:
    """The modules of the library that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "flowmatch_core" for alias in node.names), path
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flowmatch_core":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = any((ROOT.joinpath(*inner.split("."))).with_suffix(s).exists() for s in (".py", ""))
                yield inner if is_module else node.module


IMPORTS = {module_name(path): set(inner_imports(path)) for path in FILES if path != PACKAGE / "__init__.py"}


def test_the_table_names_every_room_and_leads_downward_only() -> None:
    assert set(MAY_IMPORT) == {room(module) for module in IMPORTS}
    below: set[str] = set()
    for floor in FLOORS:
        assert all(rooms <= below for rooms in floor.values())
        below |= set(floor)
    assert not any(rooms & CLOSED for rooms in MAY_IMPORT.values())


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_what_the_table_says(name: str) -> None:
    found = {room(other) for module, others in IMPORTS.items() if room(module) == name for other in others}
    assert found - {name} == MAY_IMPORT[name]


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in IMPORTS[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_every_module_says_what_it_exports() -> None:
    for name in ("flowmatch_core", *IMPORTS):
        module = importlib.import_module(name)
        assert module.__all__, name
        assert len(set(module.__all__)) == len(module.__all__), name
        assert all(hasattr(module, public) for public in module.__all__), name


def test_the_top_of_the_package_has_the_public_names_of_its_modules() -> None:
    public = {name.split(".")[1] for name in IMPORTS if not name.split(".")[1].startswith("_")}
    lazy = flowmatch_core._MODULES
    for name in public:
        exported = set(importlib.import_module(f"flowmatch_core.{name}").__all__)
        assert set(lazy.get(name, ())) == exported - BELOW_THE_TOP.get(name, set()), name
    names = [name for names in lazy.values() for name in names]
    assert len(set(names)) == len(names)
    for name in names:
        module = importlib.import_module(f"flowmatch_core.{flowmatch_core._MODULE_OF[name]}")
        assert getattr(flowmatch_core, name) is getattr(module, name)
    for name in public:
        assert getattr(flowmatch_core, name).__name__ == f"flowmatch_core.{name}"


def test_type_checkers_see_the_same_names_at_the_top() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen: dict[str, set[str]] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names:
            assert alias.asname == alias.name  # a re-export
            seen.setdefault(node.module.removeprefix("flowmatch_core."), set()).add(alias.name)
    assert seen == {module: set(names) for module, names in flowmatch_core._MODULES.items()}


def loaded_by(statements: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after the statements."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(json.loads(result.stdout))


def test_importing_the_package_loads_only_the_standard_library() -> None:
    before = loaded_by("import importlib, typing")
    after = loaded_by("import flowmatch_core; flowmatch_core.__version__; dir(flowmatch_core)")
    assert after - before <= {"flowmatch_core", *sys.stdlib_module_names}


def test_importing_every_module_loads_no_optional_part() -> None:
    loaded = loaded_by("\n".join(f"import {name}" for name in IMPORTS))
    assert {"torch", "numpy"} <= loaded
    assert not loaded & {"scipy", "ot", "zuko", "torchdiffeq"}
