"""Learn a distribution of tokens with masked and uniform flows, and compare all its probabilities with the truth.

A sequence is two tokens of sixteen, so the distribution is a table of 256 numbers, and the error of few sampling steps
is known: two masked positions that are revealed in the same step are drawn independently of each other.

Run: python examples/tokens.py [--out PICTURE.png]
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from _output import MODEL, OTHER, TRUTH, picture_path, plt, report, save
from torch import Tensor, nn

import flowmatch_core as fm

VOCABULARY, LENGTH = 16, 2
STEPS, BATCH, LEARNING_RATE = 1200, 256, 5e-3
SAMPLES, SAMPLING_STEPS = 20_000, (1, 2, 4, 8, 16, 32)


def spiral_table() -> fm.TokenTable:
    """Return a table of probabilities that lie along a spiral: the two tokens depend on each other."""
    angle = torch.linspace(0.5, 3.4 * math.pi, 400)
    points = 7.5 + 0.68 * angle[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    grid = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    nearness = torch.exp(-torch.cdist(grid, points).square() / 0.5).sum(1)
    return fm.TokenTable((nearness + 0.01).reshape(VOCABULARY, VOCABULARY))


class Network(nn.Module):
    """A denoiser: logits of every token at every position, given all tokens and the time."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(states, 32)
        self.layers = nn.Sequential(
            nn.Linear(32 * LENGTH + 1, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, LENGTH * VOCABULARY),
        )

    def forward(self, t: fm.Time, x: Tensor, cond: Tensor | None = None) -> fm.Logits:
        time = torch.as_tensor(t, dtype=torch.float32).expand(len(x))[:, None]
        features = torch.cat([self.embedding(x).flatten(1), time], 1)
        return fm.Logits(self.layers(features).reshape(len(x), LENGTH, VOCABULARY))


def train(table: fm.TokenTable, path: fm.MixturePath, generator: torch.Generator) -> Network:
    """Predict the tokens of the data from tokens part of which are noise."""
    network = Network(path.source.states)
    for weights in network.parameters():  # drawn again, so that they come from the generator
        nn.init.normal_(weights, std=weights.shape[-1] ** -0.5 if weights.ndim > 1 else 0.0, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss = fm.cross_entropy_loss(network, path, table.sample((BATCH,), generator), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


def frequencies(tokens: Tensor) -> Tensor:
    """Return the table of relative frequencies of pairs of tokens."""
    counts = torch.bincount(tokens[:, 0] * VOCABULARY + tokens[:, 1], minlength=VOCABULARY**2)
    return (counts.double() / len(tokens)).reshape(VOCABULARY, VOCABULARY)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Return half the sum of the absolute differences."""
    return float((p - q).abs().sum()) / 2


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    table = spiral_table()
    exact = table.probabilities
    held_out = table.sample((2000,), generator)
    floors = torch.tensor([total_variation(frequencies(table.sample((SAMPLES,), generator)), exact) for _ in range(10)])
    floor, spread = float(floors.mean()), float(floors.std())
    report("true samples: total variation to the exact table", floor, spread)

    figure, axes = plt.subplots(1, 4, figsize=(10.4, 2.9))
    panels = [("exact", exact)]
    independent = total_variation(exact.sum(1, keepdim=True) * exact.sum(0), exact)
    axes[3].plot(SAMPLING_STEPS, [independent / n for n in SAMPLING_STEPS], ":", color=TRUTH, label="masked, theory")
    for name, source, colour in (
        ("masked", fm.MaskSource(VOCABULARY), MODEL),
        ("uniform", fm.UniformSource(VOCABULARY), OTHER),
    ):
        path = fm.MixturePath(source)
        network = train(table, path, generator)
        distances = []
        for steps in SAMPLING_STEPS:
            flow = fm.TokenFlow(network, path, event_shape=(LENGTH,), steps=steps)
            samples = frequencies(flow.sample((SAMPLES,), generator=generator))
            distances.append(total_variation(samples, exact))
        report(f"{name}, {steps} steps: total variation to the exact table", distances[-1], spread)
        if name == "masked":
            report("masked, 1 step: total variation / its theory", distances[0] / independent, spread / independent)
            gap = table.log_prob(held_out) - flow.elbo(held_out, generator=generator).log_prob
            report(
                "masked: KL(truth, model) in nats, from the bound",
                float(gap.mean()),
                float(gap.std()) / len(gap) ** 0.5,
            )
        panels.append((f"{name} flow, {steps} steps", samples))
        axes[3].plot(SAMPLING_STEPS, distances, "o-", color=colour, markersize=4, label=f"{name}, model")

    for panel, (title, values) in zip(axes[:3], panels, strict=True):
        image = panel.imshow(values.T.numpy(), origin="lower", vmin=0, vmax=float(exact.max()))
        panel.set(title=title, xlabel="first token", xticks=(0, 5, 10, 15), yticks=(0, 5, 10, 15))
    axes[0].set_ylabel("second token")
    figure.colorbar(image, ax=axes[2], label="probability", shrink=0.8)
    axes[3].axhline(floor, color=TRUTH, linewidth=0.8, label="true samples")
    axes[3].set(
        xscale="log",
        yscale="log",
        ylim=(0.01, 1.2),
        title="error of few steps",
        xlabel="steps",
        ylabel="total variation",
    )
    axes[3].set_xticks(SAMPLING_STEPS, [str(n) for n in SAMPLING_STEPS])
    axes[3].set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"])
    axes[3].minorticks_off()
    axes[3].legend(fontsize=7.5, loc="upper right")
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
