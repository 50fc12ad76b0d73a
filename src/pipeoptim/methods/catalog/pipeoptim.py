"""PipeOptim (Guan et al., arXiv 2312.00839): the forward runs on the weights predicted for its own backward.

``W_hat(t+s) = W_t - lr * s * dW_t`` in F, the latest weights in B, s the version gap of the stage.
"""

from pipeoptim.methods.method import Method
from pipeoptim.weights.sources import Latest, Predicted

METHOD = Method(
    name="pipeoptim",
    order="async_1f1b",
    forward=Predicted(),
    backward=Latest(),
    summary="weights predicted for the backward in F, latest in B; 2 copies",
    source="Guan et al., PipeOptim (arXiv 2312.00839), section 4",
    deviations=(
        "The gap is counted in the action program: it is smaller during warm-up and with several micro-batches per update, "
        "and 0 on the last stage. The authors' public code uses one more, see the paper's formula s = D - 1 - k."
    ),
)
