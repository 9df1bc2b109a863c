"""What is drawn from an environment's rollouts: windows and futures of the policy, with their laws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from flowmatch_core.successor import Transitions
from pipelines.base import files
from pipelines.base.errors import UserError
from pipelines.data.batches import Batches

EPISODES, LENGTH, END = 6, 8, 5  # even episodes end for good at step END
LOC, SCALE = torch.tensor([10.0, -10.0]), torch.tensor([2.0, 4.0])


def batches(folder: Path, ends: bool = False) -> Batches:
    """Rollouts whose states say where they stand: 100 episode + step, which a terminal state repeats."""
    episode, step = (a.ravel() for a in np.mgrid[:EPISODES, : LENGTH + 1])
    over = ends & (episode % 2 == 0) & (step >= END)
    place = 100.0 * episode + np.where(over, END, step)
    rollouts = pd.DataFrame({"episode": episode, "state_x": place, "state_y": -place, "action_u": place + 0.5})
    rollouts.assign(terminal=over).to_parquet(folder / "rollouts.parquet")
    now, soon = rollouts[step < LENGTH], rollouts[step > 0].add_prefix("next_").reset_index(drop=True)
    table = now.reset_index(drop=True).join(soon).assign(terminal=over[step > 0])
    table[~over[step < LENGTH]].to_parquet(folder / "transitions.parquet")  # nobody acts in a terminal state
    described = {"state_names": ["x", "y"], "action_names": ["u"], "loc": LOC.tolist(), "scale": SCALE.tolist()}
    described |= {"constants": {}, "action_loc": [0.0], "action_scale": [1.0]}
    files.write_json(folder / "provenance.json", described)
    return Batches(folder, torch.device("cpu"))


def place(state: Tensor) -> Tensor:
    """Where a standardised state stands."""
    raw = (state * SCALE + LOC).round(decimals=2)
    assert torch.equal(raw[:, 1], -raw[:, 0])
    return raw[:, 0].long()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows(batch: Transitions) -> set[tuple[float, ...]]:
    """The different rows of a batch."""
    assert batch.action is not None
    assert batch.next_action is not None
    over = torch.zeros(len(batch.state)) if batch.terminal is None else batch.terminal
    parts = [batch.state, batch.action, batch.next_state, batch.next_action, over[:, None]]
    return {tuple(row) for row in torch.cat(parts, 1).tolist()}


@pytest.mark.parametrize("steps", [2, 3, LENGTH])
@pytest.mark.parametrize("ends", [False, True])
def test_windows_are_consecutive_rows_of_one_episode(tmp_path: Path, steps: int, ends: bool) -> None:
    batch = batches(tmp_path, ends).returns(4_000, 0.9, steps)(generator())
    assert batch.steps == steps
    assert batch.direct_state is not None
    assert batch.action is not None
    assert batch.next_action is not None
    here, on_the_way, there = (place(s) for s in (batch.state, batch.direct_state, batch.next_state))
    assert torch.equal(batch.action[:, 0], here + 0.5)
    assert torch.equal(batch.next_action[:, 0], there + 0.5)
    mortal = torch.full_like(here, ends, dtype=torch.bool) & (here // 100 % 2 == 0)
    last = torch.where(mortal, END, LENGTH)
    assert torch.equal(there, here + torch.minimum(last - here % 100, torch.tensor(steps)))
    assert bool((on_the_way >= torch.minimum(here + 1, there)).all())
    assert bool((on_the_way <= there).all())
    over = mortal & (there % 100 == END)
    assert batch.terminal is None if not ends else torch.equal(batch.terminal, over)
    # A window may go beyond a terminal state, which repeats, and not beyond the end of time.
    before = {e: END if ends and e % 2 == 0 else LENGTH - steps + 1 for e in range(EPISODES)}
    assert set(here.tolist()) == {100 * e + s for e in range(EPISODES) for s in range(before[e])}


def test_the_state_on_the_way_is_geometric_within_the_window(tmp_path: Path) -> None:
    gamma, steps, n = 0.7, 4, 40_000
    batch = batches(tmp_path).returns(n, gamma, steps)(generator())
    assert batch.direct_state is not None
    found = torch.bincount(place(batch.direct_state) - place(batch.state), minlength=steps + 1)[1:] / n
    law = torch.tensor([gamma**k for k in range(steps)])
    law /= law.sum()
    assert bool(((found - law).abs() < 5 * (law * (1 - law) / n).sqrt()).all()), (found, law)


@pytest.mark.parametrize("ends", [False, True])
def test_windows_of_one_step_are_the_transitions(tmp_path: Path, ends: bool) -> None:
    made = batches(tmp_path, ends)
    one = made.returns(4_000, 0.9, 1)(generator())
    draw, seek = made.transitions(4_000, 1_000)
    seek(0)
    assert one.steps == 1
    assert one.direct_state is None
    assert rows(one) == rows(draw(generator()))


def test_a_window_longer_than_a_rollout_is_a_sentence(tmp_path: Path) -> None:
    made = batches(tmp_path)
    made.returns(2, 0.9, LENGTH)
    with pytest.raises(UserError, match=r"^params.yaml: returns is 9, but a rollout has 8 steps; expected no more\.$"):
        made.returns(2, 0.9, LENGTH + 1)


def test_futures_are_geometric_and_the_last_state_has_what_lies_beyond(tmp_path: Path) -> None:
    gamma, n = 0.8, 60_000
    batch, future = batches(tmp_path).futures(n, gamma)(generator())
    assert batch.action is not None
    here, there = place(batch.state), place(future)
    assert torch.equal(batch.action[:, 0], here + 0.5)
    assert torch.equal(here // 100, there // 100)
    step, wait = here % 100, there - here
    assert set(step.tolist()) == set(range((LENGTH + 1) // 2))
    for first in range((LENGTH + 1) // 2):
        left = LENGTH - first
        law = torch.tensor([(1 - gamma) * gamma**k for k in range(left - 1)] + [gamma ** (left - 1)])
        of_first = wait[step == first]
        found = torch.bincount(of_first, minlength=left + 1)[1:] / len(of_first)
        assert bool(((found - law).abs() < 5 * (law * (1 - law) / len(of_first)).sqrt()).all()), (first, found, law)


def test_a_discount_of_each_row_is_that_of_its_future_and_of_its_window(tmp_path: Path) -> None:
    """With gamma 0 it is the next state, with gamma near 1 the last one of the episode; windows end where they end."""
    made, n = batches(tmp_path), 2_000
    gamma = torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64).repeat(n // 2)
    batch, future = made.futures(n, 0.5)(generator(), gamma)
    here, there = place(batch.state), place(future)
    assert torch.equal(there, torch.where(gamma == 0, here + 1, here // 100 * 100 + LENGTH))
    window = made.returns(n, 0.5, 4)(generator(), gamma)
    assert window.direct_state is not None
    wait = place(window.direct_state) - place(window.state)
    assert set(wait[gamma == 0].tolist()) == {1} and set(wait[gamma > 0].tolist()) == {1, 2, 3, 4}
    assert torch.equal(place(window.next_state), place(window.state) + 4)


Drawn = Callable[[torch.Generator], object]


@pytest.mark.parametrize("draw", [lambda b: b.returns(8, 0.9, 3), lambda b: b.futures(8, 0.9)])
def test_a_draw_depends_on_its_generator_alone(tmp_path: Path, draw: Callable[[Batches], Drawn]) -> None:
    """So that a killed training goes on with the batches that it would have had."""

    def states(seed: int, seeded: int) -> Tensor:
        torch.manual_seed(seeded)
        drawn = draw(batches(tmp_path))(torch.Generator().manual_seed(seed))
        batch = drawn[0] if isinstance(drawn, tuple) else drawn
        assert isinstance(batch, Transitions)
        return batch.next_state

    assert torch.equal(states(0, 0), states(0, 1))
    assert not torch.equal(states(0, 0), states(1, 0))
