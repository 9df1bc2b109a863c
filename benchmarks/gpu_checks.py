"""Checks that a device computes what the CPU computes in float64.

Every check is a plain function of a device, so that `python -m benchmarks.gpu` runs them without a test framework;
`tests/cuda` runs the same checks under pytest. The random numbers of a comparison are drawn once, on the CPU in
float64, and handed to both sides (`SameDraws`).
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowmatch_core.couplings import MinibatchOT
from flowmatch_core.divergence import DivergenceMethod, divergence
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.marginals import Marginals
from flowmatch_core.networks import FiLMField, MLPField, NoisePrediction, UNetMLPField
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.paths import VP, CondOT
from flowmatch_core.solvers import SOLVERS, ddim, solve, solve_sde
from flowmatch_core.successor import (
    GeometricHorizonModel,
    HorizonGAN,
    HorizonVAE,
    LatentHorizonModel,
    Loss,
    Particles,
    SuccessorLoss,
    Transitions,
    gan_loss,
    mc_cfm_loss,
    n_step,
    td2_cfm_loss,
    td2_dd_loss,
    td_cfm_coupled_loss,
    td_cfm_loss,
    td_dd_loss,
    vae_loss,
)
from pipelines.training import loop

__all__ = ["CHECKS", "LOSSES", "Check", "Outcome", "Place", "SameDraws", "relative_error", "run_check", "truth_place"]

STATE, ACTION, ROWS = 4, 2, 48
GAMMA = 0.9
T = TypeVar("T", bound=nn.Module | Tensor)


@dataclass(frozen=True)
class Place:
    """Where, and in what numbers, something is computed."""

    device: torch.device
    dtype: torch.dtype

    def put(self, what: T) -> T:
        """Return a copy of a module or a tensor there; its numbers are those of float32."""
        moved: Any = copy.deepcopy(what).to(self.device, self.dtype)
        return cast(T, moved)

    def randn(self, *shape: int, seed: int) -> Tensor:
        """Return fixed draws of N(0, 1), the same numbers at every place."""
        return self.put(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def truth_place() -> Place:
    """Return where the truth is computed: on the CPU in float64."""
    return Place(torch.device("cpu"), torch.float64)


class SameDraws(TorchFunctionMode):
    """Draw all random numbers on the CPU in float64, and hand them over on the device and in the dtype asked for.

    Two computations under modes of the same seed see the same numbers, whatever their devices and dtypes.

    Args:
        seed: The seed of the draws.

    Example:
        >>> with SameDraws(0):
        ...     x = torch.randn(3)
        >>> with SameDraws(0):
        ...     y = torch.randn(3, dtype=torch.float64)
        >>> bool((x == y.float()).all())
        True
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func not in (torch.rand, torch.randn, torch.randint):
            return func(*args, **given)
        device, dtype = given.pop("device", None), given.pop("dtype", None)
        given["generator"] = self.generator
        if func is torch.randint:
            return func(*args, **given).to(device=device, dtype=dtype)
        drawn = func(*args, **given, dtype=torch.float64)
        return drawn.to(device=device, dtype=dtype or torch.get_default_dtype())


Compute = Callable[[Place], Sequence[Tensor]]
"""What a check compares: tensors made at a place, of random numbers that `SameDraws` gives."""


