"""User functions, named in `params.yaml` as "package.module:function"."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.base.errors import UserError, first_line
from pipelines.environments import Array

EntryPoint = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


def find(name: EntryPoint) -> Callable[..., Any]:
    """Import a user function.

    Raises:
        UserError: The module or function does not exist.
    """
    module, _, attribute = name.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise _unknown(name, error) from None
    return function


def load(name: EntryPoint, shape: tuple[int, ...]) -> Callable[..., Array]:
    """Import a user function and wrap it to check its results.

    >>> load("numpy:negative", (2,))(np.ones((1, 2)))
    array([[-1., -1.]])

    Args:
        name: Module and function, "package.module:function".
        shape: Shape of one result.

    Returns:
        The function, from rows (n, ...), and other rows where it takes some, to float64 rows (n, *shape).

    Raises:
        UserError: The module or function does not exist, or, when called, the function returns no numbers, another
            shape, or NaN or infinity for a finite row.
    """
    function = find(name)

    def checked(rows: Array, *others: Array) -> Array:
        answer = numbers(name, function(rows, *others), (len(rows), *shape), "rows")
        bad = ~_finite(answer) & _finite(rows)
        if bad.any():
            raise UserError(
                f"{name} answered {int(bad.sum())} of {len(rows)} rows with NaN or infinity, first the row "
                f"{np.round(rows[bad.argmax()], 4).tolist()}; expected finite numbers."
            )
        return answer

    return checked


def numbers(name: EntryPoint, returned: object, shape: tuple[int, ...], what: str) -> Array:
    """Return what a user function answered `shape[0]` rows or draws with as an array.

    Raises:
        UserError: It is no array of numbers of this shape.
    """
    try:
        answer: Array = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name} answered {shape[0]} {what} with a {type(returned).__name__} that is no array of numbers "
            f"({first_line(error)}); expected shape {shape}."
        ) from None
    if answer.shape != shape:
        raise UserError(f"{name} answered {shape[0]} {what} with shape {answer.shape}; expected shape {shape}.")
    return answer


def sources(*names: str) -> dict[str, Path]:
    """Return the files of the modules of entry points, without importing them.

    They are all files of the module's outermost package if that is a folder with an `__init__.py` outside the installed
    packages, else the module's file alone.

    Args:
        names: Entry points, "package.module:function".

    Raises:
        UserError: A module does not exist.
    """
    importlib.invalidate_caches()
    found: dict[str, Path] = {}
    for name in names:
        module = name.partition(":")[0]
        outermost, *inner = module.split(".")
        spec = PathFinder.find_spec(outermost, [str(Path.cwd())]) or find_spec(outermost)
        if spec is None:
            raise _unknown(name, f"No module named {outermost!r}")
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        installed = any(map(_is_installed, folders))
        if folders and spec.origin and not installed:
            found |= {path.relative_to(folders[0].parent).as_posix(): path for path in _visible(folders[0])}
        elif folders:
            places = [folder.joinpath(*inner) for folder in folders]
            candidates = (path for place in places for path in (place.with_suffix(".py"), place / "__init__.py"))
            path = next((path for path in candidates if path.is_file()), None)
            if path is not None:
                found[module] = path
            elif not installed:
                raise _unknown(name, f"No module named {module!r}")
        elif spec.has_location and spec.origin:  # modules that are built into the interpreter have no file
            found[module] = Path(spec.origin)
    return found


def _finite(rows: Array) -> NDArray[np.bool_]:
    """Return whether all numbers of each row are finite, (n,)."""
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(1))


def _visible(folder: Path) -> list[Path]:
    """Return the files below a folder except bytecode and hidden ones."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
    ]


def _is_installed(folder: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(folder.parts)) or folder.is_relative_to(
        sysconfig.get_path("stdlib")
    )


def _unknown(name: str, error: object) -> UserError:
    return UserError(
        f"the entry point {name!r} cannot be loaded ({error}); "
        "expected package.module:function that can be imported from the project's folder."
    )
