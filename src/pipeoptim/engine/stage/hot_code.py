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
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available

MOST = 2000
"""Functions and objects that are prefetched at most. Usual are 350, in 0.2 MB; a mini-batch in which torch.compile was at work had 6300, in
3.6 MB, which would drive from the caches what they are to bring."""


def record_code(until: CodeType, owners: Iterable[object], use: Callable[[calls.CachePrefetch], None]) -> None:
    """Note what this thread runs until the function ``until`` returns; then ``use`` is given what prefetches it.

    Nothing happens under a profiler, whose place this would take, nor where there are no kernels, nor if more than :data:`MOST` ran.

    Args:
        until: of the caller.
        owners: objects whose methods run; they and what they refer to are prefetched as well, since their reference counts are written.
        use: takes the prefetch.
    """
    if sys.getprofile() is not None or not available():
        return
    # Code only: whoever looks at a frame's variables keeps activations alive that the frame has let go of.
    seen: dict[int, object] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen[id(frame.f_code)] = frame.f_code
        elif event == "return" and frame.f_code is until:
            sys.setprofile(None)
            seen.update((id(one), one) for owner in owners for one in (owner, *gc.get_referents(owner)))
            if len(seen) <= MOST:
                use(calls.CachePrefetch(seen.values()))

    sys.setprofile(note)
