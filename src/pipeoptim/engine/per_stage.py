"""What users give for all stages at once or for each of them, as a list of one per stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.amp.grad_scaler import GradScaler

from pipeoptim.errors import ConfigError


def one_each(what: str, count: int, given: Any, arguments: Sequence[Any]) -> list[Any]:
    """One object for each of ``count`` stages.

    Args:
        what: how messages call them.
        given: a list of one per stage; a function that makes one; or None, for none on any stage.
        arguments: of the function, per stage; where it is None or empty there is nothing to make.

    Raises:
        ConfigError: neither, or not as many as stages.
    """
    if given is None:
        return [None] * count
    if callable(given):
        return [None if argument is None or argument == [] else given(argument) for argument in arguments]
    if not isinstance(given, (list, tuple)):
        raise ConfigError(
            f"{what} is one {type(given).__name__} for {count} stages; give a list of one per stage, or a function that makes one"
        )
    if len(given) != count:
        raise ConfigError(f"{what} has {len(given)} entries for {count} stages; give one per stage")
    return list(given)


def scalers_of(count: int, given: Any) -> list[GradScaler | None]:
    """The loss scalers of ``count`` stages.

    Raises:
        ConfigError: one scaler for all, which would count each overflow once per stage.
    """
    if isinstance(given, GradScaler):
        raise ConfigError(
            'scaler is one GradScaler, but each stage needs its own; pass scaler=lambda: torch.amp.GradScaler("cuda")'
        )
    return [given() for _ in range(count)] if callable(given) else one_each("scaler", count, given, [])
