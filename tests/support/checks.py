"""Comparisons of results with their values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOUND = 4.5
"""How many standard errors an estimate may lie from its value; the seeds are fixed."""


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10, check_dtype: bool = True) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=check_dtype)


def z_scores(samples: Tensor, truth: Tensor | float) -> Tensor:
    """The errors of the means of samples, in standard errors."""
    return (samples.mean(0) - truth) / (samples.std(0) / math.sqrt(len(samples)))