@dataclass(frozen=True)
class Check:
    """A check of a device.

    Args:
        error: The error on a device, a number that is at most `tolerance` where all is well.
        tolerance: The largest error allowed.
        needs: The package without which the check is left out, or None.
    """

    error: Callable[[torch.device], float]
    tolerance: float
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a check.

    Args:
        name: The name of the check.
        error: Its error; infinite where it raised an exception, NaN where it did not run.
        tolerance: The largest error allowed.
        reason: The first line of the exception, or why the check did not run; empty otherwise.
        left_out: Whether the check needs a package that is not installed.
    """

    name: str
    error: float
    tolerance: float
    reason: str = ""
    left_out: bool = False

    @property
    def passed(self) -> bool:
        """Whether the check did not fail: a check that was left out does not, one that did not run does."""
        return self.left_out or self.error <= self.tolerance

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.name}: error {self.error:.2g}, tolerance {self.tolerance:.2g}{reason}"


def run_check(name: str, device: torch.device) -> Outcome:
    """Run a check of `CHECKS` on a device; an exception is a failure, not the end of the program."""
    check = CHECKS[name]
    if check.needs is not None and importlib.util.find_spec(check.needs) is None:
        return Outcome(name, math.nan, check.tolerance, f"{check.needs} is not installed", left_out=True)
    try:
        return Outcome(name, check.error(device), check.tolerance)
    except Exception as error:  # one broken check should not hide the others
        return Outcome(name, math.inf, check.tolerance, first_lines(error))


def first_lines(error: BaseException) -> str:
    r"""Return the kind of an exception and the first line of what it says, with the next one if it ends in a colon.

    Example:
        >>> first_lines(ValueError("backend raised:\nno compiler\n at ..."))
        'ValueError: backend raised: no compiler'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest of the errors of tensors, each a Euclidean norm over that of its truth.

    Example:
        >>> relative_error([torch.tensor([3.0, 5.0])], [torch.tensor([3.0, 4.0])])
        0.2
    """
    errors = []
    for a, b in zip(found, truth, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"a result has shape {tuple(a.shape)}, but its truth has shape {tuple(b.shape)}.")
        b = b.detach().double().cpu()
        errors.append(float((a.detach().double().cpu() - b).norm() / b.norm().clamp_min(1e-30)))
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def against_float64(
    compute: Compute, context: Callable[[torch.device], AbstractContextManager[object]] = lambda device: nullcontext()
) -> Callable[[torch.device], float]:
    """Return the error of a computation in float32 on a device, against the CPU in float64.

    Args:
        compute: The computation.
        context: What is entered on the device's side only.
    """

    def error(device: torch.device) -> float:
        with SameDraws(1), context(device):
            found = compute(Place(device, torch.float32))
        with SameDraws(1):
            truth = compute(truth_place())
        for tensor in found:
            if tensor.device.type != device.type:
                raise RuntimeError(f"a result is on {tensor.device}, but should be on {device}.")
        return relative_error(found, truth)

    return error


# ---- what the checks are about ----


def field(place: Place, seed: int = 0) -> UNetMLPField:
    """Return a small copy of the paper's network."""
    return place.put(_large_last(UNetMLPField(STATE, (32, 16), 1, STATE + ACTION, (32,), 16, _seeded(seed))))


def plain_field(place: Place) -> MLPField:
    """Return a network whose divergence has a closed form."""
    return place.put(_large_last(MLPField(STATE, (32, 32), STATE + ACTION, generator=_seeded(3))))


F = TypeVar("F", UNetMLPField, MLPField, FiLMField)


def _large_last(network: F) -> F:
    with torch.no_grad():
        network.last.weight.mul_(10)  # new networks are nearly zero, which would hide errors of what follows
    return network


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transitions(place: Place, terminal: bool = True) -> Transitions:
    """Return a batch of transitions, a few of them terminal."""
    state, action, next_state, next_action = (
        place.randn(ROWS, size, seed=10 + i) for i, size in enumerate((STATE, ACTION, STATE, ACTION))
    )
    ends = torch.arange(ROWS, device=place.device) % 7 == 0 if terminal else None
    return Transitions(state, action, next_state, next_action, ends)


def condition(place: Place) -> Tensor:
    return transitions(place).condition


# ---- losses ----


@dataclass(frozen=True)
class Trainee:
    """A network, and its loss at a place."""

    network: nn.Module
    loss: Callable[[nn.Module], Loss | Tensor]

    def total(self) -> Tensor:
        loss = self.loss(self.network)
        return loss if isinstance(loss, Tensor) else loss.total


