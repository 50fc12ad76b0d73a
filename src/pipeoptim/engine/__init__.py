"""Carrying actions out: all numerics in :mod:`.stage`, one process in :mod:`.emulator`, many in :mod:`.distributed`."""

from pipeoptim.engine.clip import Clip
from pipeoptim.engine.compress import Compression
from pipeoptim.engine.distributed import Schedule
from pipeoptim.engine.emulator import Emulator
from pipeoptim.engine.feed import Whole
from pipeoptim.engine.interleaved import InterleavedSchedule
from pipeoptim.engine.losses import add_loss, collect_losses
from pipeoptim.engine.masters import master_weights
from pipeoptim.engine.monitor import PredictionError, PredictionWarning
from pipeoptim.engine.stage import StageWorker
from pipeoptim.engine.trace import Trace

__all__ = [
    "Clip",
    "Compression",
    "Emulator",
    "InterleavedSchedule",
    "PredictionError",
    "PredictionWarning",
    "Schedule",
    "StageWorker",
    "Trace",
    "Whole",
    "add_loss",
    "collect_losses",
    "master_weights",
]
