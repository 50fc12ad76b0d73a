"""Optimizers that bear delay: ``pipeoptim.optim``, usable with and without a pipeline.

They know nothing of pipelines: what a pipeline must tell them is a number, the version gap.
"""

from pipeoptim.optim.delay_compensation import DelayCompensation
from pipeoptim.optim.error_feedback import ErrorFeedback
from pipeoptim.optim.linear_weights import linear_weights
from pipeoptim.optim.rotated_adam import RotatedAdam
from pipeoptim.optim.spike_compensation import SpikeCompensation

__all__ = ["DelayCompensation", "ErrorFeedback", "RotatedAdam", "SpikeCompensation", "linear_weights"]
