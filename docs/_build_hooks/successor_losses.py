"""Griffe extension: the temporal-difference losses have the signature they are called with.

`two_term` turns a function of the target and the times into a loss, so the arguments in the source are not those of
the loss. The documentation takes them from the imported function.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import griffe

_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
}


class SuccessorLosses(griffe.Extension):
    """Gives every function decorated by `two_term` the parameters of the loss that it becomes."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the parameters once the package is loaded."""
        if pkg.path != "flowmatch_core":
            return
        losses = pkg["successor.losses"]
        for module in losses.modules.values():
            for function in module.functions.values():
                if function.is_alias:  # a loss that another module imports
                    continue
                if any(str(decorator.value).startswith("two_term") for decorator in function.decorators):
                    _take_runtime_signature(function)


def _take_runtime_signature(function: griffe.Function) -> None:
    signature = inspect.signature(getattr(import_module(function.module.path), function.name))
    function.parameters = griffe.Parameters(
        *(
            griffe.Parameter(
                name,
                annotation=parameter.annotation,
                kind=_KINDS[parameter.kind],
                default=_source(parameter.default),
            )
            for name, parameter in signature.parameters.items()
        )
    )
    function.returns = signature.return_annotation


def _source(default: object) -> str | None:
    """Return a default as it would be written in source."""
    if default is inspect.Parameter.empty:
        return None
    return f"torch.{default.__name__}" if inspect.isbuiltin(default) else repr(default)
