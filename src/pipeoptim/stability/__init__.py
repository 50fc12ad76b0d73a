"""Theory in numbers: up to which learning rate a stage converges on a quadratic, and how wrong predictions are.

Nothing here trains, and nothing but `pipelines`, which reads the tables of methods, imports torch. docs/theory.md explains it, and
tests hold it equal to what the emulator does.
"""

from pipeoptim.stability.bound import largest_stable_rate, spectral_radius
from pipeoptim.stability.error_terms import ErrorTerms, error_terms, pays_above
from pipeoptim.stability.linear_stage import LinearStage
from pipeoptim.stability.optimizers import LINEAR_OPTIMIZERS, LinearOptimizer, linear_optimizer
from pipeoptim.stability.predictions import PREDICTIONS

__all__ = [
    "LINEAR_OPTIMIZERS",
    "PREDICTIONS",
    "LinearOptimizer",
    "LinearStage",
    "ErrorTerms",
    "largest_stable_rate",
    "linear_optimizer",
    "pays_above",
    "error_terms",
    "spectral_radius",
]
