"""Kernels in C for what torch has none: an optimizer's step and the prediction after it in one pass over memory.

They are compiled once per machine, at first use, by the C compiler that is found (about half a second), and called through
`ctypes`: plain C on addresses, so no header of torch and no version of its binary interface matters. Where there is no
compiler everything still works, slower, and says so once. Nothing here knows of rules or engines.

On GPUs the prediction alone has a kernel, written in Triton (`triton_move`, `triton_source`), which comes with torch's builds for them.

Set ``PIPEOPTIM_KERNELS=0`` to do without, ``PIPEOPTIM_CACHE`` to choose where compiled libraries are kept.
"""

from pipeoptim.kernels.calls import (
    AdamCoefficients,
    AdamTensors,
    CachePrefetch,
    KernelMove,
    KernelPrediction,
    KernelTerm,
    MultiTensorStep,
    SgdCoefficients,
    SgdTensors,
    StepCounters,
    copy_tensors,
    run_moves,
)
from pipeoptim.kernels.library import available, why_not
from pipeoptim.kernels.sampling import TensorSampler
from pipeoptim.kernels.tensor_layout import share_flat_index

__all__ = [
    "AdamTensors",
    "AdamCoefficients",
    "KernelPrediction",
    "StepCounters",
    "CachePrefetch",
    "KernelMove",
    "SgdTensors",
    "SgdCoefficients",
    "MultiTensorStep",
    "TensorSampler",
    "KernelTerm",
    "available",
    "copy_tensors",
    "share_flat_index",
    "run_moves",
    "why_not",
]
