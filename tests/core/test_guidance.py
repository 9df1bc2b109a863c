"""Laws of guidance, of fields and of denoisers, and of networks with dropped conditions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowmatch_core.discrete import (
    Logits,
    MaskSource,
    MixturePath,
    Probabilities,
    TokenFlow,
    UniformSource,
    guided_tokens,
    solve_ctmc,
)
from flowmatch_core.divergence import divergence
from flowmatch_core.field import Field, Time, VelocityField, has_closed_form_divergence
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.guidance import GuidanceScale, drop_condition, guided
from flowmatch_core.networks import ConvUNetField, EncodedField, FiLMField, LabelEmbedding, MLPField, UNetMLPField
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import CondOT
from flowmatch_core.solvers import SolverError, solve
from tests.support.checks import BOUND, close, z_scores
from tests.support.random import generator, randn, tensor

MEANS = tensor([0.2, -0.4], [1.5, 1.0])  # without and with the condition


def normal(mean: Tensor) -> GaussianMixture:
    return GaussianMixture(tensor(1.0), mean[None], tensor([[0.4, 0.1], [0.1, 0.2]]))


def gaussian_field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """N(m, C), with a mean that depends on whether there is a condition."""
    return normal(MEANS[0 if cond is None else 1]).velocity(t, x, CondOT())


def network(seed: int = 0) -> Field:
    field = FiLMField(2, (8, 8), cond_dim=3, generator=generator(seed)).double()
    for parameter in field.parameters():
        parameter.data *= 3
    return field


def inputs(rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linspace(0, 1, rows, dtype=torch.float64), randn(rows, 2), randn(rows, 3, seed=1)


NULL = tensor(0.5, -1.0, 2.0)
GUIDED: dict[str, Callable[[GuidanceScale], Field]] = {
    "classifier-free": lambda scale: guided(network(), scale, null=NULL),
    "autoguidance": lambda scale: guided(network(), scale, weak=network(1)),
}
WEAK: dict[str, VelocityField] = {
    "classifier-free": lambda t, x, cond: network()(t, x, NULL.expand(len(x), -1)),
    "autoguidance": network(1),
}
both = pytest.mark.parametrize("name", GUIDED)


# --- fields -----------------------------------------------------------------------------------------------------------


@both
def test_scale_is_the_place_on_the_line_through_both_velocities(name: str) -> None:
    t, x, cond = inputs()
    strong, weak = network()(t, x, cond), WEAK[name](t, x, cond)
    assert (strong - weak).abs().max() > 0.1
    assert torch.equal(GUIDED[name](1.0)(t, x, cond), strong)
    assert torch.equal(GUIDED[name](0.0)(t, x, cond), weak)
    for scale in (-0.5, 0.5, 2.0, 7.0):
        close(GUIDED[name](scale)(t, x, cond), weak + scale * (strong - weak))


@both
def test_divergence_is_in_closed_form_and_that_of_differentiation(name: str) -> None:
    t, x, cond = inputs()
    for scale in (3.0, 1.0, lambda t: 1 + t):
        field = GUIDED[name](scale)
        assert has_closed_form_divergence(field) and field.cond_shape == (3,)
        for times in (t, 0.3):
            expected = divergence(field, times, x, cond, "exact")
            assert expected[1].abs().max() > 0.1
            for ready in (field, field.prepared()):
                for found, wanted in zip(divergence(ready, times, x, cond), expected, strict=True):
                    close(found, wanted)
        close(field.at_condition(cond)(t, x, cond), field(t, x, cond))
    assert not has_closed_form_divergence(guided(network(), weak=lambda t, x, cond: x))


def test_a_guided_normal_law_is_the_normal_law_of_the_guided_mean() -> None:
    """Of two normal laws with one covariance: the velocities differ by a function of time times the mean."""
    cond, n = torch.ones(5000, 1, dtype=torch.float64), 5000
    for scale in (0.0, 1.0, 2.5):
        field = guided(gaussian_field, scale)
        truth = normal(MEANS[0] + scale * (MEANS[1] - MEANS[0]))
        x = solve(field, randn(n, 2), cond=cond, solver="rk4", steps=16).x
        assert (z_scores(x, truth.mean).abs() < BOUND).all()
        flow = ContinuousFlow(field, (2,), solver="rk4", steps=50)
        with torch.no_grad():
            close(flow.log_prob(x[:9], cond[:9]), truth.log_prob(x[:9]), 1e-5)
        per_row = solve(field, randn(5, 2), cond=cond[:5], solver="dopri5_per_sample", rtol=1e-8, atol=1e-8).x
        close(per_row, solve(field, randn(5, 2), cond=cond[:5], solver="rk4", steps=100).x, 1e-6)


def test_a_schedule_has_a_scale_for_each_time_and_row() -> None:
    t, x, cond = inputs()
    ramp = guided(network(), lambda t: 1 + 2 * t, null=NULL)
    part = guided(network(), 4.0, null=NULL, interval=(0.25, 0.6))
    for i, time in enumerate(t.tolist()):
        row = slice(i, i + 1)
        close(ramp(t, x, cond)[row], guided(network(), 1 + 2 * time, null=NULL)(time, x[row], cond[row]))
        expected = guided(network(), 4.0 if 0.25 <= time <= 0.6 else 1.0, null=NULL)(time, x[row], cond[row])
        close(part(t, x, cond)[row], expected)
        close(part(time, x[row], cond[row]), expected)


def test_outside_its_interval_guidance_costs_nothing() -> None:
    seen: list[bool] = []

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.append(cond is None)
        return x

    part, x = guided(field, interval=(0.2, 0.5)), torch.ones(1, 1)
    for t, calls in ((0.1, [False]), (0.3, [False, True]), (0.9, [False])):
        seen.clear()
        part(t, x, x)
        assert seen == calls


def test_a_null_condition_has_the_shape_of_one() -> None:
    """A vector, a label and a mapping of both, for fields of all three kinds."""

    def by_vector(t: Time, x: Tensor, cond: Tensor) -> Tensor:
        return x + cond.sum(1, keepdim=True)

    def by_label(t: Time, x: Tensor, cond: Tensor) -> Tensor:
        return x + cond[:, None]

    def by_name(t: Time, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return by_vector(t, x, cond["vector"]) + cond["label"][:, None]

    x, label, vector = randn(4, 1), torch.arange(4), randn(4, 2)
    null, zero = torch.tensor(-1), torch.zeros(2, dtype=torch.float64)
    close(guided(by_label, 3.0, null=null)(0.5, x, label), x - 1 + 3 * (label[:, None] + 1))
    close(guided(by_vector, 3.0, null=zero)(0.5, x, vector), x + 3 * vector.sum(1, keepdim=True))
    named = guided(by_name, 3.0, null={"vector": zero, "label": null})
    total = vector.sum(1, keepdim=True) + label[:, None]
    close(named(0.5, x, {"vector": vector, "label": label}), x - 1 + 3 * (total + 1))


def test_bad_guidance_is_named() -> None:
    for make in (lambda **k: guided(network(), **k), lambda **k: guided_tokens(token_denoiser, **k)):
        with pytest.raises(ValueError, match=r"scale is nan, but should be finite"):
            make(scale=math.nan)
        with pytest.raises(ValueError, match=r"interval is \(0\.5, 0\.2\), but should hold two times"):
            make(interval=(0.5, 0.2))
        with pytest.raises(ValueError, match="null and weak are both given"):
            make(null=NULL, weak=network(1))
    with pytest.raises(ValueError, match=r"field takes the arguments \(t, x\)"):
        guided(lambda t, x: x)(0.5, torch.ones(1, 1), None)  # type: ignore[arg-type, misc]


# --- dropped conditions -----------------------------------------------------------------------------------------------


def test_rows_are_dropped_with_their_probability() -> None:
    n = 20_000
    cond = {"label": torch.arange(n), "image": randn(n, 1, 2, 2)}
    dropped = drop_condition(cond, 0.3, generator=generator())
    gone = dropped["label"] == -1
    assert torch.equal(dropped["image"].isnan().flatten(1).all(1), gone)  # together
    assert torch.equal(dropped["label"][~gone], cond["label"][~gone])
    assert torch.equal(dropped["image"][~gone], cond["image"][~gone])
    assert abs(z_scores(gone.double(), 0.3)) < BOUND
    assert torch.equal(drop_condition(cond["label"], 0.3, generator=generator()), dropped["label"])
    assert torch.equal(drop_condition(cond["label"], 0.0), cond["label"])
    with pytest.raises(ValueError, match=r"probability is 1\.5, but should be from 0 to 1\."):
        drop_condition(cond, 1.5)


class Picture(nn.Module):
    """An encoder of a user: images to vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).requires_grad_(True)

    def forward(self, image: Tensor) -> Tensor:
        assert not image.isnan().any()  # dropped rows do not reach it
        out: Tensor = self.layer(image.flatten(1))
        return out


