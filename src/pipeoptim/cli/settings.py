"""Options of the command line that are fields of ``TrainConfig``: their names, types and help are written there, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from typer import Option

from pipeoptim.config import SETTINGS, TrainConfig

F = TypeVar("F", bound=Callable[..., None])

_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def takes_settings(*names: str, after: str, **helps: str) -> Callable[[F], F]:
    """Decorator of a command ``f(..., **settings)``: it gets an option for each of the fields ``names``, None where it is not given.

    Args:
        names: all that are offered, where none are named.
        after: the command's own option that they follow in its help.
        helps: what a field means in this command, where that is not what it means in a run.
    """
    types = {f.name: str(f.type) for f in fields(TrainConfig)}
    offered = names or tuple(name for name, known in SETTINGS.items() if known.offered)

    def option(name: str) -> Any:
        help = helps.get(name, SETTINGS[name].help)
        if types[name] == "bool":
            return Annotated[bool | None, Option(f"--{name.replace('_', '-')}", help=help)]
        return Annotated[_TYPES[types[name]] | None, Option(help=help)]

    def decorate(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        place = 1 + [p.name for p in own].index(after)
        made = [
            inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=option(n)) for n in offered
        ]
        shown = [*own[:place], *made, *own[place:]]
        described: Any = command  # typer asks for both
        described.__signature__ = signature.replace(parameters=shown)
        described.__annotations__ = {p.name: p.annotation for p in shown} | {"return": None}
        return command

    return decorate


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that were given on the command line."""
    return {name: value for name, value in settings.items() if value is not None}
