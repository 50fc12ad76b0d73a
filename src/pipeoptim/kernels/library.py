"""Loads the compiled library, at first use and once; says once if there is none."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache

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


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("PIPEOPTIM_KERNELS", "").lower() in ("0", "off", "no", "false"):
        return None, "switched off by PIPEOPTIM_KERNELS"
    try:
        loaded = ctypes.CDLL(str(library_path()))  # calls release the interpreter's lock
        _check_layout(loaded)
        for name in ("adam", "sgd", "move"):
            entry = getattr(loaded, f"pipeoptim_{name}")
            entry.argtypes, entry.restype = (ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32), ctypes.c_int
    except (BuildError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"pipeoptim works without its C kernels ({reason}): predictions take several passes over memory instead of one. "
            "Install a C compiler, or set PIPEOPTIM_KERNELS=0 to not be told.",
            stacklevel=2,
        )
        return None, reason
    return loaded, ""


def _check_layout(loaded: ctypes.CDLL) -> None:
    sizes = (ctypes.c_int64 * 4)()
    loaded.pipeoptim_sizes(sizes)
    if list(sizes) != layout.SIZES:
        raise OSError(f"structures of {list(sizes)} bytes where {layout.SIZES} are packed")
