"""Train the policy of a task and store it with its provenance: `python -m pipelines.policies.train cheetah_run`.

It needs the extras `dmc` and `policies`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from pipelines.base import extras, plugins
from pipelines.base.errors import UserError
from pipelines.environments._suite import Domain

if TYPE_CHECKING:
    from pipelines.policies.actor_critic import ActorCritic

NAMES = ("cheetah_run", "walker_walk", "quadruped_walk")
PACKAGES = ("mujoco", "dm_control", "numpy", "torch", "stable-baselines3")
"""Packages whose versions are recorded."""
COMPARED, RECORDED = 4, 16
"""Episodes over which candidates are compared, and those whose mean return is recorded."""


def recipe(name: str) -> ActorCritic:
    """Return how the policy of a name is trained.

    Raises:
        UserError: There is no such policy, or a package is missing.
    """
    if name not in NAMES:
        raise UserError(f"no policy {name!r}; expected {', '.join(NAMES[:-1])} or {NAMES[-1]}.")
    if find_spec("stable_baselines3") is None:
        raise UserError(
            f"training {name} needs the package stable-baselines3, which is not installed; "
            "run `pip install -e '.[policies]'`."
        )
    from pipelines.policies.actor_critic import ActorCritic

    return ActorCritic()


def train(name: str, seed: int) -> None:
    """Train the policy of a name, and store the best candidate so far with its provenance.

    Candidates are compared over a few episodes; the recorded return is that of others.

    Raises:
        UserError: There is no such policy, or a package is missing.
    """
    how, (kind, _, task) = recipe(name), name.partition("_")
    module, began, highest = plugins.load("pipelines.environments", kind), time.process_time(), -np.inf
    domain: Domain = module.build(module.Settings(task=task, action_repeat=how.action_repeat))
    for number, actor in enumerate(how.candidates(domain, seed), 1):
        found = domain.returns(actor, COMPARED, np.random.default_rng(seed)).mean()
        if found > highest:
            highest = found
            recorded = domain.returns(actor, RECORDED, np.random.default_rng(seed + 1))
            provenance = {
                "command": f"python -m pipelines.policies.train {name} --seed {seed}",
                "method": type(how).__name__,
                "settings": asdict(how),
                "candidate": number,
                "action_repeat": how.action_repeat,
                "episodes": RECORDED,
                "seed": seed + 1,
                "return": float(recorded.mean()),
                "return_sd": float(recorded.std(ddof=1)),
                "cpu_seconds": round(time.process_time() - began),
                "versions": {package: version(package) for package in PACKAGES},
            }
            actor.write(name, provenance)
        print(f"candidate {number}: return {found:.0f}, the best so far {highest:.0f}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.policies.train", description=train.__doc__)
    parser.add_argument("name", help=", ".join(NAMES))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    try:
        train(chosen.name, chosen.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


extras.check()

if __name__ == "__main__":
    sys.exit(main())