def encoded(kind: str) -> tuple[EncodedField, Tensor]:
    g = generator()
    mlp = MLPField(2, (8, 8), cond_dim=3, generator=g)
    if kind == "label":
        field, cond = EncodedField(mlp, LabelEmbedding(4, 3, generator=g)), torch.tensor([0, 3, 1, 2, 3])
    elif kind == "vector":
        field, cond = EncodedField(mlp, None), randn(5, 3)
    else:
        field, cond = EncodedField(mlp, Picture(), cond_shape=(1, 2, 2)), randn(5, 1, 2, 2)
    field.null.data.normal_(generator=g)
    return field.double(), cond


kinds = pytest.mark.parametrize("kind", ["label", "vector", "image"])


@kinds
def test_a_dropped_row_is_the_null_row_and_no_other_changes(kind: str) -> None:
    field, cond = encoded(kind)
    t, x, _ = inputs()
    mixed = cond.clone()
    mixed[[1, 4]] = -1 if kind == "label" else math.nan
    kept, nothing, some = field(t, x, cond), field(t, x, None), field(t, x, mixed)
    assert (kept - nothing).abs().min(1).values.max() > 1e-3
    expected = kept.clone()
    expected[[1, 4]] = nothing[[1, 4]]
    close(some, expected)
    close(nothing, field.network(t, x, field.null.expand(5, -1)))
    some.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in field.parameters())


