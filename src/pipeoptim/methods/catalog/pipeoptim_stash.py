"""PipeOptim with stashing (ours): the backward sees the predicted weights its forward used, so both are consistent.

F and B on ``W_hat(t+s) = W(t) - lr * s * dW(t)``, so ``W(t+s+1) = W(t+s) - lr * g(W_hat(t+s))``: a true gradient, at weights near
those that it updates.
"""

from pipeoptim.methods.method import Method
from pipeoptim.weights.sources import Predicted, Stashed

METHOD = Method(
    name="pipeoptim_stash",
    order="async_1f1b",
    forward=Predicted(),
    backward=Stashed(),
    summary="predicted weights in F, the same ones in B; D-k+1 copies",
    source="this project",
    deviations="PipeOptim forwards on the same weights, but runs the backward on the latest ones.",
)
