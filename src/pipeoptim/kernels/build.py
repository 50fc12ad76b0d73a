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
    """No library could be made; the text says why."""


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
    raise BuildError(last)


def _compile(compiler: str, path: Path) -> None:
    source = str(SOURCES / "optim.c")
    said = ""
    for extra in BEST_FIRST:
        handle, part = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        os.close(handle)
        try:
            done = subprocess.run(
                [compiler, *FLAGS, *extra, source, "-o", part, "-lm"], capture_output=True, text=True, timeout=TIMEOUT
            )
            if done.returncode == 0:
                os.replace(part, path)  # readers see all of it or nothing
                return
            said = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            said = f"no answer within {TIMEOUT:g} s"
        finally:
            Path(part).unlink(missing_ok=True)
    raise BuildError(f"{compiler} failed: {said}")


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError("no C compiler found (cc, gcc, clang, or the one that CC names)")


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
