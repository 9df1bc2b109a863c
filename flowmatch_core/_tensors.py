"""Shape, dtype and time helpers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flowmatch_core.field import Time, TimeSampler

__all__ = [
    "as_shape",
    "as_time",
    "broadcast",
    "check_choice",
    "check_finite",
    "check_floating",
    "check_numbered",
    "check_object",
    "check_shape",
    "expand_time",
    "flatten_event",
    "noise_like",
    "seeded",
    "standard_normal_log_prob",
    "time_like",
    "weighted_mean",
]


def as_time(t: Time, x: Tensor) -> Tensor:
    """Return `t` as a tensor of the dtype of `x` and shape `()` or `(batch,)`.

    Args:
        t: The time.
        x: The batch it belongs to, with shape `(batch, *event)`.

    Examples:
        >>> import torch
        >>> as_time(0.5, torch.zeros(3, 2))
        tensor(0.5000)
    """
    if not isinstance(t, Tensor):
        return x.new_full((), t)
    if t.ndim > 0:
        check_shape("t", t, x.shape[:1], "a float, 0-d or ")
    return t if t.dtype == x.dtype else t.to(x.dtype)  # the call alone costs as much as an operation on a small batch


def expand_time(t: Time, x: Tensor) -> Tensor:
    """Return `t` with trailing dimensions of size one, so that it broadcasts along the batch dimension of `x`.

    Examples:
        >>> import torch
        >>> expand_time(torch.rand(3), torch.zeros(3, 2, 2)).shape
        torch.Size([3, 1, 1])
    """
    t = as_time(t, x)
    return t.reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else t


def flatten_event(x: Tensor) -> Tensor:
    """Return `x` with shape `(batch, size of an event)`, also for an empty batch.

    Examples:
        >>> import torch
        >>> flatten_event(torch.zeros(0, 2, 3)).shape, flatten_event(torch.zeros(4)).shape
        (torch.Size([0, 6]), torch.Size([4, 1]))
    """
    return x.unsqueeze(-1).flatten(1)


def broadcast(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the tensor expanded to the shape.

    Raises a `ValueError` that names the tensor where it does not broadcast.

    Examples:
        >>> import torch
        >>> broadcast("loc", torch.zeros(2), (3, 2)).shape
        torch.Size([3, 2])
    """
    try:
        return tensor.expand(*shape)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but should broadcast to shape {tuple(shape)}."
        ) from None


def as_shape(name: str, shape: Sequence[int]) -> torch.Size:
    """Return a shape; a `ValueError` names one that is a number.

    Examples:
        >>> as_shape("event_shape", 2)
        Traceback (most recent call last):
        ValueError: event_shape is 2, but should be a tuple such as (2,).
    """
    if not isinstance(shape, Sequence):
        raise ValueError(f"{name} is {shape!r}, but should be a tuple such as ({shape},).")
    return torch.Size(shape)


@contextmanager
def seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators from a generator, and restore them at the end; do nothing for None.

    It is for code of others that draws from the global generators only.

    Examples:
        >>> with seeded(torch.Generator().manual_seed(0), torch.device("cpu")):
        ...     first = torch.rand(3)
        >>> with seeded(torch.Generator().manual_seed(0), torch.device("cpu")):
        ...     bool((torch.rand(3) == first).all())
        True
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a draw of N(0, I) with the shape, dtype and device of `x`.

    Examples:
        >>> import torch
        >>> noise_like(torch.zeros(3, 2), torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def time_like(x: Tensor, sampler: TimeSampler, generator: torch.Generator | None) -> Tensor:
    """Return a time for every row of `x`, with shape `(batch,)` and the dtype and device of `x`.

    Examples:
        >>> import torch
        >>> time_like(torch.zeros(3, 2), torch.rand, torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    return sampler(len(x), generator=generator, dtype=x.dtype, device=x.device)


def standard_normal_log_prob(x: Tensor) -> Tensor:
    r"""Return $\log N(x; 0, I)$ of each row, with shape `(batch,)`.

    Examples:
        >>> import torch
        >>> standard_normal_log_prob(torch.zeros(1, 2))  # -log(2 pi)
        tensor([-1.8379])
    """
    return -(x.square() + math.log(2 * math.pi)).sum(1) / 2


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    r"""Return the mean over all entries, with the entries of row `i` times its weight $w_i$.

    It is linear in the weights, which are not normalised: for importance weights their mean is one.

    Args:
        values: The values, with shape `(batch, *event)`.
        weight: The weights, with shape `(batch,)`; None for ones.

    Examples:
        >>> import torch
        >>> weighted_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([0.5, 0.0]))
        tensor(0.5000)
    """
    if weight is None:
        return values.mean()
    check_shape("weight", weight, values.shape[:1])
    return (weight.to(values.dtype) * flatten_event(values).mean(1)).mean()


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], alternative: str = "") -> None:
    """Raise a `ValueError` unless the tensor has the shape, which rules out accidental broadcasting."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but should be {alternative}of shape {tuple(shape)}.")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise a `ValueError` unless the tensor holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, but should be of a floating-point dtype.")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a `ValueError` unless all entries of the tensor are finite; it waits for the device.

    Examples:
        >>> import torch
        >>> check_finite("loc", torch.tensor([0.0, float("nan")]))
        Traceback (most recent call last):
        ValueError: loc holds 1 numbers that are not finite, but should hold none.
    """
    if bad := int((~tensor.isfinite()).sum()):
        raise ValueError(f"{name} holds {bad} numbers that are not finite, but should hold none.")


def check_numbered(name: str, tensor: Tensor, count: int, hint: str = "") -> None:
    """Raise a `ValueError` unless all entries are numbers from 0 to `count - 1`.

    The values are looked at on the CPU only: elsewhere that would wait for the device.

    Args:
        name: The name of the tensor.
        tensor: The numbers, of an integer dtype.
        count: How many there are.
        hint: What the sentence ends with.

    Examples:
        >>> import torch
        >>> check_numbered("labels", torch.tensor([3, 10]), 10)
        Traceback (most recent call last):
        ValueError: labels holds 10, but should hold numbers from 0 to 9.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    least, greatest = (int(end) for end in tensor.aminmax())
    if least < 0 or greatest >= count:
        found = least if least < 0 else greatest
        raise ValueError(f"{name} holds {found}, but should hold numbers from 0 to {count - 1}{hint}.")


def check_object(name: str, value: object) -> None:
    """Raise a `ValueError` for a class in place of an object of it.

    Examples:
        >>> from flowmatch_core.paths import CondOT
        >>> check_object("path", CondOT)
        Traceback (most recent call last):
        ValueError: path is the class CondOT, but should be an object; pass CondOT().
    """
    if isinstance(value, type):
        raise ValueError(f"{name} is the class {value.__name__}, but should be an object; pass {value.__name__}().")


def check_choice(name: str, given: str, known: Iterable[str]) -> None:
    """Raise a `ValueError` that lists the known names unless the given one is among them."""
    if given not in (names := tuple(known)):
        raise ValueError(f"{name} is {given!r}, but should be one of {', '.join(names)}.")
