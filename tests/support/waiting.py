"""A mode in which reading a value from the device fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "repeat_interleave"}


class NeverWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operation whose result decides what the host does next."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            isinstance(args[1], Sequence) and any(i is not None and i.dtype == torch.bool for i in args[1])
            if name in ("index", "index_put", "index_put_")
            else False
        )
        assert name not in WAITS and not masks, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
