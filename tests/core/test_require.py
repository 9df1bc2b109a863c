"""A part whose dependency is not installed says in one sentence how to install it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flowmatch_core._require import required
from flowmatch_core.couplings import MinibatchOT
from flowmatch_core.intervals import t_interval
from flowmatch_core.metrics import emd
from flowmatch_core.networks import MLPField
from flowmatch_core.normalizing import MAF, DiscreteTimeFlow
from flowmatch_core.objectives import nll_loss
from flowmatch_core.solvers import solve
from flowmatch_core.transport import optimal_plan

X = torch.ones(4, 2)
USES: dict[str, tuple[str, str, Callable[[], object]]] = {
    "emd": ("ot", "POT", lambda: emd(X, X)),
    "optimal_plan": ("ot", "POT", lambda: optimal_plan(np.eye(2))),
    "minibatch_ot": ("scipy.optimize", "scipy", lambda: MinibatchOT()(X, X)),
    "t_interval": ("scipy.stats", "scipy", lambda: t_interval([1.0, 2.0])),
    "normalizing": ("zuko", "zuko", lambda: DiscreteTimeFlow(MAF(), 2)),
    "dopri5": ("torchdiffeq", "torchdiffeq", lambda: solve(lambda t, x, cond: x, X, solver="dopri5")),
    "adjoint": ("torchdiffeq", "torchdiffeq", lambda: nll_loss(MLPField(2), X, method="adjoint")),
}


@pytest.mark.parametrize("use", USES)
def test_a_missing_dependency_is_named_with_the_command_that_installs_it(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, distribution, call = USES[use]
    call()
    for name in [m for m in sys.modules if m == module or m.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # what makes an import of it fail
    with pytest.raises(ImportError) as caught:
        call()
    sentence = str(caught.value)
    assert sentence.startswith(f"the package {distribution} is not installed: ")
    assert f"`pip install {distribution}`" in sentence and "`pip install flowmatch`" in sentence
    assert sentence.endswith(".") and "\n" not in sentence and caught.value.name == module.split(".")[0]


def test_what_a_dependency_itself_lacks_is_not_taken_for_the_dependency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import something_else_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'something_else_that_is_missing'"):
        required("half_installed", "half-installed")
