"""Kernels in C for what torch has none: an optimizer's step and the prediction after it in one pass over memory.

A wheel brings them compiled for all processors of its kind; elsewhere they are compiled once per machine, at first use, by the C
compiler that is found (about half a second). They are called through `ctypes`: plain C on addresses, so no header of torch and no
version of its binary interface matters. Without them everything still works, slower, and says so once. Nothing here knows of rules
or engines.

On GPUs the prediction alone has a kernel, written in Triton (`triton_move`, `triton_source`), which comes with torch's builds for them.

Set ``PIPEOPTIM_KERNELS=off`` to do without, ``PIPEOPTIM_KERNELS=native`` to have them compiled for this very machine also where they came
with the wheel, ``PIPEOPTIM_CACHE`` to choose where compiled libraries are kept.
"""

from pipeoptim.kernels.calls import (
    AdamCoefficients,
    AdamTensors,
    CachePrefetch,
    EstimateFactors,
    EstimateParts,
    KernelMove,
    KernelPrediction,
    KernelTerm,
    MultiTensorStep,
    SgdCoefficients,
    SgdTensors,
    StepCounters,
    copy_tensors,
    norm_of_estimates,
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
    "EstimateFactors",
    "EstimateParts",
    "KernelMove",
    "SgdTensors",
    "SgdCoefficients",
    "MultiTensorStep",
    "TensorSampler",
    "KernelTerm",
    "available",
    "copy_tensors",
    "norm_of_estimates",
    "share_flat_index",
    "run_moves",
    "why_not",
]
