"""Carrying actions out: all numerics in :mod:`.stage`, one process in :mod:`.emulator`, many in :mod:`.distributed`."""

from pipeoptim.engine.distributed import Schedule
from pipeoptim.engine.emulator import Emulator
from pipeoptim.engine.stage import StageWorker

__all__ = ["Emulator", "Schedule", "StageWorker"]
