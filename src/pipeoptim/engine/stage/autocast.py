"""Autocast around a stage: the forward in a lower precision, and never with a copy of weights that are no longer there.

Inside ``torch.autocast`` torch keeps the low-precision copy that it made of a parameter until the outermost block ends, and
finds it again by the parameter *object*. The engine puts other values into the same object, from one forward to the next and at
every update, and a user may wrap the whole training loop in one block. So the copies are thrown away before and after
everything that runs the module.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeoptim.errors import ConfigError

LOW = (torch.float16, torch.bfloat16)


def check_autocast(dtype: torch.dtype | None) -> None:
    """Raises ConfigError for a type that autocast does not compute in."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in LOW):
        raise ConfigError(f"autocast is {dtype!r}, must be torch.bfloat16, torch.float16 or None")


class autocast_to:  # noqa: N801  # used like a function
    """Run a module in this block: under autocast to ``dtype``, or with None under whatever the caller set up.

    The copies are thrown away also where no autocast is in sight (0.1 microseconds): a module may have a block of its own, and
    recomputation enters one during the backward and has been seen to leave copies behind.
    """

    __slots__ = ("_autocast",)

    def __init__(self, device_type: str, dtype: torch.dtype | None) -> None:
        self._autocast = None if dtype is None else torch.autocast(device_type, dtype=dtype)

    def __enter__(self) -> None:
        # Those that an outer block has made of weights that have changed since.
        torch.clear_autocast_cache()
        if self._autocast is not None:
            self._autocast.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        try:
            if self._autocast is not None:
                self._autocast.__exit__(*error)
        finally:
            torch.clear_autocast_cache()
