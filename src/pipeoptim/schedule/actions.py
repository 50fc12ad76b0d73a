"""The vocabulary of a schedule: what one stage can do, as plain tuples that can be printed, compared and stored."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class ActionKind(StrEnum):
    """What an action does. F, B and U are work; the other four move data between neighbouring stages."""

    F = "F"
    B = "B"
    U = "U"
    RECV_ACTIVATION = "recv_activation"
    SEND_ACTIVATION = "send_activation"
    RECV_GRADIENT = "recv_gradient"
    SEND_GRADIENT = "send_gradient"


class Action(NamedTuple):
    """One action of one stage.

    Attributes:
        kind: what is done.
        number: the micro-batch, counted from 0 since the last (re)start; for ``U`` the mini-batch it consumes.

    Example:
        >>> str(Action(ActionKind.F, 3))
        'F3'
    """

    kind: ActionKind
    number: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.number}"
