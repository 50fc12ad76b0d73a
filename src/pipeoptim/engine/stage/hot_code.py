"""The Python code between two computations of a stage, brought into the caches when a computation has just emptied them.

A mini-batch runs some 300 short functions of the engine and of torch around the stage's module. Each waits for memory several times, one
wait after the other; but their code lies where it lay in the last mini-batch, so all of it can be asked for at once::

    F of the module  ──►  prefetch  ──►  send, receive  ──►  B of the module  ──►  prefetch  ──►  send, update, predict, step() ...

Saved with cold caches: 30 to 100 us of 900 us per mini-batch and stage outside the module; each prefetch takes 5 us. Measured on the stages
of ``pipeoptim bench efficiency``, with 16 MB written while a device computes, every three mini-batches with it and without in turn. What
is asked for was seen in one mini-batch: code that has gone since does no harm, nor does code that was not seen.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available

_OURS = "pipeoptim."


def record_code(until: CodeType, use: Callable[[calls.CachePrefetch], None]) -> None:
    """Note what this thread runs until the function ``until`` returns; then ``use`` is given what prefetches it.

    Nothing happens under a profiler, whose place this would take, nor where there are no kernels.
    """
    if sys.getprofile() is not None or not available():
        return
    seen: dict[int, object] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen[id(frame.f_code)] = frame.f_code
            own = frame.f_locals.get("self")
            if type(own).__module__.startswith(_OURS):  # with its attributes, whose reference counts are written
                seen[id(own)] = own
                seen.update((id(one), one) for one in gc.get_referents(own))
        elif event == "return" and frame.f_code is until:
            sys.setprofile(None)
            use(calls.CachePrefetch(seen.values()))

    sys.setprofile(note)
