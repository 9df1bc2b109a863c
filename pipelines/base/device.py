"""Select the device and the number of threads of a process."""

from __future__ import annotations

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


def use(name: str, threads: int) -> torch.device:
    """Set the number of torch threads and return the device.

    Floating-point sums depend on both, so a stage sets them before it computes.
    """
    import torch

    torch.set_num_threads(threads)
    return resolve(name)