def _two_term(loss: SuccessorLoss, place: Place, **options: Any) -> Trainee:
    online, target = field(place), field(place, seed=1)
    batch = transitions(place)
    return Trainee(online, lambda f: loss(f, target, batch, gamma=GAMMA, steps=3, **options))


def _diffusion(loss: SuccessorLoss, place: Place) -> Trainee:
    online, target = (NoisePrediction(field(place, seed), VP()) for seed in (0, 1))
    batch = transitions(place)
    return Trainee(online, lambda f: loss(f, target, batch, gamma=GAMMA, steps=5))


def _monte_carlo(place: Place) -> Trainee:
    batch, future = transitions(place), place.randn(ROWS, STATE, seed=20)
    return Trainee(field(place), lambda f: mc_cfm_loss(f, batch, future))


def _returns(place: Place) -> Trainee:
    states, actions = (place.randn(ROWS, 4, size, seed=30 + size) for size in (STATE, ACTION))
    target = field(place, seed=1)

    def loss(f: nn.Module) -> Loss:
        batch = n_step(states, actions, GAMMA)
        return td2_cfm_loss(f, target, batch, gamma=GAMMA, steps=3)

    return Trainee(field(place), loss)


def _particles(place: Place) -> Trainee:
    particles = place.put(Particles(ROWS, STATE, STATE + ACTION, steps=3))
    target, batch = field(place, seed=1), transitions(place)

    def loss(f: nn.Module) -> Tensor:
        terms = (particles.td2_cfm_loss(f, target, batch, gamma=GAMMA) for _ in range(5))
        return torch.stack([term.total for term in terms]).mean()

    return Trainee(field(place), loss)


def _gan(place: Place) -> Trainee:
    online, target = (place.put(HorizonGAN(STATE, STATE + ACTION, 32, 1, _seeded(seed))) for seed in (0, 1))
    batch = transitions(place)
    return Trainee(online, lambda f: gan_loss(cast(HorizonGAN, f), target, batch, gamma=GAMMA))


def _vae(place: Place) -> Trainee:
    online, target = (place.put(HorizonVAE(STATE, STATE + ACTION, 32, 1, _seeded(seed))) for seed in (0, 1))
    batch = transitions(place)
    return Trainee(online, lambda f: vae_loss(cast(HorizonVAE, f), target, batch, gamma=GAMMA))


def _cfm(place: Place, **options: Any) -> Trainee:
    x1, cond = place.randn(ROWS, STATE, seed=21), condition(place)
    return Trainee(field(place), lambda f: cfm_loss(f, CondOT(), x1, cond=cond, **options))


LOSSES: dict[str, Callable[[Place], Trainee]] = {
    "cfm": _cfm,
    "ot_cfm": partial(_cfm, coupling=MinibatchOT()),
    "mc_cfm": _monte_carlo,
    "td_cfm": partial(_two_term, td_cfm_loss),
    "td_cfm_coupled": partial(_two_term, td_cfm_coupled_loss),
    "td2_cfm": partial(_two_term, td2_cfm_loss),
    "td2_cfm, terms apart": partial(_two_term, td2_cfm_loss, fused=False),
    "td2_cfm, returns of 3 steps": _returns,
    "td2_cfm, particles": _particles,
    "td_dd": partial(_diffusion, td_dd_loss),
    "td2_dd": partial(_diffusion, td2_dd_loss),
    "gan": _gan,
    "vae": _vae,
}
"""Every loss with a small network, by its name."""

WAITS = ("ot_cfm",)
"""The losses that wait for the device by design: exact transport is computed on the CPU."""


def loss_and_gradient(make: Callable[[Place], Trainee], place: Place) -> list[Tensor]:
    """Return the loss and its gradient, one vector of all parameters."""
    trainee = make(place)
    loss = trainee.total()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in trainee.network.parameters() if p.grad is not None]
    return [loss, torch.cat([gradient.flatten() for gradient in gradients])]


def autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16)


