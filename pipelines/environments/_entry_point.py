"""Functions of a user, named in `params.yaml` as "package.module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field

from pipelines.base.errors import UserError
from pipelines.environments import Array

EntryPoint = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


def load(name: EntryPoint, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """The function of that name, from rows (n, ...) to rows (n, *shape), its answers checked and as float64.

    >>> load("numpy:negative", (2,))(np.ones((1, 2)))
    array([[-1., -1.]])

    Raises:
        UserError: there is no such module or function, or, when it is called, an answer has another shape.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the entry point {name!r} cannot be loaded ({error}); "
            "expected package.module:function that can be imported from the project's folder."
        ) from None

    def checked(rows: Array) -> Array:
        answer: Array = np.asarray(function(rows), dtype=np.float64)
        if answer.shape != (len(rows), *shape):
            raise UserError(
                f"{name} answered {len(rows)} rows with shape {answer.shape}; expected shape {(len(rows), *shape)}."
            )
        return answer

    return checked
