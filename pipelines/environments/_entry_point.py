"""User functions, named in `params.yaml` as "package.module:function"."""

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
    """Import a user function and wrap it to check its results.

    >>> load("numpy:negative", (2,))(np.ones((1, 2)))
    array([[-1., -1.]])

    Args:
        name: Module and function, "package.module:function".
        shape: Shape of one result.

    Returns:
        The function, from rows (n, ...) to float64 rows (n, *shape).

    Raises:
        UserError: The module or function does not exist, or, when called, the function returns another shape.
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
