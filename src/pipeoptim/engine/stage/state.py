"""What of a stage is saved and restored, part by part; the parts that a stage has and those that a checkpoint has may differ."""

from __future__ import annotations

import copy
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.stage.clipping import StageClipper
from pipeoptim.engine.stage.finite_check import FiniteCheck
from pipeoptim.engine.stage.loss_scaling import LossScale
from pipeoptim.engine.stage.master_weights import MasterWeights
from pipeoptim.engine.stage.prediction_monitor import PredictionMonitor
from pipeoptim.engine.stage.prediction_scale import PredictionScale
from pipeoptim.engine.stage.reduction import Reduction
from pipeoptim.engine.stage.rng import StageRandom
from pipeoptim.engine.stage.tied_weights import TiedWeight
from pipeoptim.engine.transport.compression import Compressor
from pipeoptim.errors import ConfigError
from pipeoptim.weights import StageWeights
from pipeoptim.weights.store import WeightPredictor


class SavedStage(Protocol):
    """The parts of a stage (:class:`~pipeoptim.engine.stage.worker.StageWorker`) that have a state."""

    module: nn.Module
    reduction: Reduction
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    random: StageRandom
    weights: StageWeights
    predictor: WeightPredictor | None
    master_weights: MasterWeights
    clipper: StageClipper | None
    tied: list[TiedWeight]
    scaling: LossScale | None
    compressor: Compressor
    monitor: PredictionMonitor | None
    scale: PredictionScale | None
    finite: FiniteCheck


def state_of(stage: SavedStage) -> dict[str, Any]:
    """Everything a resumed run of ``stage`` needs to continue bit for bit, as tensors and plain data."""
    state: dict[str, Any] = {
        "module": stage.reduction.unwrapped(stage.module).state_dict(),
        "optimizer": None if stage.optimizer is None else stage.optimizer.state_dict(),
        "scheduler": None if stage.scheduler is None else stage.scheduler.state_dict(),
        "random": stage.random.state_dict(),
        "version": stage.weights.version,
        # Decides whether an update may predict in the same pass, which rounds differently (see StageWeights).
        "most_copies": stage.weights.most_copies,
        "predictor": None if stage.predictor is None else stage.predictor.state_dict(),
    }
    if stage.master_weights.pairs:
        state["masters"] = stage.master_weights.state_dict()
    if stage.clipper is not None:
        state["clip"] = stage.clipper.state_dict()
    if stage.tied:
        state["tied"] = {weight.name: weight.state_dict() for weight in stage.tied}
    if stage.scaling is not None:
        state["scaling"] = stage.scaling.state_dict()
    if stage.finite.skipped:
        state["skipped"] = list(stage.finite.skipped)
    if stage.finite.outliers is not None:
        state["losses"] = list(stage.finite.outliers.losses)
    if stage.scale is not None:
        state["scale"] = stage.scale.state_dict()
    if lost := stage.compressor.state_dict():
        state["compress"] = lost
    return state


_ALWAYS = ("module", "optimizer", "scheduler", "random", "version", "predictor")


def check_state(k: int, state: Any) -> None:
    """Raises ConfigError where ``state`` is not what :func:`state_of` gives."""
    missing = [name for name in _ALWAYS if not isinstance(state, dict) or name not in state]
    if missing:
        given = f"a dict without {', '.join(missing)}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ConfigError(f"the state of stage {k} is {given}, must be what stage_state_dict({k}) returned")


def restore(stage: SavedStage, state: dict[str, Any]) -> None:
    """Put :func:`state_of` back; what was not in use when it was saved begins anew."""
    stage.reduction.unwrapped(stage.module).load_state_dict(state["module"])
    # Copies: torch's optimizers go on writing into the tensors that they are given, which may be loaded once more later.
    if stage.optimizer is not None:
        stage.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    if stage.scheduler is not None and state["scheduler"] is not None:
        stage.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
    stage.random.load_state_dict(state["random"])
    stage.weights.version = state["version"]
    stage.weights.most_copies = state.get("most_copies", stage.weights.most_copies)
    if stage.predictor is not None and state["predictor"] is not None:
        stage.predictor.load_state_dict(state["predictor"])
    # After the module: without saved masters they begin as the module's weights, which have just been loaded.
    stage.master_weights.load_state_dict(state.get("masters"))
    if stage.clipper is not None:
        stage.clipper.load_state_dict(state.get("clip", {}))
    for weight in stage.tied:
        weight.load_state_dict(state.get("tied", {}).get(weight.name))
    if stage.scaling is not None and "scaling" in state:
        stage.scaling.load_state_dict(state["scaling"])
    # An empty state forgets what the compressor has lost in the run before: the residuals of other messages.
    stage.compressor.load_state_dict(state.get("compress", {}))
    stage.finite.skipped = list(state.get("skipped", ()))
    if stage.finite.outliers is not None:
        stage.finite.outliers.losses.clear()
        stage.finite.outliers.losses.extend(state.get("losses", ()))
    if stage.scale is not None:
        stage.scale.load_state_dict(state.get("scale"))
    # Its pending predictions were made for weights that are gone.
    if stage.monitor is not None:
        stage.monitor.forget()
