"""How the C sources are compiled: for the processor at hand, or for every processor of its family at once.

Needs nothing but Python's own library, because ``setup.py`` runs this file as well.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC")
BEST_FIRST = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""Extra flags, in the order in which they are tried: not every compiler knows all of them."""

VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": ("-mavx2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "avx2": ("-mavx2",),
        "baseline": (),
    },
}
"""By machine, what a portable library has of every function; ``dispatch.c`` chooses at run time.

No variant uses fused multiply-adds, so all of them give the same bits. On other machines, NEON's among them, the baseline is all.
"""

TIMEOUT = 120.0


class BuildError(Exception):
    """No library could be made or loaded; the text says why, `remedy` what to do."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(" ".join(why.split()))
        self.remedy = remedy


def find_compiler() -> str:
    """The path of a C compiler.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CC")
    for name in filter(None, (chosen, "cc", "gcc", "clang")):
        found = shutil.which(name)
        if found:
            return found
    named = f", nor the {chosen!r} that CC names" if chosen else ""
    raise BuildError(f"no C compiler is found (cc, gcc or clang{named})", "install gcc or clang, or let CC name a C compiler")


def compile_native(compiler: str, path: Path) -> None:
    """Compile for the processor of this machine into the library ``path``, which others see complete or not at all.

    Raises:
        BuildError: the compiler failed.
    """
    said = ""
    for extra in BEST_FIRST:
        # In the same folder, so that os.replace is a rename and hence atomic.
        handle, part = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        os.close(handle)
        try:
            said = _error_line([compiler, *FLAGS, "-shared", *extra, str(SOURCES / "optim.c"), "-o", part, "-lm"])
            if not said:
                os.chmod(part, 0o755)  # whatever the umask allows: a library that others may write to is not loaded
                os.replace(part, path)
                return
        finally:
            Path(part).unlink(missing_ok=True)
    raise _compile_error(compiler, said)


def compile_portable(compiler: str, path: Path) -> None:
    """Compile all variants for this kind of machine into the library ``path``.

    It is not linked with an OpenMP runtime: it takes the one that torch has loaded, under whatever name torch ships it.

    Raises:
        BuildError: the compiler failed.
    """
    variants = VARIANTS.get(platform.machine(), {"baseline": ()})
    with tempfile.TemporaryDirectory(prefix="pipeoptim-build-") as folder:
        objects = []
        for variant, extra in variants.items():
            # The same source per variant; -DVARIANT makes the names of its functions differ.
            objects.append(f"{folder}/{variant}.o")
            _run_compiler(
                compiler, *FLAGS, "-fopenmp", *extra, f"-DVARIANT={variant}", "-c", str(SOURCES / "optim.c"), "-o", objects[-1]
            )
        objects.append(f"{folder}/dispatch.o")
        defined = [f"-DHAS_{variant.upper()}" for variant in variants]
        _run_compiler(compiler, *FLAGS, *defined, "-c", str(SOURCES / "dispatch.c"), "-o", objects[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        _run_compiler(compiler, "-shared", *objects, "-o", str(path), "-lm")


def _run_compiler(compiler: str, *arguments: str) -> None:
    said = _error_line([compiler, *arguments])
    if said:
        raise _compile_error(compiler, said)


def _compile_error(compiler: str, said: str) -> BuildError:
    return BuildError(f"{compiler} failed: {said}", "install gcc or clang, or let CC name another C compiler")


def _error_line(command: list[str]) -> str:
    """The line that says why the command failed; empty if it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT:g} s"
    except OSError as error:  # found, but not a program of this machine
        return str(error)
    lines = done.stderr.strip().splitlines()
    # Compilers print warnings and notes first.
    telling = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {done.returncode}"]
    return telling[0].strip() if done.returncode else ""
