"""Failures on purpose: sentences that say what fails when, a run in which it does, and a comparison with one in which nothing did."""

from pipeoptim.faults.sentences import Fault, read_fault
from pipeoptim.faults.storm import random_faults
from pipeoptim.faults.trial import FaultRow, try_faults

__all__ = ["Fault", "FaultRow", "random_faults", "read_fault", "try_faults"]
