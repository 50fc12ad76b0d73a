"""PipeDream (Narayanan et al., SOSP 2019): weight stashing, so that the backward sees the weights its forward used."""

from pipeoptim.methods.method import Method
from pipeoptim.weights.sources import Latest, Stashed

METHOD = Method(
    name="pipedream",
    order="async_1f1b",
    forward=Latest(),
    backward=Stashed(),
    summary="latest weights in F, the same stashed ones in B; D-k copies",
    source="Narayanan et al., PipeDream, SOSP 2019 (arXiv 1806.03377), weight stashing",
    deviations="Vertical sync, optional in the paper and absent from its public runtime, is off.",
)
