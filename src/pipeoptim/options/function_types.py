"""Functions that users give as options of a pipeline."""

from collections.abc import Callable
from typing import Any

UpdateHook = Callable[[int, int], None]
"""``on_update(k, version)``, called after every update of stage k, with the latest weights in the module."""

LossWeight = Callable[[Any], Any]
"""``loss_weight(target) -> number``."""