@kinds
def test_the_abilities_of_the_network_remain(kind: str) -> None:
    field, cond = encoded(kind)
    assert field.cond_shape == {"label": (), "vector": (3,), "image": (1, 2, 2)}[kind]
    t, x, _ = inputs()
    cond = drop_condition(cond, 0.5, generator=generator(1))
    assert has_closed_form_divergence(field)
    expected = divergence(field, t, x, cond, "exact")
    for ready in (field, field.prepared()):
        for found, wanted in zip(divergence(ready, t, x, cond), expected, strict=True):
            close(found, wanted)
    close(field.at_condition(cond)(t, x, cond), field(t, x, cond))
    times = [t, t / 2]
    for time, there in zip(times, field.at_times(times, x), strict=True):
        close(there(time, x, cond), field(time, x, cond))
    assert set(dict(field.prepared().named_parameters())) >= {"null"}


def test_a_mapping_of_conditions_is_encoded_and_dropped_as_one() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label = LabelEmbedding(4, 2, generator=generator())

        def forward(self, cond: dict[str, Tensor]) -> Tensor:
            return torch.cat([self.label(cond["label"]), cond["size"]], 1)

    shape = {"label": (), "size": (1,)}
    field = EncodedField(MLPField(2, (8,), cond_dim=3, generator=generator()), Both(), shape).double()
    t, x, _ = inputs()
    cond = {"label": torch.tensor([0, 1, 2, 3, 0]), "size": randn(5, 1)}
    some = drop_condition(cond, 0.5, generator=generator(2))
    gone = some["label"] == -1
    assert 0 < gone.sum() < 5
    close(field(t, x, some), torch.where(gone[:, None], field(t, x, None), field(t, x, cond)))
    close(field.at_condition(some)(t, x, some), field(t, x, some))
    with pytest.raises(ValueError, match="labels holds -1"):  # a row is dropped where all of its parts are
        field(t, x, {**some, "size": cond["size"]})


