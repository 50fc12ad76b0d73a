"""Loads the compiled library, at first use and once; says once if there is none.

A wheel brings a library for all processors of its kind (``optim.so``), which is taken where it is there. A checkout compiles its own, so
that a change of the sources counts at once; so does a wheel that was built without a compiler. Both give the same bits.
"""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.kernels import layout
from pipeoptim.kernels.build import built_library
from pipeoptim.kernels.compiler import SOURCES, BuildError

PORTABLE = SOURCES / "optim.so"
"""Where a wheel has its library."""

OFF, ON = ("0", "off", "no", "false"), ("", "1", "on", "yes", "true")
NATIVE = "native"


@dataclass(frozen=True, slots=True)
class Entries:
    """The functions of a library (see ``optim.c``), ready for calls, which release the interpreter's lock."""

    adam: Any
    sgd: Any
    move: Any
    squares: Any
    count: Any
    fetch: Any
    take: Any
    products: Any


@dataclass(frozen=True)
class LoadedLibrary:
    """What became of loading.

    Attributes:
        entries: the functions; None without a library.
        origin: ``"prebuilt"`` (came with the wheel), ``"built"`` (compiled on this machine) or ``"off"``.
        variant: for which processors the functions were compiled; empty without a library.
        reason: why it is this one.
        remedy: what to do to have kernels; empty where there are some, or where none are wanted.
    """

    entries: Entries | None
    origin: str
    variant: str
    reason: str
    remedy: str = ""


def available() -> bool:
    """Whether the kernels can be used on this machine. The first call builds them, if need be."""
    return loaded_library().entries is not None


def why_not() -> str:
    """Why `available` is False; empty if it is True."""
    return "" if available() else loaded_library().reason


def library() -> Entries:
    """The functions of the library; only if `available`."""
    entries = loaded_library().entries
    assert entries is not None
    return entries


def switched_off() -> bool:
    """Whether the user wants no kernels of this library.

    Raises:
        ConfigError: PIPEOPTIM_KERNELS has another value than those it may have.
    """
    return _wanted() in OFF


def _wanted() -> str:
    value = os.environ.get("PIPEOPTIM_KERNELS", "")
    if value.lower() not in (*OFF, *ON, NATIVE):
        raise ConfigError(
            f"PIPEOPTIM_KERNELS is {value!r}, must be 'off' (no kernels), 'native' (compiled for this machine) or unset"
        )
    return value.lower()


def tell_without(what: str, why: object, remedy: str) -> None:
    """Warn that it goes on without some kernel; one process tells it for all on this machine."""
    # As torchrun numbers the processes of a machine.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"pipeoptim goes on without its {what}, and predictions take several passes over memory instead of one, "
            f"because {why}; {remedy}, or set PIPEOPTIM_KERNELS=0 to not be told",
            stacklevel=3,
        )


@cache
def loaded_library() -> LoadedLibrary:
    """The library, loaded by the first call, which warns if there is none."""
    found = _load()
    if found.remedy:
        tell_without("C kernels", found.reason, found.remedy)
    return found


def _load() -> LoadedLibrary:
    if switched_off():
        return LoadedLibrary(None, "off", "", "switched off by PIPEOPTIM_KERNELS")
    wanted = _wanted()
    reason = "PIPEOPTIM_KERNELS asks for it" if wanted == NATIVE else "no library came with the package, as in a checkout"
    broken = ""
    # The wheel's library first: no compiler, no waiting at the first step.
    if PORTABLE.exists() and wanted != NATIVE:
        try:
            return load_portable(PORTABLE)
        except OSError as error:
            reason = broken = f"the library of the wheel cannot be loaded ({error})"
    try:
        # Loaded inside the block: a private folder is deleted at its end, and a loaded library needs its file no more.
        with built_library() as path:
            return load_native(path, reason)
    except BuildError as error:
        return LoadedLibrary(None, "off", "", f"{error}, and {broken}" if broken else str(error), error.remedy)


def load_portable(path: Path, variant: str | None = None) -> LoadedLibrary:
    """The library that came with a wheel: its ``variant``, by default the best one for this processor.

    Raises:
        OSError: it cannot be loaded.
    """
    # Before the load, which resolves the library's OpenMP symbols.
    _share_openmp()
    loaded = ctypes.CDLL(str(path))
    loaded.pipeoptim_variant.restype = ctypes.c_char_p
    best = loaded.pipeoptim_variant().decode()
    return LoadedLibrary(_entries(loaded, variant or best), "prebuilt", variant or best, "it came with the installed package")


def load_native(path: Path, reason: str) -> LoadedLibrary:
    """The library that was compiled on this machine.

    Raises:
        BuildError: it cannot be loaded.
    """
    try:
        return LoadedLibrary(_entries(ctypes.CDLL(str(path)), NATIVE), "built", NATIVE, reason)
    except OSError as error:
        remedy = f"delete {path}, or let PIPEOPTIM_CACHE name another directory"
        raise BuildError(f"the library cannot be loaded ({error})", remedy) from error


def _share_openmp() -> None:
    """Let the library use the OpenMP runtime that torch has loaded, which in some wheels has a name of its own.

    With one of its own it would start as many threads again, and on a machine without a compiler there may be none to load.
    """
    import torch  # noqa: F401  # which loads it

    with open("/proc/self/maps") as maps:
        found = re.findall(r"/.*/lib(?:gomp|iomp5|omp)[-.][^/]*$", maps.read(), re.MULTILINE)
    own = [path for path in found if "/torch/" in path]  # other packages may bring another one
    ctypes.CDLL([*own, *found, "libgomp.so.1"][0], ctypes.RTLD_GLOBAL)


def _entries(loaded: ctypes.CDLL, variant: str) -> Entries:
    """The functions of one variant.

    Raises:
        OSError: it has not all of them, or they expect other structures.
    """
    names = [*(field.name for field in fields(Entries)), "sizes"]
    try:
        found = {name: getattr(loaded, f"pipeoptim_{name}_{variant}") for name in names}
    except AttributeError as error:
        raise OSError(str(error)) from error
    sizes = (ctypes.c_int64 * len(layout.SIZES))()
    found.pop("sizes")(sizes)
    # A library from other sources would read our structures at wrong offsets.
    if list(sizes) != layout.SIZES:
        raise OSError(f"structures of {list(sizes)} bytes where {layout.SIZES} are packed")
    address, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "adam": (ctypes.c_int, (number, address, address, address, address, threads)),
        "sgd": (ctypes.c_int, (number, address, address, address, address, threads)),
        "move": (ctypes.c_int, (number, address, threads)),
        "squares": (ctypes.c_int, (number, address, address, threads)),
        "count": (None, (number, address, ctypes.c_float, address)),
        "fetch": (None, (number, address)),
        "take": (None, (number, address)),
        "products": (None, (address, address, address, number, address, address)),
    }
    for name, (result, arguments) in signatures.items():
        # Without argtypes ctypes would pass addresses as C ints and cut them off.
        found[name].restype, found[name].argtypes = result, arguments
    return Entries(**found)
