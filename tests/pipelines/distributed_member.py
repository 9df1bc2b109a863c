"""A process that trains with others in `test_distributed`: `python -m tests.pipelines.distributed_member OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from pipelines.base import files, ranks
from pipelines.config import params
from pipelines.config.params import DensityFit, DensityMethod, SuccessorFit, SuccessorMethod
from pipelines.training import distributed, loop
from pipelines.training.density import DensityJob
from pipelines.training.fit import Job
from pipelines.training.successor import SuccessorJob

CPU = torch.device("cpu")
FIT: dict[str, Any] = {
    "network": {"name": "mlp", "hidden": [16, 16]}, "steps": 6, "batch": 33, "lr": 1e-2, "warmup": 2, "log_every": 2,
    "weight_decay": 0.01, "adam_betas": (0.9, 0.999), "ema_step": 0.1,
    "adam_eps": 1e-3,  # with a small one, the rounding of a gradient that is almost zero decides the sign of a step
}  # fmt: skip
SUCCESSOR_FIT: dict[str, Any] = FIT | {
    "batch": 34, "ode_solver": "midpoint", "ode_steps": 2, "time": "uniform", "returns": 1, "particles": False,
    "rows_in_memory": 100_000,
}  # fmt: skip
VP = {"name": "vp", "beta_max": 19.0}
DENSITIES: dict[str, dict[str, Any]] = {
    "cfm": {"path": "cond_ot", "coupling": "independent", "loss": "cfm"},
    "ot_cfm": {"path": "cond_ot", "coupling": "minibatch_ot", "loss": "cfm"},
    "interpolant": {"path": "cond_ot", "coupling": "independent", "loss": "interpolant"},
    "posterior_cfm": {"path": "cond_ot", "coupling": "independent", "loss": "posterior_cfm"},
    "maf": {"loss": {"name": "maf", "transforms": 2, "hidden": [16]}},
    "tuned": {
        "loss": "cfm",
        "tune": {
            "loss": {"name": "likelihood", "solver": "adams"},
            "steps": 4,
            "lr": 1e-2,
            "batch": 33,
            "val_every": 2,
        },
    },
}
SUCCESSORS: dict[str, dict[str, Any]] = {
    "mc_cfm": {"loss": "mc_cfm"},
    "td_cfm": {"loss": "td_cfm"},
    "td_cfm_coupled": {"loss": "td_cfm_coupled"},
    "td2_cfm": {"loss": "td2_cfm"},
    "particles": {"loss": "td2_cfm", "fit": {"particles": True, "returns": 3, "ode_steps": 4}},
    "streamed": {"loss": "td2_cfm", "fit": {"rows_in_memory": 500}},
    "td2_dd": {"loss": "td2_dd", "path": VP, "fit": {"ode_solver": "ddim", "ode_steps": 4}},
    "gan": {"loss": {"name": "gan", "width": 16, "blocks": 1}},
    "vae": {"loss": {"name": "vae", "beta": 0.1, "width": 16, "blocks": 1}},
}
METHODS = [*DENSITIES, *SUCCESSORS]


def job(method: str) -> Job:
    """Return the training job of a method, on the moons or on the spiral."""
    if method in DENSITIES:
        return DensityJob("moons", method, DensityFit(**FIT, val_every=3), DensityMethod(**DENSITIES[method]))
    choice = SuccessorMethod(**SUCCESSORS[method])
    return SuccessorJob("spiral", method, SuccessorFit(**SUCCESSOR_FIT | choice.fit), choice, 0.9)


def train(made: Job, checkpoint: Path) -> loop.Trained:
    """Train a job."""
    torch.manual_seed(0)
    task, generator = made.task(CPU), torch.Generator().manual_seed(1)
    return task.train(made.fit, generator, checkpoint, lambda row: None)


def main(out: Path) -> None:
    """Train every method, and write the curve and the weights of each from each process."""
    params.load()  # the plugins' sentences, before the processes meet
    torch.set_num_threads(1)
    out.mkdir(exist_ok=True)
    with distributed.group(CPU):
        for method in METHODS:
            trained = train(job(method), out / f"{method}.checkpoint")
            file = out / f"{method}.{ranks.rank()}.safetensors"
            files.write_tensors(file, trained.network.state_dict(), {"curve": trained.curve})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