def test_an_embedding_is_the_table_of_its_labels() -> None:
    state = torch.get_rng_state()
    table = LabelEmbedding(3, 2, generator=generator(7))
    assert torch.equal(state, torch.get_rng_state())
    labels = torch.tensor([2, 0, 2])
    assert torch.equal(table(labels), table.weight[[2, 0, 2]])
    close(table.weight.detach(), torch.randn(3, 2, generator=generator(7)))
    with pytest.raises(ValueError, match=r"labels holds 3, but should hold numbers from 0 to 2\."):
        table(torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"labels holds -2, but should hold numbers from 0 to 2\."):
        table(torch.tensor([1, -2]))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\) and dtype torch.float32, but should have shape"):
        table(torch.zeros(2))
    with pytest.raises(ValueError, match="network has conditions of shape None, but should have those of vectors"):
        EncodedField(MLPField(2), None)


def test_every_library_network_declares_its_conditions() -> None:
    for field in (MLPField(2, cond_dim=3), FiLMField(2, cond_dim=3), UNetMLPField(2, (8,), cond_dim=3)):
        assert field.cond_shape == (3,) and field.prepared().cond_shape == (3,)
    assert ConvUNetField(1, cond_dim=3).cond_shape == (3,) and MLPField(2).cond_shape is None


def test_one_network_trained_with_dropped_labels_serves_both_velocities() -> None:
    """N(-1, 1) and N(1, 1): without a label their mixture, and guidance moves the mean on."""
    g = generator()
    field = EncodedField(MLPField(1, (32, 32), cond_dim=4, generator=g), LabelEmbedding(2, 4, generator=g))
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    for _ in range(300):
        label = torch.randint(2, (256,), generator=g)
        x1 = 2.0 * label[:, None] - 1 + torch.randn(256, 1, generator=g)
        optimizer.zero_grad()
        cfm_loss(field, CondOT(), x1, cond=drop_condition(label, 0.2, generator=g), generator=g).backward()
        optimizer.step()
    x0 = torch.randn(4000, 1, generator=g)
    with torch.no_grad():
        ends = [solve(field, x0, cond=torch.full((4000,), label)).x for label in (0, 1)]
        mixture = solve(field, x0, cond=None).x
        means = [solve(guided(field, w), x0, cond=torch.ones(4000, dtype=torch.long)).x.mean() for w in (0, 1, 2, 3)]
    assert [float(end.mean()) for end in ends] == pytest.approx([-1, 1], abs=0.3)
    assert [float(mixture.mean()), float(mixture.std())] == pytest.approx([0, 2**0.5], abs=0.2)
    assert all(float(after - before) > 0.3 for before, after in itertools.pairwise(means))


# --- tokens -----------------------------------------------------------------------------------------------------------

TOKENS = tensor([0.5, 0.3, 0.2], [0.2, 0.2, 0.6])  # without and with the condition


def token_denoiser(t: Time, x: Tensor, cond: Tensor | None = None) -> Probabilities:
    return Probabilities(TOKENS[0 if cond is None else 1].expand(*x.shape, 3))


