"""PipeDream-2BW (Narayanan et al., ICML 2021): two versions of the weights, a delay of one update on every stage.

``W(t+1) = W(t) - lr * g(W(t-1))``: mini-batch n runs on the newest version that all stages have when it enters. With error feedback
``W(t+1) = W(t) - 2 u(t) + u(t-1)``, u(t) the optimizer's update from ``g(W(t-1))``, learning rate included.
"""

from dataclasses import replace

from pipeoptim.methods.method import Method
from pipeoptim.optim import ErrorFeedback
from pipeoptim.schedule import Program
from pipeoptim.weights.sources import Numbered, Stashed


def one_behind(program: Program, k: int, i: int) -> int:
    """The version of micro-batch ``i``'s mini-batch n: n - 1 in a pipeline, n on a single stage."""
    # Decided by the first micro-batch, so that all of a mini-batch use one version.
    return program.version_at_forward(0, i - i % program.microbatches)


METHOD = Method(
    name="pipedream_2bw",
    order="async_1f1b",
    forward=Numbered(one_behind, counts=True),
    backward=Stashed(),
    at_least_depth_microbatches=True,
    summary="double-buffered weights, a gap of one update everywhere; 2 copies, M >= D",
    source="Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021 (arXiv 2006.09503)",
    deviations=(
        "The public code skips gradient clipping and the overflow check under double buffering and does not swap the float32 "
        "master weights; here the optimizer always updates the latest weights. At depth 1 there is no delay."
    ),
)


def pipedream_2bw(error_feedback: bool = False) -> Method:
    """PipeDream-2BW with its own setting.

    Args:
        error_feedback: each update is corrected by the one before, see :class:`pipeoptim.optim.ErrorFeedback`; one more copy of the
            weights, as state of the optimizer.

    Example:
        >>> pipedream_2bw(error_feedback=True).name
        'pipedream_2bw+error_feedback'
    """
    if not error_feedback:
        return METHOD
    return replace(
        METHOD,
        name="pipedream_2bw+error_feedback",
        compensation=ErrorFeedback,
        summary="the same, each update corrected by the one before",
        source="Zmushko et al., One-Step Gradient Delay is Not a Barrier, 2026 (arXiv 2606.30634), on PipeDream-2BW",
        deviations=METHOD.deviations,
    )


VARIANTS = (pipedream_2bw(error_feedback=True),)

FACTORY = pipedream_2bw
