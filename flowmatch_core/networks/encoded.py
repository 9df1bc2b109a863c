"""Networks whose condition passes through an encoder, and may be dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from flowmatch_core._conditions import Condition, CondShape, condition_parts, map_condition
from flowmatch_core._tensors import check_numbered
from flowmatch_core.field import Field, Time, VelocityField, at_condition, at_times

__all__ = ["EncodedField", "LabelEmbedding"]


@final
class LabelEmbedding(nn.Module):
    """Embed labels by a table of weights, drawn from N(0, 1).

    Args:
        classes: The number of classes; the labels are 0 to `classes - 1`.
        width: The size of the embedding.
        generator: The source of randomness of the weights.

    Examples:
        >>> LabelEmbedding(classes=10, width=4)(torch.tensor([3, 9])).shape
        torch.Size([2, 4])
    """

    cond_shape: tuple[int, ...] = ()

    def __init__(self, classes: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width, generator=generator))

    def forward(self, labels: Tensor) -> Tensor:
        classes = len(self.weight)
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}, but should have shape (batch,) and "
                "be of an integer dtype."
            )
        check_numbered("labels", labels, classes)
        return self.weight[labels]


@final
class EncodedField(Field):
    r"""A network at an encoded condition, $f(t, x, e(c))$, and at a learned vector where the condition is dropped.

    The encoder is any module, such as `LabelEmbedding`, a convolutional network for conditions that are images, or
    None for conditions that are vectors already. Rows that `drop_condition` has marked, NaN or -1, and all rows where
    the condition is None, do not reach the encoder: the network takes the vector `null` instead. A field that was
    trained on such rows has both velocities that `guided` needs. The divergence has a closed form if that of the
    network has one.

    Args:
        network: A network with `cond_dim` equal to the number of features of the encoder.
        encoder: The module that maps conditions `(batch, *cond)`, or a mapping of such tensors, to `(batch,
            cond_dim)`; None for the conditions themselves.
        cond_shape: The shape of one condition; by default `encoder.cond_shape` if the encoder has it, that of the
            network without an encoder, and else not declared.

    Examples:
        Train with dropped labels, and guide:

        >>> from flowmatch_core import CondOT, MLPField, cfm_loss, drop_condition, guided, solve
        >>> g = torch.Generator().manual_seed(0)
        >>> field = EncodedField(MLPField(1, (32, 32), cond_dim=4, generator=g), LabelEmbedding(2, 4, generator=g))
        >>> optimizer = torch.optim.Adam(field.parameters(), 1e-2)
        >>> for _ in range(200):
        ...     label = torch.randint(2, (256,), generator=g)
        ...     x1 = 2.0 * label[:, None] - 1 + torch.randn(256, 1, generator=g)  # N(-1, 1) and N(1, 1)
        ...     cond = drop_condition(label, 0.2, generator=g)
        ...     optimizer.zero_grad()
        ...     cfm_loss(field, CondOT(), x1, cond=cond, generator=g).backward()
        ...     optimizer.step()
        >>> label, x0 = torch.ones(1000, dtype=torch.long), torch.randn(1000, 1, generator=g)
        >>> with torch.no_grad():
        ...     means = [solve(guided(field, w), x0, cond=label).x.mean() for w in (0.0, 1.0, 2.0)]
        >>> bool(means[0].abs() < 0.3), bool(means[0] + 0.5 < means[1]), bool(means[1] + 0.5 < means[2])
        (True, True, True)
    """

    def __init__(self, network: Field, encoder: nn.Module | None, cond_shape: CondShape = None) -> None:
        super().__init__()
        if not isinstance(network.cond_shape, tuple) or len(network.cond_shape) != 1:
            raise ValueError(
                f"network has conditions of shape {network.cond_shape}, but should have those of vectors, (cond_dim,)."
            )
        self.network, self.encoder = network, encoder
        declared = network.cond_shape if encoder is None else getattr(encoder, "cond_shape", None)
        self.cond_shape = declared if cond_shape is None else cond_shape
        self.null = nn.Parameter(torch.zeros(network.cond_shape))

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether the divergence of the network has a closed form."""
        return self.network.has_closed_form_divergence

    def encode(self, x: Tensor, cond: Condition) -> Tensor:
        """Return the condition of the network, with shape `(batch, cond_dim)`.

        Args:
            x: The state, with shape `(batch, *event)`.
            cond: The condition, or None.
        """
        null = self.null.expand(len(x), -1)
        if cond is None:
            return null
        dropped = torch.stack([_dropped(part) for part in condition_parts(cond)]).all(0)
        kept = map_condition(lambda part: part.masked_fill(_beside(dropped, part), 0), cond)
        code = kept if self.encoder is None else self.encoder(kept)
        return torch.where(dropped[:, None], null.to(code.dtype), code)

    def forward(self, t: Time, x: Tensor, cond: Condition = None) -> Tensor:
        """Return the velocity, shaped like `x`."""
        velocity: Tensor = self.network(t, x, self.encode(x, cond))
        return velocity

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Return the velocity, shaped like `x`, and its exact divergence, with shape `(batch,)`."""
        return self.network.velocity_and_divergence(t, x, self.encode(x, cond))

    def prepared(self) -> Field:
        """Return the field with its network prepared."""
        field = EncodedField(self.network.prepared(), self.encoder, self.cond_shape)
        field.null = self.null
        return field

    def at_condition(self, cond: Condition) -> VelocityField:
        """Return the field at conditions `(batch, *cond)`, encoded once, with the same result.

        It holds for the current weights and for these rows, and ignores the condition that it is called with.
        """
        code = self.encode(condition_parts(cond)[0], cond)
        field = at_condition(self.network, code)
        return lambda t, x, _=None: field(t, x, code)

    def at_times(self, times: Sequence[Time], x: Tensor) -> Sequence[VelocityField]:
        """Return a field for each of the times, with those of the network."""

        def encoded(field: VelocityField) -> VelocityField:
            return lambda t, x, cond=None: field(t, x, self.encode(x, cond))

        return [encoded(field) for field in at_times(self.network, times, x)]


def _dropped(part: Tensor) -> Tensor:
    """Return which rows of the condition are dropped, with shape `(batch,)`."""
    marks = part.isnan() if part.is_floating_point() else part == -1
    return marks.reshape(len(part), -1).all(1)


def _beside(rows: Tensor, part: Tensor) -> Tensor:
    return rows.reshape(-1, *(1,) * (part.ndim - 1))
