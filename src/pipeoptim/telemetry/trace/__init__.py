"""A recorded run as something to look at: a Chrome/Perfetto trace, a picture, and how each stage spent its time."""

from pipeoptim.telemetry.trace.merge import MergedTrace, merge_trace
from pipeoptim.telemetry.trace.shares import StageShares

__all__ = ["MergedTrace", "StageShares", "merge_trace"]
