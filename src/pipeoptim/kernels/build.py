"""Compiles the C sources into a shared library, once per machine, compiler and source, in a cache directory.

The name of the library is a hash of everything it depends on, the processor's features included: a home directory that
several kinds of machines share gets one library for each. Processes that build at the same time wait for one another.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
BEST_FIRST = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""Extra flags, in the order in which they are tried: not every compiler knows all of them."""

TIMEOUT = 120.0


class BuildError(Exception):
    """No library could be made; the text says why, `remedy` what to do."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(" ".join(why.split()))
        self.remedy = remedy


def library_path() -> Path:
    """The compiled library, built now if need be.

    Raises:
        BuildError: no compiler, or it failed, or there is no place to write to.
    """
    compiler = _compiler()
    name = f"optim-{_key(compiler)}.so"
    last = "no directory to write to"
    for folder in _folders():
        path = folder / name
        try:
            if path.is_file():
                return path
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _only_ours(folder)
            with _locked(folder / f"{name}.lock"):
                if not path.is_file():  # nobody else made it while we waited
                    _compile(compiler, path)
            return path
        except OSError as error:
            last = str(error)
    raise BuildError(f"there is nowhere to keep them ({last})", "let PIPEOPTIM_CACHE name a directory that is yours alone")


def _compile(compiler: str, path: Path) -> None:
    said = ""
    for extra in BEST_FIRST:
        handle, part = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        os.close(handle)
        try:
            said = _said([compiler, *FLAGS, *extra, str(SOURCES / "optim.c"), "-o", part, "-lm"])
            if not said:
                os.replace(part, path)  # readers see all of it or nothing
                return
        finally:
            Path(part).unlink(missing_ok=True)
    raise BuildError(f"{compiler} failed: {said}", "install gcc or clang, or let CC name another C compiler")


def _said(command: list[str]) -> str:
    """The line that says why the command failed; empty if it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT:g} s"
    except OSError as error:  # found, but not a program of this machine
        return str(error)
    lines = done.stderr.strip().splitlines()
    telling = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {done.returncode}"]
    return telling[0].strip() if done.returncode else ""


def _compiler() -> str:
    chosen = os.environ.get("CC")
    for name in filter(None, (chosen, "cc", "gcc", "clang")):
        found = shutil.which(name)
        if found:
            return found
    named = f", nor the {chosen!r} that CC names" if chosen else ""
    raise BuildError(f"no C compiler is found (cc, gcc or clang{named})", "install gcc or clang, or let CC name a C compiler")


def _key(compiler: str) -> str:
    binary = os.stat(os.path.realpath(compiler))
    parts = [compiler, str(binary.st_size), str(binary.st_mtime_ns), *FLAGS, *map(str, BEST_FIRST), platform.machine(), _cpu()]
    text = "\n".join(parts).encode() + b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))
    return hashlib.sha256(text).hexdigest()[:16]


def _cpu() -> str:
    """What ``-march=native`` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _folders() -> Iterator[Path]:
    """Where libraries may be kept, best first; the temporary directory if there is no home to write to."""
    chosen = os.environ.get("PIPEOPTIM_CACHE")
    if chosen:
        yield Path(chosen)
        return
    cache = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # no home directory
        yield (Path(cache) if cache else Path.home() / ".cache") / "pipeoptim"
    yield Path(tempfile.gettempdir()) / f"pipeoptim-{os.getuid()}"


def _only_ours(folder: Path) -> None:
    """A library is code that this process runs: nobody else may be able to put one there."""
    info = folder.stat()
    if info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others, so a library from there is not safe to run")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the system gives it back if the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
