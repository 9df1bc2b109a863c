"""Train a model of the successor measure of an environment's policy, one network a seed.

A loss that takes a `future` is given on-policy futures; one that takes a `target` is given the averaged network. The
closed form (`oracle`) needs no training: its file says what it is, so that sampling and evaluation treat it as a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import store
from pipelines.params import SuccessorFit, SuccessorMethod
from pipelines.stage import DATA, Stage, run

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

    from flowmatch_core.successor import Loss, Transitions
    from pipelines.fitting import Task
    from pipelines.rows import Rows

    Draw = Callable[[torch.Generator], tuple[Transitions, Tensor]]


def main(stage: Stage, environment: str, method: str) -> None:
    entry, successor = stage.params.environments[environment], stage.params.successor
    choice, folder = successor.methods[method], DATA / "transitions" / environment
    if choice.loss == "oracle":
        return _describe_oracle(stage, environment, method, store.read_json(folder / "provenance.json")["closed_form"])
    from pipelines.fitting import fit_seeds

    fit = successor.fit_for(entry)
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


def _describe_oracle(stage: Stage, environment: str, method: str, closed_form: bool) -> None:
    reason = None if closed_form else f"{environment} has no closed form"
    with stage.output(DATA / "models" / environment / method) as output:
        store.write_json(output / "oracle.json", {"skipped": reason})
    for name, content in ((".csv", "step\n"), (".json", "{}\n")):
        with stage.output((DATA / "logs" / environment / method).with_suffix(name)) as log:
            log.write_text(content)
    stage.log(reason or "the closed form, nothing to train")


def job(device: torch.device, *, folder: Path, choice: SuccessorMethod, fit: SuccessorFit, gamma: float) -> Task:
    """The task of one seed. States are standardised, actions stay as they are."""
    import torch

    from pipelines import models
    from pipelines.fitting import Task

    provenance = store.read_json(folder / "provenance.json")
    states, actions = provenance["state_names"], provenance["action_names"]
    loc, scale = (torch.tensor(provenance[name], device=device) for name in ("loc", "scale"))
    loss, path = models.successor_loss(choice.loss), models.path(choice.path)
    on_policy = "future" in inspect.signature(loss).parameters
    if on_policy:
        table = store.read_table(folder / "rollouts.parquet", ["episode", *store.columns("state", states)])
        pairs = _on_policy(table, states, actions, fit.batch, gamma, loc, scale)

        def value(network: nn.Module, average: nn.Module, generator: torch.Generator) -> Loss:
            batch, future = pairs(generator)
            result: Loss = loss(network, batch, future, path=path, generator=generator)
            return result
    else:
        rows = _off_policy(folder / "transitions.parquet", states, actions, fit, loc, scale)
        options = {"gamma": gamma, "path": path, "steps": fit.ode_steps, "solver": fit.ode_solver}

        def value(network: nn.Module, average: nn.Module, generator: torch.Generator) -> Loss:
            batch = _transitions(rows.draw(generator), len(states), len(actions))
            result: Loss = loss(network, average, batch, **options, generator=generator)
            return result

    def terms(network: nn.Module, average: nn.Module, generator: torch.Generator) -> Mapping[str, Tensor]:
        total, direct, bootstrap = value(network, average, generator)
        return {"loss": total, "direct": direct, "bootstrap": bootstrap}

    config = models.network_config(fit.network, len(states), len(states) + len(actions))
    meta = {
        "network": config,
        "path": choice.path.model_dump(),
        "prediction": getattr(loss, "prediction", "velocity"),
        "gamma": gamma,
        "state_names": states,
        "action_names": actions,
    }
    seek = {} if on_policy else {"seek": rows.seek}
    return Task(models.network(config).to(device), terms, loc, scale, meta, **seek)


def _off_policy(
    path: Path, states: list[str], actions: list[str], fit: SuccessorFit, loc: Tensor, scale: Tensor
) -> Rows:
    """Rows of state, next state, action, next action and, where there is one, whether the next state is terminal."""
    import torch

    from pipelines import rows

    columns = [*store.columns("state", states), *store.columns("next_state", states)]
    columns += [*store.columns("action", actions), *store.columns("next_action", actions)]
    columns += ["terminal"] if rows.any_true(path, "terminal") else []
    as_they_are = len(columns) - 2 * len(states)
    return rows.read(
        path,
        columns,
        batch=fit.batch // 2,
        limit=fit.rows_in_memory,
        seed=torch.initial_seed(),
        loc=torch.cat([loc, loc, loc.new_zeros(as_they_are)]),
        scale=torch.cat([scale, scale, scale.new_ones(as_they_are)]),
    )


def _transitions(rows: Tensor, state_dim: int, action_dim: int) -> Transitions:
    import torch

    from flowmatch_core.successor import Transitions

    sizes = [state_dim, state_dim, action_dim, action_dim]
    state, next_state, action, next_action = torch.split(rows[:, : sum(sizes)], sizes, 1)
    terminal = rows[:, -1] > 0.5 if rows.shape[1] > sum(sizes) else None
    return Transitions(state, action, next_state, next_action, terminal=terminal)


def _on_policy(
    table: pd.DataFrame, states: list[str], actions: list[str], n: int, gamma: float, loc: Tensor, scale: Tensor
) -> Draw:
    """States of an episode's first half, each with the state T ~ Geometric(1 - gamma) steps later (or the last one)."""
    import torch

    from flowmatch_core.successor import Transitions, geometric

    episodes = table["episode"].nunique()
    state = ((_tensor(table, "state", states, loc) - loc) / scale).reshape(episodes, -1, len(states))
    action = _tensor(table, "action", actions, loc).reshape(episodes, -1, len(actions))
    last = state.shape[1] - 1

    def draw(generator: torch.Generator) -> tuple[Transitions, Tensor]:
        episode = torch.randint(episodes, (n,), generator=generator, device=loc.device)
        step = torch.randint((last + 1) // 2, (n,), generator=generator, device=loc.device)
        wait = geometric(gamma, (n,), generator=generator, device=loc.device)
        now, soon = (episode, step), (episode, step + 1)
        batch = Transitions(state[now], action[now], state[soon], action[soon])
        return batch, state[episode, (step + wait).clamp(max=last)]

    return draw


def _tensor(table: pd.DataFrame, part: str, names: list[str], like: Tensor) -> Tensor:
    import torch

    return torch.tensor(table[store.columns(part, names)].to_numpy(), dtype=torch.float32, device=like.device)


if __name__ == "__main__":
    run(main)
