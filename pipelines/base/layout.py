"""All paths below `data/`, and those of stored policies; no other module spells the name of a file or folder there.

Paths below `data/` are relative to the working directory of a stage: the project or a profile's workspace.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path("data")
RAW = DATA / "raw"
"""User inputs, which no stage writes."""
SOURCES = DATA / "sources"
"""Fingerprints of external files, one file per data set and environment."""
PREPARED, TRANSITIONS, MODELS, LOGS = (DATA / name for name in ("prepared", "transitions", "models", "logs"))
SAMPLES, EVALUATIONS, EXPERIMENTS, PLANS = (DATA / name for name in ("samples", "evaluations", "experiments", "plans"))
METRICS, TABLES, REPORT = (DATA / name for name in ("metrics", "tables", "report"))
POLICIES = Path(__file__).parents[1] / "policies"
"""Stored policies, beside the code that makes them."""
PARTIAL = DATA / "partial"
"""Tables and report of a run that failed; no output of DVC."""
GATHERED = (EXPERIMENTS, EVALUATIONS, LOGS, METRICS, PLANS, PREPARED, SAMPLES, TRANSITIONS)
"""Folders that whole-project stages depend on; DVC requires them to exist, even if they are empty."""

PARTS = ("train", "val", "test")
"""The parts of a data set."""


def source(entry: str) -> Path:
    """Return the fingerprint of the external files of a data set or an environment."""
    return SOURCES / f"{entry}.json"


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
    """Return the file that describes the source of a prepared data set or a collected environment."""
    return folder / "provenance.json"


def marginals(folder: Path) -> Path:
    """Return the transforms of the columns in the folder of a prepared data set; most have none."""
    return folder / "marginals.safetensors"


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
    """Return the episodes from start states with a replaced state or action."""
    return folder / "counterfactual.parquet"


def film(folder: Path) -> Path:
    """Return the strip of frames of the policy, of an environment that can be seen."""
    return folder / "film.png"


def neighbours(folder: Path) -> Path:
    """Return another logged future for every start state of the evaluation of a log, with which its floor is found."""
    return folder / "neighbours.parquet"


def models(data: str, method: str) -> Path:
    """Return the folder of a method's networks for a data set or environment."""
    return MODELS / data / method


def network(folder: Path, seed: int) -> Path:
    """Return the network of one seed in a method's folder."""
    return folder / f"seed{seed}.safetensors"


def networks(folder: Path) -> dict[int, Path]:
    """Return the networks in a folder by seed."""
    return {int(file.stem.removeprefix("seed")): file for file in sorted(folder.glob("seed*.safetensors"))}


def skipped(folder: Path) -> Path:
    """Return the file that replaces the networks of a method that is not trained; it contains the reason."""
    return folder / "skipped.json"


def closed_form(folder: Path) -> Path:
    """Return the file that replaces the networks where the model has a closed form."""
    return folder / "oracle.json"


def curve(data: str, method: str) -> Path:
    """Return the loss curve of a method: the mean over seeds and the values of each seed."""
    return LOGS / data / f"{method}.csv"


def final_losses(data: str, method: str) -> Path:
    """Return the losses at the end of the training of a method."""
    return LOGS / data / f"{method}.json"


def samples(data: str) -> Path:
    """Return the folder of the samples of all methods for a data set or environment."""
    return SAMPLES / data


def sampled(folder: Path, method: str) -> Path:
    """Return the samples of a method."""
    return folder / f"{method}.parquet"


def trajectory(folder: Path, method: str) -> Path:
    """Return the states of a few particles along flow time, for one method."""
    return folder / f"{method}.path.parquet"


def field(folder: Path, method: str) -> Path:
    """Return the velocity field of a method on a grid."""
    return folder / f"{method}.field.parquet"


def value_map(folder: Path) -> Path:
    """Return the true and the estimated values on a grid of positions."""
    return folder / "value_map.parquet"


def evaluations(data: str) -> Path:
    """Return the folder of the results of an evaluation."""
    return EVALUATIONS / data


def cells(folder: Path) -> Path:
    """Return the measurements of an evaluation: one row per method and seed (and start state)."""
    return folder / "cells.parquet"


def log_prob(folder: Path) -> Path:
    """Return the log-density of each test row under each model of a data set."""
    return folder / "log_prob.parquet"


def truth(folder: Path) -> Path:
    """Return the true samples that an evaluation compares with."""
    return folder / "truth.parquet"


def metrics(data: str) -> Path:
    """Return the metrics of a data set or an environment."""
    return METRICS / f"{data}.json"


def findings(experiment: str) -> Path:
    """Return the metrics of an experiment."""
    return METRICS / "experiments" / f"{experiment}.json"


def plans(environment: str) -> Path:
    """Return the folder of the episodes of an environment's planners."""
    return PLANS / environment


def episodes(folder: Path) -> Path:
    """Return the returns of the episodes of planners: one row per reward, method, law, seed and episode."""
    return folder / "episodes.parquet"


def paths(folder: Path) -> Path:
    """Return the states of some episodes of planners, with the w that is followed in each."""
    return folder / "paths.parquet"


def planned(environment: str) -> Path:
    """Return the metrics of an environment's planners."""
    return METRICS / "plans" / f"{environment}.json"


def experiment(name: str) -> Path:
    """Return the folder of an experiment's results."""
    return EXPERIMENTS / name


def results(folder: Path) -> Path:
    """Return the table of an experiment."""
    return folder / "results.parquet"


def figure(folder: Path) -> Path:
    """Return the figure of an experiment."""
    return folder / "figure.png"


def summary(folder: Path) -> Path:
    """Return the title, the notes and the caption of an experiment."""
    return folder / "summary.json"


def table(folder: Path, name: str, kind: str) -> Path:
    """Return a table of results as `csv`, `md`, `tex` or `json`."""
    return folder / f"{name}.{kind}"


def page(folder: Path) -> Path:
    """Return the page of a report."""
    return folder / "index.html"


def figures(folder: Path) -> Path:
    """Return the folder of the figures of a report."""
    return folder / "figures"


def actor(name: str) -> Path:
    """Return the stored policy of a task, such as `cheetah_run`."""
    return POLICIES / f"{name}.safetensors"


def actor_provenance(name: str) -> Path:
    """Return how a stored policy was made, and its return."""
    return POLICIES / f"{name}.json"
