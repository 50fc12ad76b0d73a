"""SpecTrain (Chen et al., 2018): weights predicted in F and again in B, from a smoothed gradient of its own.

``v = 0.9 v + 0.1 grad``, ``W_hat = W - lr * s * v`` with ``s_f = floor(k/2) + D - k - 1`` and ``s_b = floor(k/2)``.
"""

from pipeoptim.methods.average_predictors import SmoothedGradient
from pipeoptim.methods.method import Method
from pipeoptim.schedule import Program
from pipeoptim.weights.sources import Predicted


def _updates(microbatches_ahead: int, program: Program, i: int) -> int:
    """Updates within that many micro-batches from micro-batch ``i`` on; the same number when M is 1."""
    return max(0, -(-(microbatches_ahead - i % program.microbatches) // program.microbatches))


def forward_steps(program: Program, k: int, i: int) -> int:
    """s_f of stage ``k``."""
    return _updates(k // 2 + program.depth - k - 1, program, i)


def backward_steps(program: Program, k: int, i: int) -> int:
    """s_b of stage ``k``."""
    return _updates(k // 2, program, i)


METHOD = Method(
    name="spectrain",
    order="async_1f1b",
    forward=Predicted(forward_steps),
    backward=Predicted(backward_steps),
    predictor=SmoothedGradient,
    summary="predicted in F and again in B from a smoothed gradient; 2 copies",
    source="Chen, Yang and Cheng, Efficient and Robust Parallel DNN Training through Model Parallelism (arXiv 1809.02839)",
    deviations=(
        "The update is that of the user's optimizer; with SGD(momentum=0.9, dampening=0.1) it is the paper's. The public code "
        "applies torch's momentum to the last gradient once more instead of v; the paper is followed. The paper has M = 1; "
        "with M > 1 the two numbers are counted in updates."
    ),
)
