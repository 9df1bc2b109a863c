"""Training by several processes that `torchrun` starts: each evaluates the network on its share of the rows.

All processes run the same stage, draw the same batch, times and noises from generators with the same seeds, and compute
the same loss. Only the network is divided: `Sharded` evaluates the rows of this process and returns those of all, and
its gradients are those of the whole batch. A loss is therefore the same function as in one process, whichever it is and
however often it calls the network, up to the order of floating-point sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowmatch_core._conditions import Condition, map_condition
from pipelines.base import ranks
from pipelines.base.errors import UserError, first_line


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Connect the processes of a stage, by gloo on the CPU and by NCCL on CUDA with one device each.

    Raises:
        UserError: The device is one CUDA device, which the processes cannot share.
    """
    if ranks.world() == 1:
        yield
        return
    if device.index is not None:
        raise UserError(
            f"params.yaml: device is '{device}' for {ranks.world()} processes, which take a device each; expected cuda."
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    torch.distributed.destroy_process_group()


def agree(name: str, values: Sequence[float], device: torch.device) -> None:
    """Check that values are the same in all processes, which therefore also wait for each other here.

    Raises:
        UserError: They differ.
    """
    if ranks.world() == 1:
        return
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    first = mine.clone() if ranks.is_first() else torch.zeros_like(mine)
    different = (_sum(first) != mine).sum()
    if _sum(different):
        raise UserError(
            f"the processes of this training differ in {name}; expected the same files for all: let them share "
            "data/ and .checkpoints/, on a network file system if they run on several machines."
        )


def sharded(network: nn.Module) -> nn.Module:
    """Return a network whose evaluations are divided among the processes; it is itself if there is one process."""
    return network if ranks.world() == 1 else Sharded(network)


def undivided(network: nn.Module) -> nn.Module:
    """Return the network of `sharded`, which every process evaluates at all rows, with the same result."""
    return network.network if isinstance(network, Sharded) else network


class Sharded(nn.Module):
    """A network that evaluates a share of the rows in each process; value and gradients are those of all rows.

    What is not an evaluation (an attribute, another method) is that of the network, undivided.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of this module, else of the network."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, t: float | Tensor, x: Tensor, cond: Condition = None) -> Tensor:
        """Return the rows of all processes, which are called with the same arguments."""
        if len(x) < ranks.world():  # nothing to divide
            undivided: Tensor = self.network(t, x, cond)
            return undivided
        times = _OwnRows.apply(t) if isinstance(t, Tensor) and t.ndim > 0 else t  # type: ignore[no-untyped-call]
        arguments = times, _OwnRows.apply(x), map_condition(_OwnRows.apply, cond)  # type: ignore[no-untyped-call]
        named = {name: each for name, each in self.network.named_parameters() if each.requires_grad}
        if named and torch.is_grad_enabled():
            shared = dict(zip(named, _Shared.apply(*named.values()), strict=True))  # type: ignore[no-untyped-call]
            rows = torch.func.functional_call(self.network, shared, arguments)
        else:
            rows = self.network(*arguments)
        whole: Tensor = _AllRows.apply(rows, len(x))  # type: ignore[no-untyped-call]
        return whole


class _OwnRows(torch.autograd.Function):
    """The rows of this process of a tensor that all have; the gradient is gathered from all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return x[_share(len(x))].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole: Tensor = _AllRows.apply(gradient, ctx.rows)  # type: ignore[no-untyped-call]
        return whole


class _AllRows(torch.autograd.Function):
    """The rows of all processes; the gradient, which all have, is divided."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: int) -> Tensor:
        whole = own.new_zeros(rows, *own.shape[1:])
        whole[_share(rows)] = own
        return _sum(whole)  # exact: every row has one summand that is not zero

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own: Tensor = _OwnRows.apply(gradient)  # type: ignore[no-untyped-call]
        return own, None


class _Shared(torch.autograd.Function):
    """Parameters that all processes have; the gradient is the sum of those of their rows."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        flat = _sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        return tuple(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))


def _share(rows: int) -> slice:
    """Return the rows of this process; the shares differ by one row at most."""
    rank, world = ranks.rank(), ranks.world()
    return slice(rows * rank // world, rows * (rank + 1) // world)


def _sum(x: Tensor) -> Tensor:
    """Add a tensor up over the processes, in place.

    Raises:
        UserError: Another process has ended.
    """
    try:
        torch.distributed.all_reduce(x)
    except RuntimeError as error:
        raise UserError(
            f"process {ranks.rank()} of {ranks.world()} has lost another one ({first_line(error)}); the last "
            "checkpoint is kept: run the same command to continue."
        ) from None
    return x
