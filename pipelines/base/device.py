"""The device and the number of threads of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.base.errors import UserError

if TYPE_CHECKING:
    import torch


def resolve(name: str) -> torch.device:
    """Return the device of that name in `params.yaml`; `auto` is CUDA if there is any.

    Raises:
        UserError: The name is that of a CUDA device that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(name)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"params.yaml: device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "expected one that is there: set device to auto or cpu."
        )
    return chosen


def use(name: str, threads: int) -> torch.device:
    """Set torch's number of threads and return the device; the last bits of a sum depend on both."""
    import torch

    torch.set_num_threads(threads)
    return resolve(name)
