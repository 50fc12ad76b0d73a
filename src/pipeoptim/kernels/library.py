"""Loads the compiled library, at first use and once; says once if there is none."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path

from pipeoptim.kernels import layout
from pipeoptim.kernels.build import BuildError, library_path


def available() -> bool:
    """Whether the kernels can be used on this machine. The first call builds them, if need be."""
    return _load()[0] is not None


def why_not() -> str:
    """Why `available` is False; empty if it is True."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The library; only if `available`."""
    loaded = _load()[0]
    assert loaded is not None
    return loaded


def switched_off() -> bool:
    """Whether the user wants no kernels of this library."""
    return os.environ.get("PIPEOPTIM_KERNELS", "").lower() in ("0", "off", "no", "false")


def tell_without(what: str, why: object, remedy: str) -> None:
    """Warn that it goes on without some kernel; one process tells it for all on this machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"pipeoptim goes on without its {what}, and predictions take several passes over memory instead of one, "
            f"because {why}; {remedy}, or set PIPEOPTIM_KERNELS=0 to not be told",
            stacklevel=3,
        )


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if switched_off():
        return None, "switched off by PIPEOPTIM_KERNELS"
    try:
        return _loaded(library_path()), ""
    except BuildError as error:
        tell_without("C kernels", error, error.remedy)
        return None, str(error)


def _loaded(path: Path) -> ctypes.CDLL:
    """The library of that file, ready for calls, which release the interpreter's lock."""
    try:
        loaded = ctypes.CDLL(str(path))
        _check_layout(loaded)
        address, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        for entry in (loaded.pipeoptim_adam, loaded.pipeoptim_sgd):
            entry.argtypes, entry.restype = (number, address, address, address, address, threads), ctypes.c_int
        loaded.pipeoptim_move.argtypes, loaded.pipeoptim_move.restype = (number, address, threads), ctypes.c_int
        loaded.pipeoptim_count.argtypes = (number, address, ctypes.c_float, address)
        loaded.pipeoptim_count.restype = None
        loaded.pipeoptim_fetch.argtypes, loaded.pipeoptim_fetch.restype = (number, address), None
        loaded.pipeoptim_take.argtypes, loaded.pipeoptim_take.restype = (number, address), None
        loaded.pipeoptim_products.argtypes = (address, address, address, number, address, address)
        loaded.pipeoptim_products.restype = None
    except (OSError, AttributeError) as error:
        remedy = f"delete {path}, or let PIPEOPTIM_CACHE name another directory"
        raise BuildError(f"the library cannot be loaded ({error})", remedy) from error
    return loaded


def _check_layout(loaded: ctypes.CDLL) -> None:
    sizes = (ctypes.c_int64 * len(layout.SIZES))()
    loaded.pipeoptim_sizes(sizes)
    if list(sizes) != layout.SIZES:
        raise OSError(f"structures of {list(sizes)} bytes where {layout.SIZES} are packed")
