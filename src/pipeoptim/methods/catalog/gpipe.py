"""GPipe (Huang et al., NeurIPS 2019): all forwards, all backwards, one synchronous update, then the next mini-batch.

``W(t+1) = W(t) - lr * g(W(t))``, g the mean of the gradients of the M micro-batches.
"""

from pipeoptim.methods.method import Method
from pipeoptim.weights.sources import Latest

METHOD = Method(
    name="gpipe",
    order="gpipe",
    forward=Latest(),
    backward=Latest(),
    summary="all F, then all B, flush; synchronous",
    source="Huang et al., GPipe, NeurIPS 2019 (arXiv 1811.06965)",
    deviations="Backwards run in the order of the forwards; the gradient is the same sum in another order.",
)
