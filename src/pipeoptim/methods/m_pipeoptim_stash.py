"""PipeOptim with stashing (ours): the backward sees the predicted weights its forward used, so both are consistent."""

from pipeoptim.methods.method import Method
from pipeoptim.weights.sources import Predicted, Stashed

METHOD = Method(
    name="pipeoptim_stash",
    order="async_1f1b",
    forward=Predicted(),
    backward=Stashed(),
    summary="predicted weights in F, the same ones in B; D-k+1 copies",
    source="this project",
)
