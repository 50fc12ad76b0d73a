"""Which weights are in the module: the latest, predicted or stashed ones, and how a backward finds those it needs."""

from pipeoptim.weights.layout import BufferSet, StorageLayout
from pipeoptim.weights.progress import UpdateProgress
from pipeoptim.weights.saved import SavedWeights
from pipeoptim.weights.sources import Latest, Numbered, Predicted, PredictedOnce, Source, Stashed
from pipeoptim.weights.store import StageWeights, WeightKey, WeightSet
from pipeoptim.weights.swap import swapped

__all__ = [
    "BufferSet",
    "UpdateProgress",
    "WeightKey",
    "WeightSet",
    "Latest",
    "Numbered",
    "Predicted",
    "PredictedOnce",
    "SavedWeights",
    "Source",
    "StageWeights",
    "Stashed",
    "StorageLayout",
    "swapped",
]
