"""PipeOptim: asynchronous pipeline training that learns like synchronous training.

In a pipeline that never flushes, a mini-batch's forward runs on weights that are several updates older than those of its
backward. PipeOptim predicts, before each forward, the weights that will be there at the backward, from the update rule of
whichever optimizer is used, and keeps at most two copies of the weights per device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeoptim.errors import ConfigError, CorruptionError, DivergedError, PipeOptimError, StageFailure
from pipeoptim.version import __version__

if TYPE_CHECKING:
    from pipeoptim import optim
    from pipeoptim.checkpoint import (
        Checkpointer,
        check_export,
        full_state_dict,
        load_sharded,
        load_weights,
        save_sharded,
        save_weights,
    )
    from pipeoptim.engine import (
        AdaGC,
        Along,
        Clip,
        Compression,
        Emulator,
        Evaluation,
        InterleavedSchedule,
        MicroBatches,
        PredictionError,
        Schedule,
        Trace,
        Whole,
        add_loss,
        collect_losses,
        init_process_group,
        master_weights,
    )
    from pipeoptim.methods import METHODS, Method, get_method, register_method
    from pipeoptim.options import PipelineOptions
    from pipeoptim.partitioning import Partition, partition, untie
    from pipeoptim.rules import CombinedOptimizer, muon_adamw, predict_weights, register_rule, track
    from pipeoptim.telemetry.trace import merge_trace

# Names that need torch are imported when first used, so that the command line answers at once.
_LAZY = {
    "AdaGC": "pipeoptim.engine",
    "Along": "pipeoptim.engine",
    "Checkpointer": "pipeoptim.checkpoint",
    "Clip": "pipeoptim.engine",
    "CombinedOptimizer": "pipeoptim.rules",
    "Compression": "pipeoptim.engine",
    "Emulator": "pipeoptim.engine",
    "Evaluation": "pipeoptim.engine",
    "InterleavedSchedule": "pipeoptim.engine",
    "METHODS": "pipeoptim.methods",
    "MicroBatches": "pipeoptim.engine",
    "Method": "pipeoptim.methods",
    "Trace": "pipeoptim.engine",
    "merge_trace": "pipeoptim.telemetry.trace",
    "PredictionError": "pipeoptim.engine",
    "Schedule": "pipeoptim.engine",
    "Whole": "pipeoptim.engine",
    "add_loss": "pipeoptim.engine",
    "check_export": "pipeoptim.checkpoint",
    "collect_losses": "pipeoptim.engine",
    "full_state_dict": "pipeoptim.checkpoint",
    "init_process_group": "pipeoptim.engine",
    "get_method": "pipeoptim.methods",
    "load_sharded": "pipeoptim.checkpoint",
    "load_weights": "pipeoptim.checkpoint",
    "master_weights": "pipeoptim.engine",
    "muon_adamw": "pipeoptim.rules",
    "predict_weights": "pipeoptim.rules",
    "Partition": "pipeoptim.partitioning",
    "PipelineOptions": "pipeoptim.options",
    "partition": "pipeoptim.partitioning",
    "register_method": "pipeoptim.methods",
    "register_rule": "pipeoptim.rules",
    "save_sharded": "pipeoptim.checkpoint",
    "save_weights": "pipeoptim.checkpoint",
    "track": "pipeoptim.rules",
    "untie": "pipeoptim.partitioning",
}

__all__ = [
    "METHODS",
    "AdaGC",
    "Along",
    "Checkpointer",
    "Clip",
    "CombinedOptimizer",
    "Compression",
    "ConfigError",
    "CorruptionError",
    "DivergedError",
    "Emulator",
    "Evaluation",
    "InterleavedSchedule",
    "Method",
    "MicroBatches",
    "Partition",
    "PipeOptimError",
    "PipelineOptions",
    "PredictionError",
    "Schedule",
    "StageFailure",
    "Trace",
    "Whole",
    "__version__",
    "add_loss",
    "check_export",
    "collect_losses",
    "full_state_dict",
    "get_method",
    "init_process_group",
    "load_sharded",
    "load_weights",
    "master_weights",
    "merge_trace",
    "muon_adamw",
    "optim",
    "partition",
    "predict_weights",
    "register_method",
    "register_rule",
    "save_sharded",
    "save_weights",
    "track",
    "untie",
]


def __getattr__(name: str) -> Any:
    if name == "optim":
        return import_module("pipeoptim.optim")
    if name not in _LAZY:
        raise AttributeError(f"module 'pipeoptim' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
