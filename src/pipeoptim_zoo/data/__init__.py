"""Data sets of the zoo. Each constructor returns a :class:`Task`: batches, loss and metrics in one object."""

from pipeoptim_zoo.data.losses import (
    IGNORE,
    PADDING,
    accuracy,
    auxiliary_cross_entropy,
    cross_entropy,
    label_smoothing,
    token_accuracy,
)
from pipeoptim_zoo.data.task import ExampleSource, IndexedTask, Task, TensorSource

__all__ = [
    "IGNORE",
    "IndexedTask",
    "PADDING",
    "ExampleSource",
    "Task",
    "TensorSource",
    "accuracy",
    "auxiliary_cross_entropy",
    "cross_entropy",
    "label_smoothing",
    "token_accuracy",
]
