"""Optimizers that bear delay: ``pipeoptim.optim``, usable with and without a pipeline.

They know nothing of pipelines: what a pipeline must tell them is a number, the version gap.
"""

from pipeoptim.optim.linear_weights import linear_weights
from pipeoptim.optim.rotated_adam import RotatedAdam

__all__ = ["RotatedAdam", "linear_weights"]
