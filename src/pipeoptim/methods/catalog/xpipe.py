"""XPipe (Guan et al., 2019): the first of T micro-batches predicts for its mini-batch, once for F and once for B.

``W_hat = W - lr * s * (v/(1-g)) / (sqrt(m/(1-l)) + eps)``, ``s_f = round((D + T - k/2 - 2) / T)`` and
``s_b = floor((T + floor(k/2) - 1) / T)``.
"""

from pipeoptim.methods.average_predictors import SmoothedAdam
from pipeoptim.methods.method import Method
from pipeoptim.schedule import Program
from pipeoptim.weights.sources import PredictedOnce


def forward_steps(program: Program, k: int, i: int) -> int:
    """s_f of stage ``k``; T is the number of micro-batches."""
    if program.depth == 1:
        return 0
    t = program.microbatches
    return max(0, round((program.depth + t - k / 2 - 2) / t))


def backward_steps(program: Program, k: int, i: int) -> int:
    """s_b of stage ``k``."""
    t = program.microbatches
    return (t + k // 2 - 1) // t


METHOD = Method(
    name="xpipe",
    order="async_1f1b",
    forward=PredictedOnce(forward_steps),
    backward=PredictedOnce(backward_steps),
    predictor=SmoothedAdam,
    summary="the first micro-batch predicts for its mini-batch, in F and in B, Adam's form; 3 copies",
    source="Guan et al., XPipe (arXiv 1911.04610)",
    deviations=(
        "FairScale's version counts with the index of the micro-batch where the paper has T, and its backward rounds to zero "
        "by operator precedence; the paper is followed. Nothing is predicted at depth 1, though the formula would."
    ),
)
