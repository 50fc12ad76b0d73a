"""Kernels in C for what torch has none: an optimizer's step and the prediction after it in one pass over memory.

They are compiled once per machine, at first use, by the C compiler that is found (about half a second), and called through
`ctypes`: plain C on addresses, so no header of torch and no version of its binary interface matters. Where there is no
compiler everything still works, slower, and says so once. Nothing here knows of rules or engines.

On GPUs the prediction alone has a kernel, written in Triton (`triton_move`, `triton_source`), which comes with torch's builds for them.

Set ``PIPEOPTIM_KERNELS=0`` to do without, ``PIPEOPTIM_CACHE`` to choose where compiled libraries are kept.
"""

from pipeoptim.kernels.calls import Adam, AdamHow, Ahead, Counts, Fetch, Move, Sgd, SgdHow, Steps, Term, copy, run_moves
from pipeoptim.kernels.library import available, why_not
from pipeoptim.kernels.memory import flat
from pipeoptim.kernels.take import Take

__all__ = [
    "Adam",
    "AdamHow",
    "Ahead",
    "Counts",
    "Fetch",
    "Move",
    "Sgd",
    "SgdHow",
    "Steps",
    "Take",
    "Term",
    "available",
    "copy",
    "flat",
    "run_moves",
    "why_not",
]
