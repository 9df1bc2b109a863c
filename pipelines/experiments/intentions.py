"""Learn the successor measure of a walk whose drift has a hidden sign, with and without a latent intention."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from pipelines.base import plugins
from pipelines.experiments import Finding, Outcome
from pipelines.experiments._training import minimise

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from flowmatch_core.field import Time, VelocityField
    from flowmatch_core.networks import MLPField
    from flowmatch_core.oracles import TwoDrifts
    from flowmatch_core.successor import IntentionEncoder, Transitions

SIGNS = (1.0, -1.0)
MODELS = {"without": "without z", "direct": "z of the direct term", "decoder": "z of the decoder"}
TRUTH = "truth"
REACH, BINS = 4.0, 50  # of the figure, from -REACH to REACH in units of 1 / (1 - gamma) drifts


class Settings(plugins.Settings):
    """The walk, and the size and training of its models. The unit of length is the drift of a step."""

    gamma: float = Field(default=0.95, ge=0, lt=1, description="discount")
    noise: float = Field(default=0.5, gt=0, description="standard deviation of the noise of a step")
    latent: int = Field(default=1, ge=1, le=100, description="dimensions of the intention z")
    beta: float = Field(default=0.01, ge=0, description="weight of the divergence of z from its prior")
    hidden: tuple[int, ...] = Field(default=(64, 64), min_length=1, description="widths of all networks")
    steps: int = Field(default=2_000, ge=1, le=1_000_000, description="gradient steps")
    batch: int = Field(default=256, ge=2, le=100_000, description="transitions per gradient step")
    lr: float = Field(default=3e-3, gt=0, description="learning rate of Adam at the start; a cosine to zero")
    ema_step: float = Field(
        default=0.1, gt=0, le=1, description="step of the target; times (1 - gamma) steps it should be at least 5"
    )
    ode_steps: int = Field(default=3, ge=1, le=1_000, description="midpoint steps of the bootstrap")
    samples: int = Field(default=1_000, ge=2, le=10_000, description="samples of each law")
    repeats: int = Field(default=3, ge=2, le=100, description="repetitions with new data and new networks")


class Trained(NamedTuple):
    """A trained model: its field of (s) or (s, z), and the encoder of z."""

    field: VelocityField
    encoder: IntentionEncoder | None


def run(settings: Settings, *, generator: torch.Generator) -> Outcome:
    r"""Train the models on episodes of two steps, and compare their samples with the truth given the sign.

    An episode goes from 0 to $S'$ and $S''$ with one sign. The transition is the first step, the evidence of the
    intention the second, and a decoder predicts the first. For samples, z comes from the evidence of new episodes.
    """
    import pandas as pd
    import torch

    from flowmatch_core.metrics import emd
    from flowmatch_core.oracles import TwoDrifts

    unit = 1 / (1 - settings.gamma)  # in which the mean given the sign is 1
    walk = TwoDrifts(torch.full((1,), 1 / unit, device=generator.device), settings.noise / unit)
    scores, laws = [], []
    for repeat in range(settings.repeats):
        truth, again = ({sign: unit * _true(walk, sign, settings, generator) for sign in SIGNS} for _ in range(2))
        found = {TRUTH: again}
        score: dict[str, dict[str, float | None]] = {TRUTH: {}}
        for name in MODELS:
            model = _train(name, walk, settings, generator)
            found[name] = {sign: unit * _sample(model, walk, sign, settings, generator) for sign in SIGNS}
            score[name] = {"probe": _probe(model.encoder, walk, settings, generator)}
        for name, x in found.items():
            distance = sum(float(emd(x[sign], truth[sign])) for sign in SIGNS) / len(SIGNS)
            variance = float(torch.cat(list(x.values())).square().mean())  # about the start, 0
            scores.append({"model": name, "repeat": repeat, "emd": distance, "variance": variance, **score[name]})
            if repeat == 0:
                laws += [_histogram(x[sign], unit).assign(model=name, sign=sign) for sign in SIGNS]
    table = pd.DataFrame(scores)
    return Outcome(
        title="Intentions of a walk",
        table=pd.concat([table, *laws], ignore_index=True),
        findings=_findings(table, walk, unit, settings),
        notes=(
            f"A walk that drifts by 1 or by -1 a step for a whole episode, noise {settings.noise:g}, discount "
            f"{settings.gamma:g}; z has {settings.latent} dimensions. {settings.steps} steps of {settings.batch} "
            f"transitions, {settings.repeats} repetitions, {settings.samples} samples given each sign."
        ),
        caption=(
            "Successor measures of the walk from 0: of the truth given each sign, and of the models given the evidence "
            "of episodes of that sign. Without z a model is that of a walk that draws its sign again at every step."
        ),
    )


def figure(table: pd.DataFrame) -> Figure:
    """Draw the densities, one panel per sign."""
    from matplotlib import pyplot as plt

    from pipelines.reporting.figures import style

    laws = table[table["density"].notna()]
    shown, axes = plt.subplots(1, 2, figsize=(8.4, 2.9), sharey=True, layout="constrained")
    colours = {TRUTH: style.TRUTH, "without": "C1", "direct": "C2", "decoder": "C0"}
    for axis, sign in zip(axes, (-1.0, 1.0), strict=True):
        for model, law in laws[laws["sign"] == sign].groupby("model", sort=False):
            style_of = {"color": colours[str(model)], "linestyle": ":" if model == TRUTH else "-"}
            axis.plot(law["x"], law["density"], drawstyle="steps-mid", label=MODELS.get(str(model), model), **style_of)
        axis.set(title=f"drift {sign:+g}", xlabel="state", yscale="log")
    axes[0].set_ylabel("density")
    axes[1].legend(frameon=False, fontsize=8)
    return shown


def _findings(table: pd.DataFrame, walk: TwoDrifts, unit: float, settings: Settings) -> tuple[Finding, ...]:
    import torch

    from flowmatch_core.intervals import ONE_SIDED, ratio, t_interval

    start = torch.zeros(1, 1, device=walk.drift.device)
    lasting = float(walk.successor(start, None, settings.gamma).second_moment) * unit**2
    mixed = float(walk.mixed(start, settings.gamma).second_moment) * unit**2

    def values(model: str, column: str) -> dict[int, float]:
        return dict(enumerate(table.loc[table["model"] == model, column].tolist()))

    def measured(
        name: str, sentence: str, model: str, column: str, low: float | None = None, high: float | None = None
    ) -> Finding:
        return Finding(name, sentence, t_interval(list(values(model, column).values()), ONE_SIDED), low, high)

    return (
        Finding(
            "gain",
            "EMD to the truth given the sign: z of the decoder / without z",
            ratio(values("decoder", "emd"), values("without", "emd"), ONE_SIDED),
            at_most=0.5,
        ),
        measured("probe_decoder", "Signs that a linear probe of z gets right: decoder", "decoder", "probe", 0.95),
        measured("probe_direct", "Signs that a linear probe of z gets right: direct term", "direct", "probe"),
        measured(
            "variance_without",
            f"Variance without z; {mixed:.4g} where the sign is drawn again at every step",
            "without",
            "variance",
            0.8 * mixed,
            1.2 * mixed,
        ),
        measured("variance_direct", "Variance with z of the direct term", "direct", "variance"),
        measured("variance_decoder", f"Variance with z of the decoder; truth: {lasting:.4g}", "decoder", "variance"),
        *(measured(f"emd_{name}", f"EMD to the truth: {title}", name, "emd") for name, title in MODELS.items()),
        measured("emd_floor", "EMD to the truth: true samples", TRUTH, "emd"),
    )


def _true(walk: TwoDrifts, sign: float, settings: Settings, generator: torch.Generator) -> Tensor:
    """Return samples of the truth from the start 0 given the sign."""
    start = walk.drift.new_zeros(1)
    return walk.successor(start, start + sign, settings.gamma).sample(settings.samples, generator=generator)


def _draw(walk: TwoDrifts, sign: Tensor, generator: torch.Generator) -> tuple[Transitions, Tensor, Tensor]:
    """Return first steps from 0 as transitions, and first and second steps in units of the drift."""
    from flowmatch_core.successor import Transitions

    start = sign.new_zeros(len(sign), 1)
    middle = walk.step(start, sign, generator=generator)
    end = walk.step(middle, sign, generator=generator)
    batch = Transitions(state=start, action=None, next_state=middle, next_action=None)
    return batch, middle / walk.drift, (end - middle) / walk.drift


def _train(name: str, walk: TwoDrifts, settings: Settings, generator: torch.Generator) -> Trained:
    """Return the average of the networks of a model, and its encoder."""
    import copy

    import torch

    from flowmatch_core.averaging import polyak_update
    from flowmatch_core.networks import MLPField
    from flowmatch_core.successor import IntentionDecoder, IntentionEncoder, intention_loss, td2_cfm_loss

    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    weights = torch.Generator().manual_seed(seed)
    latent = 0 if name == "without" else settings.latent
    network = MLPField(1, settings.hidden, latent, generator=weights).to(generator.device)
    average = copy.deepcopy(network).requires_grad_(False)
    field, target = _along(network), _along(average)
    encoder = IntentionEncoder(1, settings.latent, settings.hidden, weights).to(generator.device)
    decoder = IntentionDecoder(1 + settings.latent, 1, settings.hidden, weights).to(generator.device)
    learned, decoded = name != "without", name == "decoder"

    def loss() -> Tensor:
        batch, first, second = _draw(walk, walk.draw_sign(settings.batch, generator=generator), generator)
        if not learned:
            plain = td2_cfm_loss(
                field, target, batch, gamma=settings.gamma, steps=settings.ode_steps, generator=generator
            )
            return plain.total
        return intention_loss(
            field,
            target,
            batch,
            second,
            encoder,
            gamma=settings.gamma,
            beta=settings.beta,
            decoder=decoder if decoded else None,
            outcome=first if decoded else None,
            steps=settings.ode_steps,
            generator=generator,
        ).total

    used = [network, *[encoder] * learned, *[decoder] * decoded]
    optimizer = torch.optim.Adam([p for module in used for p in module.parameters()], settings.lr, fused=True)
    minimise(loss, optimizer, settings.steps, lambda: polyak_update(average, network, settings.ema_step))
    return Trained(target, encoder if learned else None)


def _along(network: MLPField) -> VelocityField:
    """Return the field v(t, x | s, z) = s + u(t, x - t s | z) of the network u.

    A walk moves from every state by the same law, so it is enough to learn that of x - s. On the straight path to s + y
    the point is t s + y_t.
    """
    import torch

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None  # a walk has a state
        state, z = cond[:, :1], cond[:, 1:]
        moved = x - torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1) * state
        velocity: Tensor = state + network(t, moved, z if z.shape[1] else None)
        return velocity

    return field


def _sample(model: Trained, walk: TwoDrifts, sign: float, settings: Settings, generator: torch.Generator) -> Tensor:
    """Return samples from the start 0, each given the evidence of an episode of the sign."""
    import torch

    from flowmatch_core.successor import GeometricHorizonModel

    signs = torch.full((settings.samples, 1), sign, device=generator.device)
    batch, _, second = _draw(walk, signs, generator)
    z = None
    with torch.no_grad():
        if model.encoder is not None:
            mean, log_scale = model.encoder(second)
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            z = mean + log_scale.exp() * noise
        horizon = GeometricHorizonModel(model.field, (1,), settings.gamma, steps=20)
        return horizon.sample(batch.state, z, 1, generator=generator)[0]


def _probe(
    encoder: IntentionEncoder | None, walk: TwoDrifts, settings: Settings, generator: torch.Generator
) -> float | None:
    """Return the share of signs that a linear regression on the means of z gets right in new episodes."""
    import torch

    if encoder is None:
        return None

    def episodes() -> tuple[Tensor, Tensor]:
        sign = walk.draw_sign(4 * settings.samples, generator=generator)
        with torch.no_grad():
            mean = encoder(_draw(walk, sign, generator)[2])[0]
        return torch.cat([mean, torch.ones_like(sign)], 1), sign

    (known, labels), (new, expected) = episodes(), episodes()
    solution = torch.linalg.lstsq(known, labels).solution
    return float(((new @ solution).sign() == expected).double().mean())


def _histogram(x: Tensor, unit: float) -> pd.DataFrame:
    """Return the shares of samples in bins, divided by the width of a bin."""
    import numpy as np
    import pandas as pd

    share, edges = np.histogram(x.cpu().numpy(), BINS, (-REACH * unit, REACH * unit))
    width = edges[1] - edges[0]
    return pd.DataFrame({"x": (edges[1:] + edges[:-1]) / 2, "density": share / (len(x) * width)})
