"""One sentence for every name that nobody knows: what it was, the nearest one, all of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from pipeoptim.errors import ConfigError


def unknown(what: str, value: str, known: Iterable[str], more: str = "") -> ConfigError:
    """The error for ``value``, which is not among ``known``.

    >>> str(unknown("engine", "procs", ["emulator", "processes"]))
    "unknown engine 'procs'; did you mean 'processes'? known: emulator, processes"
    """
    names = sorted(known)
    by_lower = {name.lower(): name for name in names}
    close = get_close_matches(value.lower(), by_lower, n=1, cutoff=0.5)
    hint = f"did you mean {by_lower[close[0]]!r}? " if close else ""
    return ConfigError(f"unknown {what} {value!r}; {hint}known: {', '.join(names)}{more}")
