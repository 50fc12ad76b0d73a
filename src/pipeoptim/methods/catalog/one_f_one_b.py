"""1F1B with a flush (DAPPLE; PipeDream-Flush): GPipe's learning and bubble, with at most D-k activations alive.

``W(t+1) = W(t) - lr * g(W(t))``, g the mean of the gradients of the M micro-batches.
"""

from pipeoptim.methods.method import Method
from pipeoptim.weights.sources import Latest

METHOD = Method(
    name="1f1b",
    order="1f1b",
    forward=Latest(),
    backward=Latest(),
    summary="1F1B inside a mini-batch, flush; synchronous",
    source="Fan et al., DAPPLE, PPoPP 2021 (arXiv 2007.01045); Narayanan et al., ICML 2021 (arXiv 2006.09503), PipeDream-Flush",
    deviations="None.",
)
