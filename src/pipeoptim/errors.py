"""The errors that users see: one sentence each, with the value, the reason and what to do; and what such sentences are made of."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from types import FrameType

from pipeoptim.explained import is_named, with_name


class PipeOptimError(Exception):
    """Base of every error that PipeOptim raises on purpose. Where ``pipeoptim explain`` has more on it, it says so at its end."""

    def __str__(self) -> str:
        return with_name(super().__str__())


class ConfigError(PipeOptimError, ValueError):
    """Input that cannot work, found before any work started. The command line ends with exit code 2.

    Attributes:
        topic: what ``pipeoptim explain`` says more under: the module that refuses, as ``"engine.microbatches"``. Unless the message names
            an explanation, a traceback ends with it, and so does what the command line prints. Empty for an error that a script raises.
    """

    def __init__(self, *words: object) -> None:
        super().__init__(*words)
        self.topic = _topic(sys._getframe(1))
        if self.topic and not is_named(str(self)):
            self.add_note(f"More: pipeoptim explain {self.topic}")

    def __str__(self) -> str:
        # Values are shown as they print themselves, some of them (an optimizer, a module) on several lines.
        return " ".join(line.strip() for line in super().__str__().splitlines())


def _topic(frame: FrameType | None) -> str:
    """Of whoever makes an error: its module, without the package's name; not this one, which makes some for others."""
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    package, _, module = (frame.f_globals.get("__name__") or "" if frame is not None else "").partition(".")
    return {"pipeoptim": module, "pipeoptim_zoo": f"zoo.{module}"}.get(package, "")


class DivergedError(PipeOptimError):
    """The loss, a gradient or a weight is not a finite number any more, or the loss is an outlier.

    Attributes:
        mini_batch: the one to blame, counted from 0; None where none is known.
    """

    def __init__(self, message: str, mini_batch: int | None = None) -> None:
        super().__init__(message)
        self.mini_batch = mini_batch


class CorruptionError(PipeOptimError):
    """What was computed twice from the same bits, or has come from another machine, has other bits: a fault of a processor, of memory or
    of a link."""


class StageFailure(PipeOptimError, RuntimeError):
    """Another stage died or stopped answering; the message names it."""


def first_line(error: BaseException) -> str:
    """What of an error of another library fits into a sentence.

    >>> first_line(RuntimeError("out of memory\\nat line 3")), first_line(KeyError())
    ('out of memory', 'no reason given')
    """
    return (str(error).splitlines() or ["no reason given"])[0][:160]


def unknown_name(what: str, value: str, known: Iterable[str], more: str = "") -> ConfigError:
    """The error for a ``value`` that is not among ``known``: it names the closest one, and all of them.

    >>> str(unknown_name("engine", "procs", ["emulator", "processes"]))
    "unknown engine 'procs'; did you mean 'processes'? known: emulator, processes"
    """
    names = sorted(known)
    hint = did_you_mean(value, names)
    return ConfigError(f"unknown {what} {value!r}{hint or ';'} known: {', '.join(names)}{more}")


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """The end of a sentence that names what is closest to ``value`` among ``known``; empty where nothing is."""
    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def counted(count: int, what: str) -> str:
    """How many there are, in words.

    >>> counted(1, "micro-batch"), counted(1200, "micro-batch"), counted(0, "stage")
    ('1 micro-batch', '1,200 micro-batches', '0 stages')
    """
    plural = what + ("es" if what.endswith(("s", "x", "ch", "sh")) else "s")
    return f"{count:,} {what if count == 1 else plural}"


def bytes_in_words(count: float) -> str:
    """A number of bytes in the unit that suits it.

    >>> bytes_in_words(3 << 20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