class Resident(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise a `RuntimeError` where a tensor is copied from one device to another."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.device != result.device:
                raise RuntimeError(f"a tensor is copied from {source.device} to {result.device}.")
        return result


def waits(make: Callable[[Place], Trainee], device: torch.device) -> float:
    """Return 0 where a step of training stays on the device and never waits for it; raise otherwise.

    On CUDA this is what `torch.cuda.set_sync_debug_mode("error")` sees in a step of AdamW. Elsewhere the loss and its
    gradient are computed on the `meta` device, whose tensors have no values to be read, and copies are errors.
    """
    if device.type != "cuda":
        trainee = make(Place(torch.device("meta"), torch.float32))
        with Resident():  # type: ignore[no-untyped-call]
            trainee.total().backward()  # type: ignore[no-untyped-call]
        return 0.0
    trainee = make(Place(device, torch.float32))
    optimizer = torch.optim.AdamW(trainee.network.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        trainee.total().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()  # libraries and the optimiser's state are set up by the first one
    torch.cuda.synchronize(device)
    usual = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(usual)
    return 0.0


# ---- solves, densities, samples ----


@torch.no_grad()
def solved(solver: str, place: Place) -> list[Tensor]:
    """Return the ends of two solves: of one interval, and of one for each row."""
    ends = place.put(torch.linspace(0.1, 1, ROWS))
    x, cond = place.randn(ROWS, STATE, seed=40), condition(place)
    return [solve(field(place), x, t1=t1, cond=cond, solver=solver, steps=8).x for t1 in (1.0, ends)]


def log_probs(method: DivergenceMethod, solver: str, place: Place) -> list[Tensor]:
    """Return log-densities, and their gradients at the points."""
    model = plain_field(place) if method == "auto" else field(place)
    loc, scale = place.randn(STATE, seed=41), place.put(torch.full((STATE,), 1.5))
    flow = ContinuousFlow(model, (STATE,), solver, 8, method, probes=2, loc=loc, scale=scale)
    x = place.randn(ROWS, STATE, seed=42).requires_grad_(solver != "dopri5")
    found = flow.log_prob(x, condition(place))
    if not x.requires_grad:
        return [found]
    return [found, *torch.autograd.grad(found.sum(), x)]


@torch.no_grad()
def marginal_flow(place: Place) -> list[Tensor]:
    """Return samples and log-densities of a flow in units of double precision whose columns have marginals."""
    rows = torch.randn(500, STATE, generator=_seeded(45)).double().exp()
    rows[:, -1] = rows[:, -1].floor()
    marginals = Marginals.fit(rows, kinds=("mixture",) * (STATE - 1) + ("steps",), components=3).to(place.device)
    loc, scale = (torch.full((STATE,), value, dtype=torch.float64, device=place.device) for value in (0.1, 0.9))
    flow = ContinuousFlow(field(place), (STATE,), "rk4", 8, loc=loc, scale=scale, marginals=marginals)
    x = rows[:ROWS].to(place.device) + 0.4
    return [flow.sample((ROWS,), condition(place)[0]), flow.log_prob(x, condition(place))]


def divergences(place: Place) -> list[Tensor]:
    """Return the divergences of two fields in closed form and by differentiation, and the velocities."""
    film = place.put(_large_last(FiLMField(STATE, (32, 32), cond_dim=STATE + ACTION, generator=_seeded(4))))
    t, x = place.put(torch.linspace(0, 1, ROWS)), place.randn(ROWS, STATE, seed=43)
    results = [
        divergence(network, t, x, condition(place), method)
        for network in (plain_field(place), film)
        for method in ("auto", "exact")
    ]
    return [tensor for result in results for tensor in result]


@torch.no_grad()
def simulated(sample: Callable[..., Any], place: Place, **options: Any) -> list[Tensor]:
    """Return samples of a stochastic solver, their mean and their covariance."""
    x = place.randn(ROWS, STATE, seed=44)
    ends = sample(field(place), x, path=CondOT(), cond=condition(place), steps=12, **options).x
    return [ends, ends.mean(0), ends.T.cov()]


def _reward(x: Tensor) -> Tensor:
    return x.square().sum(-1)


@torch.no_grad()
def horizon(place: Place) -> list[Tensor]:
    """Return samples, values and log-densities of the horizon model of a field."""
    loc, scale = place.randn(STATE, seed=41), place.put(torch.full((STATE,), 1.5))
    model = GeometricHorizonModel(field(place), (STATE,), GAMMA, steps=6, loc=loc, scale=scale)
    batch = transitions(place)
    samples = model.sample(batch.state, batch.action, 8)
    value = model.value(_reward, batch.state, batch.action, 8)
    return [samples, value, model.log_prob(batch.next_state, batch.state, batch.action)]


@torch.no_grad()
def latent_horizon(place: Place) -> list[Tensor]:
    """Return samples and values of the horizon model of a generator."""
    model = LatentHorizonModel(place.put(HorizonVAE(STATE, STATE + ACTION, 32, 1, _seeded(0))), GAMMA)
    batch = transitions(place)
    samples = model.sample(batch.state, batch.action, 8)
    return [samples, model.value(_reward, batch.state, batch.action, 8)]


def discrete_time(place: Place) -> list[Tensor]:
    """Return log-densities of a normalizing flow in discrete time."""
    from flowmatch_core.normalizing import NSF, DiscreteTimeFlow  # zuko is optional here

    flow = place.put(DiscreteTimeFlow(NSF(transforms=2), STATE, STATE + ACTION, generator=_seeded(5)))
    return [flow.log_prob(place.randn(ROWS, STATE, seed=45), condition(place))]


def transport_distance(place: Place) -> list[Tensor]:
    """Return the exact earth mover's distance of two samples."""
    from flowmatch_core.metrics import emd  # POT is optional here

    return [emd(*(place.randn(ROWS, STATE, seed=seed) for seed in (46, 47)))]


def generators(device: torch.device) -> float:
    """Return how many laws a generator on the device breaks: the same samples twice, others after another seed."""
    place = Place(device, torch.float32)
    model = GeometricHorizonModel(field(place), (STATE,), GAMMA, steps=4)
    batch = transitions(place)

    def draws(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        target = field(place, seed=1)
        loss = td2_cfm_loss(field(place), target, batch, gamma=GAMMA, steps=2, generator=generator).total
        return [model.sample(batch.state, batch.action, 4, generator=generator), loss]

    first, again, other = draws(1), draws(1), draws(2)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return float(not same) + float(any(torch.equal(a, b) for a, b in zip(first, other, strict=True)))


# ---- the training loop ----


@dataclass(frozen=True)
class Fit:
    """How the training loop trains; see `pipelines.config.params.Fit`, which needs pydantic."""

    steps: int = 30
    lr: float = 3e-3
    lr_end: float = 0.1
    warmup: int = 3
    weight_decay: float = 1e-3
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_beta2_end: float | None = 0.99
    adam_eps: float = 1e-4
    clip: float | None = 1.0
    ema_step: float = 0.2
    ema_ramp: float | None = 10.0
    log_every: int = 5


class Killed(Exception):
    """What ends a run before its end."""


@contextmanager
def checkpoints_every_row(whether: bool) -> Iterator[None]:
    """Make the training loop save a checkpoint at every row of its loss curve, or never."""
    seconds = -1.0 if whether else math.inf
    with patch.object(loop, "CHECKPOINT_SECONDS", seconds), patch.object(loop, "CHECKPOINT_SHARE", 1e9):
        yield


def fitted(place: Place, checkpoint: Path, stop_at: int | None = None) -> Tensor:
    """Return how far the training loop moves the averaged weights of a small network, as one vector.

    Args:
        place: Where to train.
        checkpoint: The file to go on from and to save to.
        stop_at: The step after which the run is killed.
    """
    network, before = field(place), field(place)

    def terms(online: nn.Module, average: nn.Module, generator: torch.Generator, share: float) -> dict[str, Tensor]:
        loss = td2_cfm_loss(online, average, transitions(place), gamma=GAMMA, steps=3, generator=generator)
        return {"loss": loss.total, "direct": loss.direct, "bootstrap": loss.bootstrap}

    def report(progress: Any) -> None:
        if stop_at is not None and progress.step > stop_at:
            raise Killed

    generator = torch.Generator(place.device).manual_seed(7)
    fit: Any = Fit()
    trained = loop.train(network, terms, fit, generator, checkpoint, report)
    moved = [a - b for a, b in zip(trained.network.parameters(), before.parameters(), strict=True)]
    return torch.cat([change.detach().flatten() for change in moved])


def trained(place: Place) -> list[Tensor]:
    """Return how far the training loop moves the averaged weights."""
    with TemporaryDirectory() as folder, checkpoints_every_row(False):
        return [fitted(place, Path(folder) / "checkpoint")]


def resumed(device: torch.device) -> float:
    """Return in how many weights a killed run that goes on from its checkpoint differs from one that was not killed."""
    place = Place(device, torch.float32)
    with TemporaryDirectory() as folder, checkpoints_every_row(True):
        checkpoint = Path(folder) / "checkpoint"
        whole = fitted(place, Path(folder) / "another")
        with suppress(Killed):
            fitted(place, checkpoint, stop_at=10)
        if not checkpoint.exists():
            raise RuntimeError("the killed run left no checkpoint.")
        return float((fitted(place, checkpoint) != whole).sum())


TIGHT, SOLVED, COARSE = 1e-5, 1e-4, 5e-2
"""Tolerances: of float32, of float32 where steps adapt or are trained, and of products in bfloat16."""

CHECKS: dict[str, Check] = {
    **{
        f"loss {name}": Check(against_float64(partial(loss_and_gradient, make)), TIGHT) for name, make in LOSSES.items()
    },
    **{
        f"bfloat16 loss {name}": Check(against_float64(partial(loss_and_gradient, LOSSES[name]), autocast), COARSE)
        for name in ("cfm", "mc_cfm", "td2_cfm", "td2_dd", "gan", "vae")
    },
    **{
        f"no wait in a step of {name}": Check(partial(waits, make), 0)
        for name, make in LOSSES.items()
        if name not in WAITS
    },
    **{
        f"solve {solver}": Check(against_float64(partial(solved, solver)), SOLVED if "dopri5" in solver else TIGHT)
        for solver in SOLVERS
    },
    **{
        f"log_prob {method}, {solver}": Check(
            against_float64(partial(log_probs, method, solver)), SOLVED if solver == "dopri5" else TIGHT
        )
        for method in get_args(DivergenceMethod)
        for solver in ("midpoint", "dopri5")
    },
    "divergence": Check(against_float64(divergences), TIGHT),
    **{
        f"solve_sde {solver}": Check(against_float64(partial(simulated, solve_sde, solver=solver)), TIGHT)
        for solver in ("euler_maruyama", "heun")
    },
    **{f"ddim, eta {eta:g}": Check(against_float64(partial(simulated, ddim, eta=eta)), TIGHT) for eta in (0.0, 1.0)},
    "flow with marginals": Check(against_float64(marginal_flow), TIGHT),
    "horizon model": Check(against_float64(horizon), TIGHT),
    "latent horizon model": Check(against_float64(latent_horizon), TIGHT),
    "generators on the device": Check(generators, 0),
    "training loop": Check(against_float64(trained), SOLVED),
    "checkpoint and resume": Check(resumed, 0, needs="safetensors"),
    "discrete-time flow": Check(against_float64(discrete_time), TIGHT, needs="zuko"),
    "earth mover's distance": Check(against_float64(transport_distance), TIGHT, needs="ot"),
}
"""All checks by name."""
