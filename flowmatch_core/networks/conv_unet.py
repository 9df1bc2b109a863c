"""A small convolutional U-Net for images, and for images as vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Field, Time
from flowmatch_core.networks.embeddings import Encoder, FourierTime
from flowmatch_core.networks.layers import Modulation, check_cond, convolution, draw_weights

__all__ = ["ConvUNetField", "FlatUNetField"]

GROUP = 4
"""Number of channels per group of the group norms."""


def _norm(h: Tensor) -> Tensor:
    return F.group_norm(h, h.shape[1] // GROUP)


class _Block(nn.Module):
    r"""Add two convolutions to `h`, with the second one's input modulated by time and condition."""

    def __init__(self, inputs: int, outputs: int, time_features: int, cond_features: int) -> None:
        super().__init__()
        self.inner, self.outer = convolution(inputs, outputs), convolution(outputs, outputs)
        self.modulation = Modulation(outputs, time_features, cond_features)
        self.shortcut = convolution(inputs, outputs, size=1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        gain, shift = (m[..., None, None] for m in self.modulation(time, cond))
        z = self.inner(F.silu(_norm(h)))
        added: Tensor = self.outer(F.silu(torch.addcmul(shift, gain, _norm(z))))
        past: Tensor = self.shortcut(h)
        return past + added


@final
class ConvUNetField(Field):
    r"""A convolutional U-Net for images of any size, with group norms modulated by time and condition.

    Each level has half the resolution of the one before, rounded up, and a skip connection to its counterpart on the
    way up. A vector such as a one-hot label conditions all blocks. The divergence has no closed form.

    References:
        - U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger et al., 2015),
          https://arxiv.org/abs/1505.04597
        - Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239

    Args:
        channels: The number of channels of an image.
        widths: The number of channels at each level, multiples of 4.
        cond_dim: The number $c$ of dimensions of the condition, 0 for none.
        frequencies: The number of frequencies of the embedding of time.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> field = ConvUNetField(channels=1, widths=(16, 32), cond_dim=10)
        >>> field(0.5, torch.zeros(5, 1, 8, 8), torch.zeros(5, 10)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (32, 64),
        cond_dim: int = 0,
        frequencies: int = 8,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not widths or any(width < 1 or width % GROUP for width in widths):
            raise ValueError(f"widths is {tuple(widths)}, but should hold at least one multiple of {GROUP}.")
        self.channels, self.cond_dim = channels, cond_dim
        self.cond_shape = (cond_dim,) if cond_dim else None
        features = 4 * widths[0]
        self.embedding = FourierTime(frequencies)
        self.time_encoder = Encoder(self.embedding.features, (features,))
        self.cond_encoder = Encoder(cond_dim, (features, features)) if cond_dim else None
        contexts = features, features if cond_dim else 0

        self.first = convolution(channels, widths[0])
        self.down = nn.ModuleList(_Block(a, b, *contexts) for a, b in itertools.pairwise([widths[0], *widths]))
        self.shrink = nn.ModuleList(convolution(width, width, stride=2) for width in widths[:-1])
        self.middle = _Block(widths[-1], widths[-1], *contexts)
        back = widths[::-1]
        self.up = nn.ModuleList(_Block(a + b, b, *contexts) for a, b in itertools.pairwise([back[0], *back]))
        self.last = convolution(widths[0], channels)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, uniform in ±1/√inputs; a tenth of that for the last layer."""
        draw_weights(self, small=[self.last], generator=generator)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, channels, height, width)`."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but should have shape (batch, {self.channels}, height, width)."
            )
        check_cond(x, cond, self.cond_dim)
        time = self.time_encoder(self.embedding(as_time(t, x)))
        code = None if self.cond_encoder is None else self.cond_encoder(cond)
        h = self.first(x)
        passed: list[Tensor] = []
        for level, block in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](h)
            h = block(h, time, code)
            passed.append(h)
        h = self.middle(h, time, code)
        for block in self.up:
            beside = passed.pop()
            if h.shape[-2:] != beside.shape[-2:]:
                h = F.interpolate(h, size=beside.shape[-2:], mode="nearest")
            h = block(torch.cat([h, beside], 1), time, code)
        velocity: Tensor = self.last(F.silu(_norm(h)))
        return velocity


@final
class FlatUNetField(Field):
    r"""A `ConvUNetField` for images that are vectors, as rows of a table are.

    A vector holds the channels one after the other, each row by row. Squares of `patch` x `patch` pixels become
    channels (pixel unshuffle): the network then works at a smaller resolution, which costs a part of the time. The
    divergence has no closed form, and that by automatic differentiation costs one evaluation per pixel: a likelihood
    needs `divergence="hutchinson"`.

    References:
        - Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network
          (Shi et al., 2016), https://arxiv.org/abs/1609.05158

    Args:
        event_dim: The length of a vector, the product of the image's sizes.
        image: The numbers of channels, of rows and of columns of pixels.
        widths: The number of channels at each level, multiples of 4.
        patch: The side of the squares that become channels; it divides the height and the width.
        frequencies: The number of frequencies of the embedding of time.
        cond_dim: The number of dimensions of the condition, 0 for none.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> field = FlatUNetField(event_dim=64, image=(1, 8, 8), widths=(16, 32), cond_dim=10)
        >>> field(0.5, torch.zeros(5, 64), torch.zeros(5, 10)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        event_dim: int,
        image: Sequence[int],
        widths: Sequence[int] = (32, 64),
        patch: int = 2,
        frequencies: int = 8,
        cond_dim: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = image
        if channels * height * width != event_dim:
            raise ValueError(f"image is {tuple(image)}, but should have {event_dim} pixels, the length of a vector.")
        if patch < 1 or height % patch or width % patch:
            raise ValueError(f"patch is {patch}, but should divide the sides of the image, {height} and {width}.")
        self.image, self.patch = (channels, height, width), patch
        self.unet = ConvUNetField(channels * patch**2, widths, cond_dim, frequencies, generator)
        self.cond_shape = self.unet.cond_shape

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, event_dim)`."""
        images = F.pixel_unshuffle(x.reshape(len(x), *self.image), self.patch)
        return F.pixel_shuffle(self.unet(t, images, cond), self.patch).reshape(x.shape)
