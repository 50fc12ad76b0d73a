"""Where the parameters of a stage are in its module, so that one that was replaced is noticed before every mini-batch."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

from torch import nn


class ParameterPlaces:
    """The entry of every parameter in its module. Looking at them all takes 0.05 us each; walking through the modules, 0.5 us."""

    def __init__(self, module: nn.Module) -> None:
        places = [
            (owner._parameters, name, p) for owner in module.modules() for name, p in owner._parameters.items() if p is not None
        ]
        self._holders = [holder for holder, _, _ in places]
        self._names = [name for _, name, _ in places]
        self._held = [p for _, _, p in places]

    def all_hold(self) -> bool:
        """Whether each still holds the parameter that it held."""
        return all(map(is_, map(_get, self._holders, self._names), self._held))


_get: Callable[[Any, str], Any] = dict.get
