"""Learn a conditional density p(x | c), and pair noise with data without bending the conditionals.

The density has two branches that part as c grows; it is known exactly. Minibatch optimal transport that ignores the
condition biases the conditionals; `fm.ConditionalOT`, which charges for a change of condition, nearly does not, and
its samples need fewer solver steps than those of the independent coupling.

Run: python examples/conditional.py [--out PICTURE.png]
"""

from __future__ import annotations

from pathlib import Path

import torch
from _output import MODEL, TRUTH, picture_path, plt, report, save
from torch import Tensor

import flowmatch_core as fm

STEPS, BATCH, LEARNING_RATE = 800, 128, 1e-2
COUPLINGS: dict[str, fm.Coupling] = {
    "independent": fm.Independent(),
    "minibatch OT": fm.MinibatchOT(),
    "conditional OT": fm.ConditionalOT(weight=100.0),
}
SHOWN = (0.1, 0.4, 0.7, 0.95)  # conditions whose densities are drawn


def conditional_density(cond: Tensor) -> fm.GaussianMixture:
    """Return p(x | c) for every row of `cond`, shape (n, 1): two branches with weights 0.35 and 0.65."""
    centre, half_gap = (3 * cond).sin() - 0.5, 1.4 * cond**2
    means = torch.stack([centre - half_gap, centre + half_gap], 1)
    return fm.GaussianMixture(torch.tensor([0.35, 0.65]), means, 0.15**2 * torch.ones(2, 1, 1))


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw conditions, uniform on [0, 1], and a value for each; shapes (n, 1)."""
    cond = torch.rand(n, 1, generator=generator)
    return conditional_density(cond).sample(1, generator=generator)[0], cond


def train(coupling: fm.Coupling) -> fm.ContinuousFlow:
    """Train the conditional field with one coupling."""
    generator = torch.Generator().manual_seed(0)
    network = fm.FiLMField(event_dim=1, hidden=(64, 64), cond_dim=1, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x, cond = draw(BATCH, generator)
        loss = fm.cfm_loss(network, fm.CondOT(), x, cond=cond, coupling=coupling, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return fm.ContinuousFlow(network.requires_grad_(False), event_shape=(1,), solver="rk4", steps=12)


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x, cond = draw(2000, generator)
    side = torch.linspace(0, 1, 71)[:, None]  # conditions of the pictures
    height = torch.linspace(-2.4, 2.6, 101)[:, None]  # values of the pictures
    noise = torch.randn(2000, 1, generator=generator)

    figure, axes = plt.subplots(2, 4, figsize=(9.8, 4.8), sharey="row")
    maps = {"exact": conditional_density(side).log_prob(height[:, None].expand(-1, len(side), 1))}
    for name, coupling in COUPLINGS.items():
        flow = train(coupling)
        excess = conditional_density(cond).log_prob(x) - flow.log_prob(x, cond)
        report(f"{name}: KL(truth, model) in nats", float(excess.mean()), float(excess.std()) / len(excess) ** 0.5)
        ends = [fm.solve(flow.field, noise, cond=cond, solver=s, steps=n).x for s, n in (("euler", 4), ("rk4", 32))]
        bend = (ends[0] - ends[1]).square()
        report(
            f"{name}: rms error of 4 Euler steps",
            float(bend.mean().sqrt()),
            float(bend.sqrt().std()) / len(bend) ** 0.5,
        )
        rows = torch.cartesian_prod(height[:, 0], side[:, 0])
        maps[name] = flow.log_prob(rows[:, :1], rows[:, 1:]).reshape(len(height), len(side))

    for panel, (name, log_prob) in zip(axes[0], maps.items(), strict=True):
        panel.pcolormesh(
            side[:, 0].numpy(), height[:, 0].numpy(), log_prob.exp().numpy(), vmin=0, vmax=1.6, rasterized=True
        )
        panel.set(title=f"p(x | c), {name}", xlabel="condition c (units)")
    axes[0, 0].set_ylabel("x (units)")
    for panel, c in zip(axes[1], SHOWN, strict=True):
        samples = flow.sample((4000,), cond=torch.tensor([[c]]), generator=generator)  # of conditional OT, the last
        panel.hist(samples.flatten().numpy(), bins=60, range=(-2.4, 2.6), density=True, color=MODEL, alpha=0.5)
        density = conditional_density(torch.tensor([[c]])).log_prob(height[:, None]).exp()
        panel.plot(height.numpy(), density.numpy(), color=TRUTH, linewidth=1.2)
        panel.set(title=f"c = {c}, conditional OT", xlabel="x (units)")
    axes[1, 0].set_ylabel("density (1 / unit)")
    axes[1, 0].legend(["exact", "samples"], loc="upper right")
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
