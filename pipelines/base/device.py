"""Select the device and the number of threads of a process."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from pipelines.base.errors import UserError

if TYPE_CHECKING:
    import torch


def resolve(name: str) -> torch.device:
    """Return the device that `params.yaml` names; `auto` is CUDA where it is available.

    Raises:
        UserError: There is no device of this name.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise UserError(f"the device {name!r} is unknown; expected auto, cpu, cuda or cuda:N.") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"params.yaml: device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "expected one that is there: set device to auto or cpu."
        )
    return chosen


def limit_threads(threads: int) -> None:
    """Set the number of threads of torch, linear algebra and OpenMP in this process, loaded or not.

    Floating-point sums depend on it, so a stage sets it before it computes.
    """
    from threadpoolctl import threadpool_limits

    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # for a library that is loaded later
        os.environ[name] = str(threads)
    threadpool_limits(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def use(name: str, threads: int) -> torch.device:
    """Set the number of threads and return the device, as sums depend on both."""
    limit_threads(threads)
    return resolve(name)
