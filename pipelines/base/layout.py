"""Every path below `data/`: the one place that spells the names of files and folders.

Paths are relative to the folder that a stage runs in, the project or a profile's workspace.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path("data")
RAW = DATA / "raw"
"""Inputs of the user, which no stage writes."""
PREPARED, TRANSITIONS, MODELS, LOGS = (DATA / name for name in ("prepared", "transitions", "models", "logs"))
SAMPLES, EVALUATIONS, EXPERIMENTS = (DATA / name for name in ("samples", "evaluations", "experiments"))
METRICS, TABLES, REPORT = (DATA / name for name in ("metrics", "tables", "report"))
GATHERED = (EXPERIMENTS, EVALUATIONS, LOGS, METRICS, PREPARED, SAMPLES, TRANSITIONS)
"""Folders that the stages of the whole project depend on; DVC wants them there even if nothing is in them."""

PARTS = ("train", "val", "test")
"""The parts of a data set."""


def prepared(dataset: str) -> Path:
    """Return the folder of a prepared data set."""
    return PREPARED / dataset


def part(folder: Path, name: str) -> Path:
    """Return the table of one of `PARTS` in the folder of a prepared data set."""
    return folder / f"{name}.parquet"


def collected(environment: str) -> Path:
    """Return the folder of an environment's transitions and rollouts."""
    return TRANSITIONS / environment


def provenance(folder: Path) -> Path:
    """Return the description of a prepared data set or of a collected environment."""
    return folder / "provenance.json"


def transitions(folder: Path) -> Path:
    """Return the offline transitions in the folder of a collected environment."""
    return folder / "transitions.parquet"


def rollouts(folder: Path) -> Path:
    """Return the on-policy episodes of Monte-Carlo training."""
    return folder / "rollouts.parquet"


def evaluation(folder: Path) -> Path:
    """Return the on-policy episodes from the start states of the evaluation."""
    return folder / "evaluation.parquet"


def counterfactual(folder: Path) -> Path:
    """Return the episodes from start states whose state or action was exchanged."""
    return folder / "counterfactual.parquet"


def models(data: str, method: str) -> Path:
    """Return the folder of the networks of a method, by data set or environment."""
    return MODELS / data / method


def network(folder: Path, seed: int) -> Path:
    """Return the network of a seed in the folder of a method."""
    return folder / f"seed{seed}.safetensors"


def networks(folder: Path) -> dict[int, Path]:
    """Return the networks in a folder by seed."""
    return {int(file.stem.removeprefix("seed")): file for file in sorted(folder.glob("seed*.safetensors"))}


def skipped(folder: Path) -> Path:
    """Return the file that stands in the place of networks that were not trained; it holds the reason."""
    return folder / "skipped.json"


def closed_form(folder: Path) -> Path:
    """Return the file that stands in the place of networks where the model is the closed form."""
    return folder / "oracle.json"


def curve(data: str, method: str) -> Path:
    """Return the loss curve of a method, mean over seeds and each seed."""
    return LOGS / data / f"{method}.csv"


def final_losses(data: str, method: str) -> Path:
    """Return the losses at the end of the training of a method."""
    return LOGS / data / f"{method}.json"


def samples(data: str) -> Path:
    """Return the folder of samples of all methods of a data set or an environment."""
    return SAMPLES / data


def sampled(folder: Path, method: str) -> Path:
    """Return the samples of a method."""
    return folder / f"{method}.parquet"


def trajectory(folder: Path, method: str) -> Path:
    """Return the states of a few particles of a method along flow time."""
    return folder / f"{method}.path.parquet"


def field(folder: Path, method: str) -> Path:
    """Return the velocity field of a method on a grid."""
    return folder / f"{method}.field.parquet"


def value_map(folder: Path) -> Path:
    """Return the values on a grid of positions, true and by each method."""
    return folder / "value_map.parquet"


def evaluations(data: str) -> Path:
    """Return the folder of what an evaluation measured."""
    return EVALUATIONS / data


def cells(folder: Path) -> Path:
    """Return the measurements of an evaluation, one row a method and seed (and start state)."""
    return folder / "cells.parquet"


def truth(folder: Path) -> Path:
    """Return the true samples that an evaluation compared with."""
    return folder / "truth.parquet"


def metrics(data: str) -> Path:
    """Return the metrics of a data set or an environment."""
    return METRICS / f"{data}.json"


def findings(experiment: str) -> Path:
    """Return the metrics of an experiment."""
    return METRICS / "experiments" / f"{experiment}.json"


def experiment(name: str) -> Path:
    """Return the folder of an experiment's results."""
    return EXPERIMENTS / name


def results(folder: Path) -> Path:
    """Return the table of an experiment."""
    return folder / "results.parquet"


def figure(folder: Path) -> Path:
    """Return the picture of an experiment."""
    return folder / "figure.png"


def summary(folder: Path) -> Path:
    """Return the title, the notes and the caption of an experiment."""
    return folder / "summary.json"


def table(folder: Path, name: str, kind: str) -> Path:
    """Return a table of results as `csv`, `md` or `json`."""
    return folder / f"{name}.{kind}"


def page(folder: Path) -> Path:
    """Return the page of a report."""
    return folder / "index.html"


def figures(folder: Path) -> Path:
    """Return the folder of the pictures of a report."""
    return folder / "figures"
