"""Train a model of the successor measure of an environment's policy, one network a seed.

A loss that takes a `future` is given on-policy futures; one that takes a `target` is given the averaged network; one
that takes `progress` is given the share of the steps that are done. The closed form (`oracle`) needs no training, nor
does a method that the environment's entry leaves out: a file in the place of the networks says so, for sampling and
evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import store
from pipelines.params import ORACLE, SuccessorFit, SuccessorMethod
from pipelines.stage import DATA, SKIPPED, Stage, run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from flowmatch_core.paths import AffinePath
    from flowmatch_core.successor import Loss, Particles
    from pipelines.batches import Batches
    from pipelines.fitting import Task


def main(stage: Stage, environment: str, method: str) -> None:
    entry, successor = stage.params.environments[environment], stage.params.successor
    choice, folder = successor.methods[method], DATA / "transitions" / environment
    if not entry.runs(method):
        return _leave(stage, environment, method, SKIPPED, f"{environment} does not list it")
    if choice.loss.name == ORACLE:
        if store.read_json(folder / "provenance.json")["closed_form"]:
            return _leave(stage, environment, method, "oracle.json", "the closed form, nothing to train")
        return _leave(stage, environment, method, SKIPPED, f"{environment} has no closed form")
    from pipelines.fitting import fit_seeds

    fit = successor.fit_for(entry, choice)
    return fit_seeds(
        stage,
        environment,
        method,
        partial(job, folder=folder, choice=choice, fit=fit, gamma=entry.gamma),
        fit,
        successor.seeds,
        config={"environment": environment, "gamma": entry.gamma, "method": choice.model_dump(mode="json")},
        inputs=[folder / name for name in ("transitions.parquet", "rollouts.parquet", "provenance.json")],
    )


def _leave(stage: Stage, environment: str, method: str, name: str, reason: str) -> None:
    """Write a file that says why there are no networks, and empty logs."""
    with stage.output(DATA / "models" / environment / method) as output:
        store.write_json(output / name, {"reason": reason})
    for suffix, content in ((".csv", "step\n"), (".json", "{}\n")):
        with stage.output((DATA / "logs" / environment / method).with_suffix(suffix)) as log:
            log.write_text(content)
    stage.log(reason)


def job(device: torch.device, *, folder: Path, choice: SuccessorMethod, fit: SuccessorFit, gamma: float) -> Task:
    """The task of one seed."""
    import torch

    from flowmatch_core.successor import logit_normal
    from pipelines import models
    from pipelines.batches import Batches
    from pipelines.fitting import Task

    batches = Batches(folder, device)
    loss, path = models.successor_loss(choice.loss, fit), models.successor_path(choice.path)
    takes = inspect.signature(loss).parameters
    flow = {"path": path, "time": logit_normal if fit.time == "logit_normal" else torch.rand} if "path" in takes else {}
    memory: Particles | None = None
    more: dict[str, Any] = {}
    if "future" in takes:
        pairs = batches.futures(fit.batch, gamma)

        def value(network: nn.Module, average: nn.Module, generator: torch.Generator, **now: float) -> Loss:
            batch, future = pairs(generator)
            result: Loss = loss(network, batch, future, **flow, **now, generator=generator)
            return result
    else:
        half = fit.batch // 2  # a loss regresses on two terms
        if fit.returns > 1:
            draw = batches.returns(half, gamma, fit.returns)
        else:
            draw, more["seek"] = batches.transitions(half, fit.rows_in_memory)
        options: dict[str, Any] = {"gamma": gamma, **flow}
        if fit.particles:
            memory = _particles(fit, batches, path).to(device)
            loss, options = memory.td2_cfm_loss, {"gamma": gamma}
        elif flow:
            options |= {"steps": fit.ode_steps, "solver": fit.ode_solver}

        def value(network: nn.Module, average: nn.Module, generator: torch.Generator, **now: float) -> Loss:
            result: Loss = loss(network, average, draw(generator), **options, **now, generator=generator)
            return result

    def terms(
        network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
    ) -> Mapping[str, Tensor]:
        now = {"progress": progress} if "progress" in takes else {}
        total, direct, bootstrap = value(network, average, generator, **now)
        return {"loss": total, "direct": direct, "bootstrap": bootstrap}

    states, actions = len(batches.states), len(batches.actions)
    config = models.successor_network_config(choice.loss, fit, states, states + actions)
    prediction = getattr(loss, "prediction", "velocity") if flow else "state"
    meta = {
        "network": config,
        "path": choice.path.model_dump(),
        "prediction": prediction,
        "gamma": gamma,
        "state_names": batches.states,
        "action_names": batches.actions,
    }
    network = models.successor_network(config, prediction, path).to(device)
    return Task(network, terms, batches.loc, batches.scale, meta, memory=memory, **more)


def _particles(fit: SuccessorFit, batches: Batches, path: AffinePath) -> Particles:
    from flowmatch_core.successor import Particles
    from flowmatch_core.successor.particles import logit_normal_quantile

    quantile = {"quantile": logit_normal_quantile} if fit.time == "logit_normal" else {}
    state, action = len(batches.states), len(batches.actions)
    return Particles(fit.batch // 2, state, state + action, fit.ode_steps, path=path, **quantile)


if __name__ == "__main__":
    run(main)