def tilted(scale: float) -> Tensor:
    weights = TOKENS[0] ** (1 - scale) * TOKENS[1] ** scale
    return weights / weights.sum()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_a_guided_denoiser_is_the_normalised_product(scale: float) -> None:
    x, cond = torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 1)
    logits = guided_tokens(lambda t, x, cond: Logits(5 + token_denoiser(t, x, cond).values.log()), scale)
    for denoiser in (guided_tokens(token_denoiser, scale), logits):
        close(denoiser(0.5, x, cond).probabilities().values, tilted(scale).expand(4, 2, 3))
    weak = guided_tokens(lambda t, x, cond: Probabilities(TOKENS[1].expand(*x.shape, 3)), scale, weak=uniform)
    product = TOKENS[1] ** scale
    close(weak(0.5, x, cond).probabilities().values, (product / product.sum()).expand(4, 2, 3))


def uniform(t: Time, x: Tensor, cond: Tensor | None = None) -> Logits:
    return Logits(torch.zeros(*x.shape, 3, dtype=torch.float64))


def test_a_guided_token_has_the_tilted_law_and_its_bound_is_its_log_probability() -> None:
    """Of one position that is masked first; the answer of the denoiser does not depend on the time."""
    n, path = 50_000, MixturePath(MaskSource(3))
    denoiser, cond = guided_tokens(token_denoiser, 2.0), torch.ones(n, 1)
    x0 = path.source.sample((n, 1), generator())
    x = solve_ctmc(denoiser, x0, path=path, steps=4, cond=cond, generator=generator(1)).x
    for token in range(3):
        assert abs(z_scores((x[:, 0] == token).double(), tilted(2.0)[token])) < BOUND
    bound = TokenFlow(denoiser, path, (1,)).elbo(
        torch.arange(3)[:, None], cond[:3], samples=4000, generator=generator()
    )
    assert ((bound.log_prob - tilted(2.0).log()).abs() < BOUND * bound.standard_error).all()


def test_a_schedule_of_tokens_has_a_scale_for_each_row() -> None:
    t, x, cond = tensor(0.0, 0.5, 1.0), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 1)
    ramp = guided_tokens(token_denoiser, lambda t: 2 * t)(t, x, cond).probabilities().values
    part = guided_tokens(token_denoiser, 3.0, interval=(0.4, 0.6))(t, x, cond).probabilities().values
    for i in range(3):
        close(ramp[i], tilted(float(i)).expand(2, 3))
        close(part[i], tilted(3.0 if i == 1 else 1.0).expand(2, 3))


def test_an_impossible_token_stays_impossible_and_nan_stays_an_error() -> None:
    x, cond = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    given, weak = tensor(0.0, 0.4, 0.6, 0.0), tensor(0.5, 0.5, 0.0, 0.0)

    def denoiser(t: Time, x: Tensor, cond: Tensor | None = None) -> Probabilities:
        return Probabilities((weak if cond is None else given).expand(*x.shape, 4))

    expected = {0.0: weak, 0.5: tensor(0.0, 1.0, 0.0, 0.0), 1.0: given, 2.0: tensor(0.0, 0.0, 1.0, 0.0)}
    for scale, law in expected.items():
        for given_scale in (scale, lambda t, scale=scale: scale + 0 * t):
            found = guided_tokens(denoiser, given_scale)(tensor(0.5), x, cond)
            close(found.probabilities().values[0, 0], law)
    path = MixturePath(UniformSource(3))
    broken = guided_tokens(lambda t, x, cond: Logits(torch.full((*x.shape, 3), math.nan)), 2.0)
    with pytest.raises(SolverError, match="not distributions"):
        solve_ctmc(broken, x, path=path, steps=1, cond=cond)


def test_guided_denoisers_hold_the_parameters_of_theirs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3))

        def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Logits:
            return Logits(self.table.expand(*x.shape, 3))

    flow = TokenFlow(guided_tokens(Net(), weak=Net()), MixturePath(MaskSource(3)), (2,))
    assert len(list(flow.parameters())) == 2
