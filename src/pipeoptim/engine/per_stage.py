"""What users give for all stages at once or for each of them, as a list of one per stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.amp.grad_scaler import GradScaler

from pipeoptim.errors import ConfigError, counted


def one_each(what: str, count: int, given: Any, arguments: Sequence[Any]) -> list[Any]:
    """One object for each of ``count`` stages.

    Args:
        what: how messages call them.
        given: a list of one per stage; a function that makes one; or None, for none on any stage.
        arguments: of the function, per stage; where it is None or empty there is nothing to make.

    Raises:
        ConfigError: neither, not as many as stages, or the function failed.
    """
    if given is None:
        return [None] * count
    if callable(given):
        return [
            None if argument is None or argument == [] else _made_for_stage(what, k, given, argument)
            for k, argument in enumerate(arguments)
        ]
    if not isinstance(given, (list, tuple)):
        raise ConfigError(
            f"{what} is one {type(given).__name__} for {counted(count, 'stage')}; give a list of one per stage, or a function that makes "
            "one"
        )
    if len(given) != count:
        raise ConfigError(f"{what} has {len(given)} entries for {counted(count, 'stage')}; give one per stage")
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
    return (
        [_made_for_stage("scaler", k, given) for k in range(count)] if callable(given) else one_each("scaler", count, given, [])
    )


def _made_for_stage(what: str, k: int, make: Callable[..., Any], *arguments: Any) -> Any:
    """What the user's function makes for stage ``k``; why it failed is the cause of the error."""
    try:
        return make(*arguments)
    # It says what is wrong already.
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        given = [
            "the list of the stage's parameters" if isinstance(one, list) else f"its {type(one).__name__}" for one in arguments
        ]
        got = f" (it was called with {given[0]})" if given else ""
        raise ConfigError(f"{what} is a function that failed for stage {k}: {type(error).__name__}: {reason}{got}") from error
