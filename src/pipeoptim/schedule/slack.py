"""Slack: more micro-batches in flight than the depth asks for, so that a message that comes late holds nobody up.

In asynchronous 1F1B stage k forwards as many micro-batches ahead of its backwards as there are stages behind it. Whatever comes late
is then late for everybody. With slack x on a boundary the stages before it go x micro-batches further ahead::

    slack 0, stage 0 of 3   F0 F1 F2 B0 F3 B1 F4 B2 ...
    slack 1, stage 0 of 3   F0 F1 F2 F3 F4 B0 F5 B1 F6 B2 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Any

from pipeoptim.errors import ConfigError

Slack = float | tuple[float, ...]
"""The same on every boundary between two stages, or a number for each of the D-1 boundaries."""

MOST_SLACK = 1000
"""On a boundary: far beyond what any link needs, and little enough to be counted."""

MOST_BOUNDARIES = 10_000


def read_slack(value: Any) -> Slack:
    """``value`` as users give it: a number, one per boundary, or either as text.

    Raises:
        ConfigError: it is nothing of the kind, or negative.

    Example:
        >>> read_slack(1), read_slack([0, 1, 0]), read_slack("0,0.5,0"), read_slack([0, 0])
        (1.0, (0.0, 1.0, 0.0), (0.0, 0.5, 0.0), 0.0)
    """
    parts = value.split(",") if isinstance(value, str) else value
    try:
        if (
            isinstance(parts, Sequence) and len(parts) > MOST_BOUNDARIES
        ):  # before they are looked at: range(10**12) is a sequence, too
            raise ValueError
        if isinstance(parts, bool) or (isinstance(parts, Sequence) and any(isinstance(part, bool) for part in parts)):
            raise TypeError
        found = tuple(map(float, parts)) if isinstance(parts, Sequence) else (float(parts),)
    except (TypeError, ValueError, OverflowError):
        found = (-1.0,)
    if not found or not all(0 <= x <= MOST_SLACK for x in found):
        raise ConfigError(
            f"slack is {value!r}, must be a number from 0 to {MOST_SLACK}, for example 1, or a list of one for each of the D-1 boundaries "
            "between stages: [0, 1, 0]"
        )
    if not any(found):
        return 0.0  # in one form, so that programs without slack are equal
    return found[0] if len(found) == 1 and (isinstance(value, str) or not isinstance(value, Sequence)) else found


AUTO = "auto"
"""In place of a slack: a number that is chosen from measurements."""


def read_slack_or_auto(value: Any) -> Slack | str:
    """As :func:`read_slack`, or ``"auto"``."""
    return AUTO if isinstance(value, str) and value == AUTO else read_slack(value)


def slack_at_first(value: Any) -> Slack:
    """The slack with which a pipeline begins: none where it is still to be chosen."""
    found = read_slack_or_auto(value)
    return 0.0 if isinstance(found, str) else found


def check_boundaries(slack: Slack, depth: int) -> None:
    """Raises ConfigError where ``slack`` has numbers for another number of boundaries than a pipeline of ``depth`` stages has."""
    if isinstance(slack, tuple) and len(slack) != depth - 1:
        raise ConfigError(
            f"slack has {len(slack)} numbers, must have one for each of the {depth - 1} boundaries between {depth} stages, or be a "
            "single number for all of them"
        )


@lru_cache(maxsize=4096)
def forwards_ahead(slack: Slack, depth: int, k: int) -> int:
    """Forwards that stage ``k`` makes before its first backward, besides that of the same micro-batch:
    ``ceil(sum of 1 + x_b over the boundaries b = k .. D-2)``, which is ``ceil((1 + x) (D-1-k))`` where x is the same on all of them.

    Each is larger by at least one than that of the next stage, so that no stage waits for a gradient that waits for it.

    Example:
        >>> [forwards_ahead(0.5, 4, k) for k in range(4)], [forwards_ahead((0, 1.5, 0), 4, k) for k in range(4)]
        ([5, 3, 2, 0], [5, 4, 1, 0])
    """
    # Exact, as written in decimals: 1.1 * 10 rounds up to 11 and not to 12.
    exact = [Fraction(str(x)) for x in (slack if isinstance(slack, tuple) else (slack,) * (depth - 1))]
    return ceil(sum((1 + x for x in exact[k:]), Fraction(0)))


def messages_early(slack: Slack, boundary: int) -> int:
    """Messages that may be on their way over ``boundary``, in either direction, besides the one that is wanted next."""
    return ceil(slack[boundary] if isinstance(slack, tuple) else slack)


def describe_slack(slack: Any) -> str:
    """As it is written on the command line.

    >>> describe_slack(1.0), describe_slack((0.0, 0.5, 0.0))
    ('1', '0,0.5,0')
    """
    if slack == AUTO:
        return AUTO
    return ",".join(f"{x:g}" for x in slack) if isinstance(slack, tuple) else f"{slack:g}"
