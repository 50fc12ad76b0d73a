"""Carrying actions out: all numerics in :mod:`.stage`, one process in :mod:`.emulator`, many in :mod:`.distributed`."""

from pipeoptim.engine.distributed import Schedule
from pipeoptim.engine.emulator import Emulator
from pipeoptim.engine.evaluation import Evaluation
from pipeoptim.engine.init_group import init_process_group
from pipeoptim.engine.interleaved import InterleavedSchedule
from pipeoptim.engine.marks import Along, MicroBatches, Whole
from pipeoptim.engine.stage.adagc import AdaGC
from pipeoptim.engine.stage.clip import Clip
from pipeoptim.engine.stage.losses import add_loss, collect_losses
from pipeoptim.engine.stage.master_weights import master_weights
from pipeoptim.engine.stage.prediction_monitor import PredictionError, PredictionWarning
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.engine.trace import Trace
from pipeoptim.engine.transport.compression import Compression

__all__ = [
    "AdaGC",
    "Along",
    "Clip",
    "Compression",
    "Emulator",
    "Evaluation",
    "InterleavedSchedule",
    "MicroBatches",
    "PredictionError",
    "PredictionWarning",
    "Schedule",
    "StageWorker",
    "Trace",
    "Whole",
    "add_loss",
    "collect_losses",
    "init_process_group",
    "master_weights",
]
