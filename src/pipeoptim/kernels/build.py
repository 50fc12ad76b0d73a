"""Keeps what is compiled on this machine: a library per machine, compiler and source, in a cache directory that is safe.

The name of the library is a hash of everything it depends on, the processor's features included: a home directory that
several kinds of machines share gets one library for each. Processes that build at the same time wait for one another.

A library is code that this process will run. It is taken from a folder only if nobody else could have put it there: folder and
file belong to this user and nobody else may write to them. Where no such place exists, it is built in a fresh private folder.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import os
import platform
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeoptim.kernels.compiler import BEST_FIRST, FLAGS, SOURCES, BuildError, compile_native, find_compiler


@contextmanager
def built_library() -> Iterator[Path]:
    """The library for this machine, compiled now if need be; to be loaded before the block ends.

    Raises:
        BuildError: no compiler, or it failed, or there is no place to write to.
    """
    compiler = find_compiler()
    name = f"optim-{_key(compiler)}.so"
    for folder in cache_folders():
        try:
            path = _cached_library(compiler, folder, name)
        # Not writable or not safe: the next folder may be.
        except OSError:
            continue
        yield path
        return
    try:
        private = Path(tempfile.mkdtemp(prefix="pipeoptim-"))  # a new one, with a name that nobody could guess, mode 0700
    except OSError as error:
        raise BuildError(
            f"there is nowhere to keep them ({error})", "let PIPEOPTIM_CACHE name a directory that is yours alone"
        ) from error
    try:
        compile_native(compiler, private / name)
        yield private / name
    finally:
        shutil.rmtree(private, ignore_errors=True)


def cache_folders() -> Iterator[Path]:
    """Where libraries may be kept, best first; the temporary directory if there is no home to write to."""
    chosen = os.environ.get("PIPEOPTIM_CACHE")
    if chosen:
        yield Path(chosen)
        return
    cache = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # no home directory
        yield (Path(cache) if cache else Path.home() / ".cache") / "pipeoptim"
    yield Path(tempfile.gettempdir()) / f"pipeoptim-{os.geteuid()}"


def check_folder(folder: Path) -> None:
    """Raises PermissionError where somebody else could put a file into ``folder``, or another folder in its place."""
    if folder.is_symlink():  # one of our own may lead to another disk
        _check_owner(folder, folder.lstat())
    real = folder.resolve(strict=True)
    info = real.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(f"{folder} is no directory")
    _check_owner(folder, info)
    _check_mode(folder, info)
    for parent in (*real.parents, *folder.absolute().parents):  # also where a link lies
        _check_parent(parent, folder)


def _check_parent(parent: Path, folder: Path) -> None:
    """Raises PermissionError where others could rename what is in ``parent`` after ``folder`` was checked and before it is used."""
    info = parent.stat()
    if info.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{parent} belongs to user {info.st_uid}, who could replace {folder} by another one")
    others = info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and not _only_ours(info.st_gid))
    if others and not info.st_mode & stat.S_ISVTX:  # with the sticky bit others cannot rename what is ours
        raise PermissionError(f"{parent} can be written by others, so {folder} could be replaced by another one")


def _only_ours(group: int) -> bool:
    """Whether nobody else is in a group: that of root, or one that has this user's name, as many systems make one for each user."""
    try:
        found = grp.getgrgid(group)
        own = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return (group == 0 or found.gr_name == own) and set(found.gr_mem) <= {own, "root"}


def _check_file(path: Path) -> None:
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise PermissionError(f"{path} is no file of its own")
    _check_owner(path, info)
    _check_mode(path, info)


def _check_owner(path: Path, info: os.stat_result) -> None:
    if info.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {info.st_uid}, so a library from there is not safe to run")


def _check_mode(path: Path, info: os.stat_result) -> None:
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others, so a library from there is not safe to run")


def _cached_library(compiler: str, folder: Path, name: str) -> Path:
    """The library of that name in ``folder``, compiled if it is not there yet.

    Raises:
        OSError: ``folder`` cannot be written to, or others can.
        BuildError: the compiler failed.
    """
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_folder(folder)
    if not os.path.lexists(path):
        with _locked(folder / f"{name}.lock"):
            if not os.path.lexists(path):  # nobody else made it while we waited
                compile_native(compiler, path)
    # Also where it was there already: the folder is safe now, but may not have been when the file was put there.
    _check_file(path)
    return path


def _key(compiler: str) -> str:
    # Size and time stand for the compiler's version; asking it would start another process each time.
    binary = os.stat(os.path.realpath(compiler))
    parts = [
        compiler,
        str(binary.st_size),
        str(binary.st_mtime_ns),
        *FLAGS,
        *map(str, BEST_FIRST),
        platform.machine(),
        _cpu_features(),
    ]
    text = "\n".join(parts).encode() + b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))
    return hashlib.sha256(text).hexdigest()[:16]


def _cpu_features() -> str:
    """What ``-march=native`` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the system gives it back if the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
