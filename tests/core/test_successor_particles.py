"""Laws of the persistent particles and of the error of a bootstrap's points."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Time
from flowmatch_core.paths import VE, CondOT, Cosine
from flowmatch_core.solvers import solve
from flowmatch_core.successor import Particles, Transitions, path_error
from flowmatch_core.times import LogitNormalTime, TimeLaw, UniformTime
from tests.support.checks import BOUND, z_scores
from tests.support.fields import zero
from tests.support.processes import Probe, scalar_process, transitions
from tests.support.random import generator, randn, tensor

GAMMA = 0.8


class Recorder:
    """A field that keeps what the bootstrap term asks."""

    def __init__(self) -> None:
        self.t, self.x, self.cond = torch.empty(0), torch.empty(0), torch.empty(0)

    def __call__(self, t: Tensor, x: Tensor, cond: Tensor, /) -> Tensor:
        self.t, self.x, self.cond = (part.chunk(2)[1] for part in (t, x, cond))
        return torch.zeros_like(x)


def test_oracle_is_stationary_at_the_particles() -> None:
    """With the exact field as target, and once all slots are under way: E[(v* - target) phi] = 0."""
    mdp, slots = scalar_process(), 3_000
    oracle, g = mdp.velocity_field(GAMMA, tolerance=1e-3), generator()
    particles = Particles(slots, 1, 2, steps=12).double()
    for call in range(27):
        batch = transitions(mdp, slots, seed=3 * call)
        field = Probe(oracle, slots) if call > 24 else zero
        loss = particles.td2_cfm_loss(field, oracle, batch, gamma=GAMMA, generator=g)
    assert isinstance(field, Probe)
    assert z_scores(field.gradients(loss.total), 0.0).abs().max() < BOUND


@pytest.mark.parametrize("law", [UniformTime(), LogitNormalTime()], ids=["uniform", "logit normal"])
def test_times_of_the_particles_have_the_law_of_the_direct_term(law: TimeLaw) -> None:
    """At one call, over the slots under way; at t=0, where no field is trained, there is none of them."""
    slots, steps, g = 6_000, 5, generator()
    particles, batch, field = (
        Particles(slots, 1, 2, steps, time=law).double(),
        transitions(scalar_process(), slots),
        Recorder(),
    )
    for _ in range(2 * steps + 3):
        live = particles.phase >= 1
        particles.td2_cfm_loss(field, zero, batch, gamma=GAMMA, generator=g)  # type: ignore[arg-type]
    t = field.t[live]
    assert abs(float(live.double().mean()) - steps / (steps + 1)) < 2 / slots
    assert float(t.min()) > 0
    uniform = law == UniformTime()
    distribution = stats.uniform.cdf if uniform else lambda t: stats.norm.cdf(torch.logit(torch.as_tensor(t)))
    assert stats.kstest(t.numpy(), distribution).pvalue > 1e-3
    direct = law(slots, generator=g, dtype=torch.float64)
    assert stats.ks_2samp(t.numpy(), direct.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("law", "ratio"), [(UniformTime(), 3.0), (LogitNormalTime(), 1.7)], ids=["uniform", "logit normal"]
)
def test_particles_move_along_the_flow(law: TimeLaw, ratio: float) -> None:
    """The distance to the exact point at each particle's own time falls by four when the steps double.

    By less with logit-normal times, whose first step from t=0 is longer than the others.
    """

    def swirl(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        t = as_time(t, x).expand(len(x))[:, None]
        return 3 * torch.stack([-x[:, 1], x[:, 0]], -1) * (1 + t) + t.sin()

    def exact(x0: Tensor, t: Tensor) -> Tensor:
        return solve(swirl, x0, t1=t, solver="rk4", steps=60).x

    errors: list[float] = []
    s = randn(200, 2, seed=1)
    batch = Transitions(s, None, s, None)
    for steps in (20, 40, 80):
        particles, field, g = Particles(200, 2, 2, steps, time=law).double(), Recorder(), generator()
        particles.phase.zero_()
        start = s
        for _ in range(steps + 1):
            fresh = int(particles.phase[0]) == 0
            particles.td2_cfm_loss(field, swirl, batch, gamma=GAMMA, generator=g)  # type: ignore[arg-type]
            start = field.x if fresh else start
        errors.append(float((field.x - exact(start, field.t)).norm(dim=1).mean()))
    assert errors[0] > ratio * errors[1] > ratio**2 * errors[2]
    assert errors[2] < 0.06


def test_the_target_is_asked_once_a_call_at_the_particles_own_next_state() -> None:
    """The condition of a slot stays that of its transition until its path ends, then it is the batch's."""
    calls = []

    def target(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        assert cond is not None
        calls.append(cond)
        return torch.zeros_like(x)

    slots, steps, g = 7, 2, generator()
    particles, field = Particles(slots, 1, 2, steps).double(), Recorder()
    batches = [transitions(scalar_process(), slots, seed=10 * i) for i in range(10)]
    for batch in batches:
        before, phase = particles.next_cond.clone(), particles.phase.clone()
        particles.td2_cfm_loss(field, target, batch, gamma=GAMMA, generator=g)  # type: ignore[arg-type]
        new = (phase <= 0)[:, None]
        assert torch.equal(calls[-1], torch.where(new, batch.next_condition, before))
        assert torch.equal(field.cond, particles.cond)
        for row in range(slots):
            owner = [b for b in batches if torch.equal(b.next_condition[row], particles.next_cond[row])]
            assert len(owner) == 1
            assert torch.equal(owner[0].condition[row], particles.cond[row])
    assert len(calls) == len(batches)


def test_only_slots_under_way_count() -> None:
    """Before any slot has moved, the bootstrap term is nil; later it is the mean over those that have."""
    slots, g = 8, generator()
    particles, batch = Particles(slots, 1, 2, steps=3).double(), transitions(scalar_process(), 8)

    def two(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        return torch.full_like(x, 2.0)

    losses = [particles.td2_cfm_loss(zero, two, batch, gamma=GAMMA, generator=g) for _ in range(4)]
    assert [float(loss.bootstrap) for loss in losses] == [0, 4, 4, 4]
    for loss in losses:
        torch.testing.assert_close(loss.total, (1 - GAMMA) * loss.direct + GAMMA * loss.bootstrap)


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=str)
def test_particles_of_terminal_states_go_to_them(path: CondOT | Cosine) -> None:
    """A straight path is exact, x_t = (1 - t) x0 + t S'; a curved one nears it; the target is not heeded."""
    s, g = randn(40, 1, seed=1), generator()
    batch = Transitions(s, None, s + 1, None, terminal=torch.ones(40, dtype=torch.bool))
    particles, field = Particles(40, 1, 1, steps=40, path=path).double(), Recorder()
    particles.phase.zero_()
    particles.td2_cfm_loss(field, lambda t, x, cond: x + 100, batch, gamma=GAMMA, generator=g)  # type: ignore[arg-type]
    start = field.x
    for _ in range(20):
        particles.td2_cfm_loss(field, lambda t, x, cond: x + 100, batch, gamma=GAMMA, generator=g)  # type: ignore[arg-type]
    expected = path.sample(start, s + 1, field.t).x_t
    torch.testing.assert_close(field.x, expected, atol=1e-12 if path == CondOT() else 5e-3, rtol=0)


def test_a_restored_state_goes_on_alike() -> None:
    slots, g = 8, generator()
    first, batch = Particles(slots, 1, 2, steps=3), transitions(scalar_process(), slots)
    batch = Transitions(*(part.float() for part in (batch.state, batch.action, batch.next_state, batch.next_action)))  # type: ignore[union-attr]
    oracle = scalar_process().to("cpu", torch.float32).velocity_field(GAMMA)
    for _ in range(5):
        first.td2_cfm_loss(zero, oracle, batch, gamma=GAMMA, generator=g)
    second, state = Particles(slots, 1, 2, steps=3), g.get_state()
    second.load_state_dict(first.state_dict())
    runs = []
    for particles in (first, second):
        g.set_state(state)
        runs.append([particles.td2_cfm_loss(zero, oracle, batch, gamma=GAMMA, generator=g) for _ in range(6)])
    assert runs[0] == runs[1]


# The error of short solves


def test_path_error_is_that_of_a_known_flow() -> None:
    """dx/dt = x: K midpoint steps grow by (1 + h + h^2/2)^K in place of e, whatever the noise."""
    x0 = randn(100, 3, seed=1)
    for steps in (1, 2, 5):
        h = 1 / steps
        grown, reference = (1 + h + h**2 / 2) ** steps, (1 + 1 / 64 + 1 / 8192) ** 64
        spread = (x0 - x0.mean(0)).square().sum() / x0.square().sum()
        expected = abs(grown - reference) / reference / math.sqrt(float(spread))
        error = path_error(lambda t, x, cond: x, x0, steps=steps)
        assert float(error) == pytest.approx(expected, rel=1e-9)


def test_path_error_is_smaller_to_the_times_of_the_regression() -> None:
    """To t ~ U[0, 1] it is several times smaller than to 1, and vanishes with the steps: td-speed 4."""
    oracle, cond = scalar_process().velocity_field(0.95), torch.cat([randn(200, 1, seed=1), randn(200, 1, seed=2)], 1)
    x0, t = randn(200, 1, seed=3), torch.rand(200, generator=generator(), dtype=torch.float64)
    errors = [float(path_error(oracle, x0, cond, t, steps=steps)) for steps in (2, 5, 64)]
    assert errors[0] > errors[1] > errors[2] == 0
    assert float(path_error(oracle, x0, cond, steps=5)) > errors[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Particles(0, 1, 1), "slots was 0, but should be at least 1"),
        (lambda: Particles(2, 1, 1, steps=0), "steps was 0, but should be at least 1"),
        (lambda: Particles(2, 1, 1, path=VE()), "path was VE"),
        (
            lambda: Particles(3, 1, 2).td2_cfm_loss(zero, zero, transitions(scalar_process(), 4), gamma=0.9),
            r"batch.condition has shape \(4, 2\), but should be of shape \(3, 2\)",
        ),
        (
            lambda: Particles(4, 1, 2).td2_cfm_loss(
                zero, lambda t, x, c: x[:2], transitions(scalar_process(), 4), gamma=0.9
            ),
            r"the result of target has shape \(2, 1\), but should be of shape \(4, 1\)",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_particles_of_a_discount_of_several_steps_are_weighed_by_it() -> None:
    batch = transitions(scalar_process(), 4)
    batch = Transitions(
        batch.state, batch.action, batch.next_state, batch.next_action, direct_state=tensor([9.0]).expand(4, 1), steps=3
    )
    particles = Particles(4, 1, 2).double()
    loss = particles.td2_cfm_loss(zero, zero, batch, gamma=GAMMA, generator=generator())
    torch.testing.assert_close(loss.total, (1 - GAMMA**3) * loss.direct)
    assert float(loss.direct) > 25
