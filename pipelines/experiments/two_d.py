"""Compare flow-matching methods between two data sets in the plane: W2, normalised path energy and evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from pipelines import datasets
from pipelines.base import plugins
from pipelines.experiments import Finding, Outcome
from pipelines.experiments._training import minimise

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from flowmatch_core.networks import MLPField

METHODS = {"i_cfm": "I-CFM", "ot_cfm": "OT-CFM", "sb_cfm": "SB-CFM", "vp_cfm": "VP-CFM", "reflow": "Reflow"}
FLOOR = "floor"
PARTICLES, INTERVALS = 60, 20  # trajectories of the figure, and of the intervals between their points


def _known(entry: dict[str, Any]) -> dict[str, Any]:
    family = datasets.__name__
    if "kind" not in entry:
        raise ValueError("it should have a `kind`, a file in pipelines/datasets/")
    plugin = plugins.load(family, entry["kind"])
    sizes = [name for name in datasets.GeneratedSettings.model_fields if name in entry]
    if sizes or not issubclass(plugin.Settings, datasets.GeneratedSettings):
        raise ValueError(
            f"it should be a data set that is drawn from a generator, without {', '.join(sizes)}"
            if sizes
            else f"{entry['kind']!r} is not drawn from a generator, but it should be, as moons is"
        )
    plugin.Settings.model_validate({name: value for name, value in entry.items() if name != "kind"})
    return entry


Drawn = Annotated[dict[str, Any], AfterValidator(_known)]
"""A data set that is drawn from a generator: its `kind` and the settings of that, without sizes."""


class Task(plugins.Settings):
    """The two data sets between which flows are trained."""

    source: Drawn = Field(description="data set at t = 0: a kind of pipelines/datasets/ and its settings")
    target: Drawn = Field(description="data set at t = 1, likewise")


class Settings(plugins.Settings):
    """Tasks, sizes and training of the comparison."""

    tasks: dict[str, Task] = Field(min_length=1, description="pairs of data sets by name")
    repeats: int = Field(default=5, ge=2, le=100, description="repetitions with new rows and new networks")
    train: int = Field(default=10_000, ge=2, le=1_000_000, description="training rows of each data set")
    test: int = Field(default=1_000, ge=2, le=10_000, description="test rows, samples, and rows of the floor")
    transported: int = Field(
        default=2_500, ge=2, le=10_000, description="training rows in the distance between source and target"
    )
    hidden: tuple[int, ...] = Field(default=(64, 64, 64), min_length=1, description="widths of the network")
    steps: int = Field(default=1_500, ge=1, le=1_000_000, description="gradient steps; reflow takes as many again")
    batch: int = Field(default=256, ge=2, le=100_000, description="rows per gradient step")
    lr: float = Field(default=5e-3, gt=0, description="learning rate of AdamW at the start; a cosine to zero")
    noise: float = Field(
        default=0.1, ge=0, description="standard deviation of the noise around the paths of i_cfm and ot_cfm"
    )
    bridge: float = Field(
        default=0.5,
        gt=0,
        description="scale of the Brownian motion of sb_cfm, in standard deviations of the target; below .4 the "
        "entropic plans of the batches take most of the time",
    )
    euler: tuple[int, ...] = Field(default=(20, 100), min_length=1, description="numbers of Euler steps of samples")


@dataclass(frozen=True)
class Draws:
    """The rows of a task in one repetition, in units in which the coordinates of the target have standard deviation 1.

    Attributes:
        source: Rows at t = 0 by part.
        target: Rows at t = 1 by part.
        unit: The unit, one for both coordinates, so that optimal transport is that of the data.
    """

    source: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    unit: float


def run(settings: Settings, *, generator: torch.Generator) -> Outcome:
    r"""Train each method on each task, and measure its samples and its trajectories.

    Samples start from test rows of the source and are compared with test rows of the target by the exact $W_2$; its
    floor is that of validation rows of the target. The normalised path energy is

    $$ \lvert E \int_0^1 \lVert v(t, x_t) \rVert^2 dt - W_2^2 \rvert / W_2^2 $$

    with the $W_2$ between training rows of source and target.
    """
    import pandas as pd

    from flowmatch_core.metrics import wasserstein2

    tables = []
    for name, task in settings.tasks.items():
        for repeat in range(settings.repeats):
            drawn = _draw(task, settings, generator)
            rows = slice(settings.transported)
            transport = float(wasserstein2(drawn.source["train"][rows], drawn.target["train"][rows]))
            floor = drawn.unit * float(wasserstein2(drawn.target["val"], drawn.target["test"]))
            tables.append(pd.DataFrame([{"task": name, "method": FLOOR, "repeat": repeat, "w2": floor}]))
            for method in METHODS:
                began = time.process_time()
                field = _train(method, drawn, settings, generator)
                seconds = time.process_time() - began
                found = {"seconds": seconds, **_measure(field, drawn, transport, settings)}
                tables.append(pd.DataFrame([{"task": name, "method": method, "repeat": repeat, **found}]))
                if repeat == 0:
                    tables.append(_trajectories(field, drawn).assign(task=name, method=method, repeat=repeat))
    table = pd.concat(tables, ignore_index=True)
    return Outcome(
        title="Flows between data sets in the plane",
        table=table.drop(columns="seconds"),
        findings=_findings(table, settings),
        notes=(
            f"W2 between {settings.test} samples, which start from test rows of the source, and as many test rows; "
            f"field evaluations (NFE) are those of dopri5 at tolerance 1e-5. {settings.repeats} repetitions with new "
            f"rows and networks: {settings.steps} steps of {settings.batch} rows, an MLP of "
            f"{' × '.join(map(str, settings.hidden))}; reflow continues i_cfm for as many steps on its own pairs."
        ),
        caption=f"Trajectories of {PARTICLES} test rows of the source (grey) to samples, from left to right by method.",
    )


def figure(table: pd.DataFrame) -> Figure:
    """Draw the trajectories, one row per task and one column per method."""
    from matplotlib import pyplot as plt

    paths = table[table["particle"].notna()]
    tasks = list(dict.fromkeys(paths["task"]))
    shown, axes = plt.subplots(
        len(tasks), len(METHODS), figsize=(11, 2.3 * len(tasks)), squeeze=False, layout="constrained"
    )
    for task, line in zip(tasks, axes, strict=True):
        here = paths[paths["task"] == task]
        for (method, title), axis in zip(METHODS.items(), line, strict=True):
            for _, path in here[here["method"] == method].groupby("particle"):
                axis.plot(path["x"], path["y"], color="C0", linewidth=0.5, alpha=0.6)
                axis.plot(path["x"].iloc[0], path["y"].iloc[0], ".", color="0.6", markersize=3)
                axis.plot(path["x"].iloc[-1], path["y"].iloc[-1], ".", color="C1", markersize=3)
            axis.set(title=f"{task}, {title}", aspect="equal", xticks=[], yticks=[])
            axis.title.set_fontsize(7)
    return shown


def _draw(task: Task, settings: Settings, generator: torch.Generator) -> Draws:
    import numpy as np
    import torch

    sizes = {"train": settings.train, "val": settings.test, "test": settings.test}

    def rows(entry: Mapping[str, Any]) -> dict[str, Tensor]:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        plugin = plugins.load(datasets.__name__, entry["kind"])
        own = {name: value for name, value in entry.items() if name != "kind"}
        data = plugin.build(plugin.Settings(**own, **sizes), rng=np.random.default_rng(seed), mirror=None)
        return {part: torch.from_numpy(getattr(data, part)).to(generator.device, torch.float32) for part in sizes}

    source, target = rows(task.source), rows(task.target)
    unit = float(target["train"].std())
    return Draws({part: x / unit for part, x in source.items()}, {part: x / unit for part, x in target.items()}, unit)


def _train(method: str, drawn: Draws, settings: Settings, generator: torch.Generator) -> MLPField:
    """Return the trained velocity field of a method."""
    import torch

    from flowmatch_core.couplings import Reflow
    from flowmatch_core.networks import MLPField
    from flowmatch_core.objectives import cfm_loss
    from flowmatch_core.paths import CondOT

    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    field = MLPField(2, settings.hidden, generator=torch.Generator().manual_seed(seed)).to(generator.device)
    x0, x1 = drawn.source["train"], drawn.target["train"]

    def independent(loss: Callable[..., Tensor]) -> Tensor:
        first, second = (torch.randint(len(x1), (settings.batch,), generator=generator, device=x1.device) for _ in "01")
        return loss(field, x1=x1[second], x0=x0[first], generator=generator)

    _minimise(field, partial(independent, _loss(method, drawn.unit, settings)), settings)
    if method == "reflow":
        x0, x1, _ = Reflow(field)(x0, x1)

        def paired() -> Tensor:
            rows = torch.randint(len(x1), (settings.batch,), generator=generator, device=x1.device)
            return cfm_loss(field, CondOT(), x1[rows], x0[rows], generator=generator)

        _minimise(field, paired, settings)
    return field


def _loss(method: str, unit: float, settings: Settings) -> Callable[..., Tensor]:
    """Return the loss of a method; reflow begins with that of i_cfm."""
    import torch

    from flowmatch_core.couplings import Independent, MinibatchOT
    from flowmatch_core.objectives import cfm_loss, interpolant_loss, sb_cfm_loss
    from flowmatch_core.paths import CondOT, Cosine

    if method == "sb_cfm":
        return partial(sb_cfm_loss, sigma=settings.bridge)
    if method == "vp_cfm":
        return partial(cfm_loss, path=Cosine())
    noise = settings.noise / unit
    coupling = MinibatchOT() if method == "ot_cfm" else Independent()
    return partial(interpolant_loss, path=CondOT(), gamma=lambda t: torch.full_like(t, noise), coupling=coupling)


def _minimise(field: MLPField, loss: Callable[[], Tensor], settings: Settings) -> None:
    import torch

    optimizer = torch.optim.AdamW(field.parameters(), settings.lr, weight_decay=1e-5, fused=True)
    minimise(loss, optimizer, settings.steps)


def _measure(field: MLPField, drawn: Draws, transport: float, settings: Settings) -> dict[str, float]:
    """Return the distances of samples, the path energy, and the field evaluations of a solve to tolerance."""
    import torch

    from flowmatch_core.metrics import normalised_path_energy, path_energy, wasserstein2
    from flowmatch_core.solvers import solve

    x0, truth = drawn.source["test"], drawn.target["test"]
    starts = drawn.source["train"][: settings.transported]  # those of the distance between source and target
    with torch.no_grad():
        exact = solve(field, x0, solver="dopri5", rtol=1e-5, atol=1e-5)
        found = {"w2": drawn.unit * float(wasserstein2(exact.x, truth)), "nfe": float(exact.nfe)}
        for steps in settings.euler:
            x = solve(field, x0, solver="euler", steps=steps).x
            found[f"w2_euler_{steps}"] = drawn.unit * float(wasserstein2(x, truth))
        found["energy"] = drawn.unit**2 * float(path_energy(field, starts))
        found["npe"] = float(normalised_path_energy(field, starts, transport))
    return found


def _trajectories(field: MLPField, drawn: Draws) -> pd.DataFrame:
    """Return the points of trajectories from test rows of the source."""
    import pandas as pd
    import torch

    from flowmatch_core.solvers import solve

    with torch.no_grad():
        path = solve(field, drawn.source["test"][:PARTICLES], solver="rk4", steps=INTERVALS, save=True).path
    assert path is not None  # as it was saved
    x, y = (drawn.unit * path).cpu().double().unbind(-1)
    particles = x.shape[1]
    return pd.DataFrame(
        {
            "particle": [i for _ in range(len(x)) for i in range(particles)],
            "x": x.flatten().numpy(),
            "y": y.flatten().numpy(),
        }
    )


def _findings(table: pd.DataFrame, settings: Settings) -> tuple[Finding, ...]:
    from flowmatch_core.intervals import ONE_SIDED, ratio, t_interval

    scores = table[table["w2"].notna()]
    measures = {
        "w2": "W2 by dopri5",
        **{f"w2_euler_{steps}": f"W2 by {steps} Euler steps" for steps in settings.euler},
        "npe": "normalised path energy",
        "energy": "path energy",
        "nfe": "NFE",
        "seconds": "CPU seconds of training",
    }
    found = []
    for task in settings.tasks:
        here = scores[scores["task"] == task]
        for measure, sentence in measures.items():
            for method, title in {**METHODS, FLOOR: "true samples"}.items():
                values = here.loc[here["method"] == method, measure].dropna().tolist()
                if values:
                    name = f"{task}_{method}_{measure}"
                    found.append(Finding(name, f"{task}, {title}: {sentence}", t_interval(values, ONE_SIDED)))
        npe = here.pivot(index="repeat", columns="method", values="npe")
        compared = ratio(dict(enumerate(npe["ot_cfm"])), dict(enumerate(npe["i_cfm"])), ONE_SIDED)
        sentence = f"{task}: normalised path energy of OT-CFM / that of I-CFM"
        found.append(Finding(f"{task}_straighter", sentence, compared, at_most=1.0))
    return tuple(found)
