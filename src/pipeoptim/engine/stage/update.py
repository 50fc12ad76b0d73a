"""The update of one stage: gradients become final in steps, some of which wait for other processes, then the optimizer moves the weights.

::

    IDLE --U--> ANNOUNCED --[mean over replicas, loss scale removed, tied gradients sent]--> GRADIENTS_FINAL
     ^                                                                                             |
     |                                           [sums of tied gradients received, own norm sent to the other stages]
     |                                                                                             v
     '------[norms received, clipped, optimizer and scheduler stepped, version + 1]------------ COMPLETE

Where nothing waits, U goes all the way at once. Otherwise it begins what others wait for, and the stage's next F or B finishes it, so that
averages and norms travel while the stage has other work.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum, auto

from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.stage.audit import UpdateAudit
from pipeoptim.engine.stage.checks import skip_step
from pipeoptim.engine.stage.clipping import StageClipper
from pipeoptim.engine.stage.displacement_samples import DisplacementSamples
from pipeoptim.engine.stage.finite_check import FiniteCheck
from pipeoptim.engine.stage.forward_weights import ForwardWeights
from pipeoptim.engine.stage.loss_scaling import LossScale
from pipeoptim.engine.stage.master_weights import MasterWeights
from pipeoptim.engine.stage.prediction_scale import PredictionScale
from pipeoptim.engine.stage.reduction import Reduction
from pipeoptim.engine.stage.script_calls import ScriptCalls
from pipeoptim.engine.stage.tied_weights import TiedWeight
from pipeoptim.engine.stage.weight_writes import versions_of
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.schedule import Program
from pipeoptim.weights import StageWeights


class UpdateState(Enum):
    """How far the update of the mini-batch whose backwards are done has come."""

    IDLE = auto()
    ANNOUNCED = auto()
    GRADIENTS_FINAL = auto()
    COMPLETE = auto()


_IDLE, _GRADIENTS_FINAL, _COMPLETE = UpdateState.IDLE, UpdateState.GRADIENTS_FINAL, UpdateState.COMPLETE


class StageUpdate:
    """Carries out the updates of stage ``k``.

    Args:
        optimizer, scheduler: of the stage; None where it has none.
        step: moves the weights, in place of ``optimizer.step`` itself where a kernel does it.
        parameters: what the optimizer moves.
        weights, forward_weights, master_weights: the versions that an update makes and ends.
        method, program, k: for the learning rate's scale, and how far ahead the next forwards predict.
        reduction: makes gradients the mean over replicas.
        tied: weights whose gradients are summed over stages.
        clipper, scaling, scale: None where the stage does not clip, scale its loss, or adapt its predictions.
        finite: says whether an update is left out because the loss is bad or a gradient is not finite.
        observers: measure predictions, the scale among them.
        audit: does some updates again; None for none.
        on_update: called after every update with stage and version; None for nothing.
        script_calls: tells the pipeline's calls of the optimizer from those of a script.

    Attributes:
        state: how far the present update has come.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        scheduler: LRScheduler | None,
        step: Callable[[], object],
        parameters: Sequence[Tensor],
        weights: StageWeights,
        forward_weights: ForwardWeights,
        master_weights: MasterWeights,
        method: Method,
        program: Program,
        k: int,
        *,
        reduction: Reduction,
        tied: Sequence[TiedWeight],
        clipper: StageClipper | None,
        scaling: LossScale | None,
        finite: FiniteCheck,
        observers: Sequence[DisplacementSamples],
        scale: PredictionScale | None,
        audit: UpdateAudit | None,
        on_update: Callable[[int, int], None] | None,
        script_calls: ScriptCalls,
    ) -> None:
        self.optimizer, self.scheduler, self.step, self.parameters = optimizer, scheduler, step, parameters
        self.weights, self.forward_weights, self.master_weights = weights, forward_weights, master_weights
        self.program, self.k, self.lr_scale = program, k, method.lr_scale
        self.synchronous_updates = method.synchronous_updates
        self.reduction, self.tied, self.clipper, self.scaling = reduction, tied, clipper, scaling
        self.observers, self.scale, self.on_update, self.script_calls = observers, scale, on_update, script_calls
        self.finite, self.audit = finite, audit
        # A single stage's norm is the global one: there is nobody to wait for, and U can go all the way.
        self.waits_for_norms = clipper is not None and clipper.rule.waits and program.depth > 1
        self.state = UpdateState.IDLE

    def __call__(self) -> None:
        """U: one step of the optimizer, of the schedule of its learning rate, and of the version count.

        Where it waits for others (replicas, or other stages for tied weights and when clipping by the global norm) only its part
        in the exchange is begun here, and the rest is done by :meth:`finish`, which the stage's next F or B calls.
        """
        if self.announce():
            self.finish()

    def announce(self) -> bool:
        """The gradients of the mini-batch are there. Begins what others wait for; returns whether :meth:`finish` is due at once."""
        self.state = UpdateState.ANNOUNCED
        if self.waits_for_norms:
            self._finish_own_gradients()
            if self._sums_arrived():
                self._complete_gradients()  # the other stages wait for our norm
            return False
        if self.reduction.deferred:  # the mean over replicas travels until the next forward or backward needs the weights
            return False
        if self.tied:
            self._finish_own_gradients()
        return not self.tied

    def can_finish(self) -> bool:
        """Whether :meth:`finish` would not wait for a stage whose turn is later; sends to the others what has become final.

        Only stages that take turns in one process need to ask; between processes a wait lets the others go on.
        """
        if self.state is _IDLE:
            return True
        if self.state is not _COMPLETE:
            if not self._sums_arrived():
                return False
            if self.clipper is None:
                return True
            self._complete_gradients()
        return self.clipper is None or self.clipper.can_clip(self.weights.version)

    def finish(self) -> None:
        """Carry out the update that was announced; waits for what others send."""
        if self.state is not _COMPLETE:
            self._complete_gradients()
        overflowed = not self._clip()  # and loss scaling tries again with less
        bad = not overflowed and bool(self.finite.found)
        if bad:
            self.finite.note_skipped(self.weights.version)
        # All waits are above this line, all writes into weights below: an interrupted wait leaves the weights of one version.
        self.state = UpdateState.IDLE
        # Before before_update(): a version that coming forwards will ask for by number is held here, and copied there.
        self.forward_weights.retain()
        self.weights.before_update()  # versions that a micro-batch in flight will ask for are copied now or lost
        if self.scale is not None:
            self.scale.apply()
        self.script_calls.by_pipeline = True
        try:
            if overflowed or bad:  # a version like any other, but the predictor must not take in gradients that are not finite
                self.weights.update(skip_step)
                self.weights.after_skipped_update()
            else:
                self._step()
                self.weights.after_update()
            # Let go of the gradients' memory, in which a fused step may just have written the prediction.
            _zero_grad(self.optimizer)
        finally:
            self.script_calls.by_pipeline = False
        if self.scheduler is not None and not overflowed:
            # Not after an overflow: the rate must not run ahead of the optimizer's steps. What was left out was a mini-batch of its own.
            self._step_scheduler(self.scheduler)
        self._note_version(self.weights.version, bad)
        self.finite.end_mini_batch()
        self.weights.next_is_skipped = False

    def abandon(self) -> None:
        """Forget an update that was begun, its gradients and what was exchanged for it."""
        self.state = UpdateState.IDLE
        self.reduction.abandon()
        for p in self.parameters:
            p.grad = None
        for weight in self.tied:
            weight.abandon()
        if self.clipper is not None:
            self.clipper.abandon()
        self.weights.next_is_skipped = False
        if self.scaling is not None:
            self.scaling.abandon()

    # -- gradients -----------------------------------------------------------------------------------------------------

    def _finish_own_gradients(self) -> None:
        """Gradients become the mean over the replicas, without loss scale; those of tied weights go to the other holders."""
        # First the mean, then the check for overflows: one replica's infinity is then in the mean of all, and all skip alike.
        if self.reduction.finish() and not self.finite.found:
            self.finite.found = "the mini-batch is bad on another replica"
        if self.scaling is not None and not self.finite.found:  # else its gradients say nothing of the scale
            self.scaling.unscale(self.parameters)
        for weight in self.tied:
            if self.finite.found:
                weight.optimized.grad = None  # all holders know of it: together they send zeros
            # After the mean over replicas, so that the holders of each replica sum what all replicas agree on.
            weight.send_gradient(self.weights.version)
        self.state = _GRADIENTS_FINAL

    def _sums_arrived(self) -> bool:
        return all(weight.can_receive(self.weights.version) for weight in self.tied)

    def _complete_gradients(self) -> None:
        """Gradients become what clipping starts from: those of tied weights the sum over their holders."""
        if self.state is not _GRADIENTS_FINAL:
            self._finish_own_gradients()
        for weight in self.tied:
            weight.receive_sum(self.weights.version)
        if self.clipper is not None:
            # The norm is measured with the summed gradient of tied weights in place: that is what will be applied.
            self.clipper.send_norm(self.weights.version)
        self.state = _COMPLETE

    def _clip(self) -> bool:
        """Look at the gradients and scale them. Returns False where loss scaling finds that the update must be skipped."""
        # Received even where the update is left out: every norm that was sent is received once, in order.
        norm = None if self.clipper is None else self.clipper.norm(self.weights.version)
        if self.scaling is None:
            self.finite.judge_gradients(self.parameters, self.weights.version, norm)
        if self.finite.found:
            return True
        if self.scaling is not None and not self._fits_scale(self.scaling, norm):
            return False
        if self.clipper is not None and norm is not None:
            self.clipper.apply(norm)
        return True

    def _fits_scale(self, scaling: LossScale, norm: Tensor | float | None) -> bool:
        """Whether the gradients of this stage are finite, or those of all where clipping waits for all."""
        if self.clipper is not None and self.clipper.rule.waits and norm is not None and not math.isfinite(norm):
            scaling.note_overflow(scaling.current)  # all stages see the same norm, so all of them skip
            scaling.finite = False
        return scaling.finite

    # -- weights -------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        if self.optimizer is None:
            return
        # In the synchronous start torch's own step, at the user's rate: so its updates are those of 1F1B with a flush, bit for bit.
        lr_scale = None if self.weights.synchronous else self.lr_scale
        step = self.optimizer.step if self.weights.synchronous else self.step
        # In flight there may be forwards on the latest weights in place whose backward is meant to see the new values, which autograd
        # would refuse if the version counters told it of the step.
        with _unsafe_preserve_version_counter(tuple(self.weights.params)):
            if lr_scale is not None:
                # The rates of this update are not those of the next, so no prediction can be made in the same pass.
                with self._scaled_lr(self.optimizer, lr_scale):
                    self._move(step, 0)
            else:
                self._move(step, 0 if self.weights.synchronous else self.forward_weights.steps_ahead())
            self.master_weights.write_back()

    def _move(self, step: Callable[[], object], ahead: int) -> None:
        """``step``, and again where the audit wants it."""
        coming, audit = self.weights.version + 1, self.audit
        audited = audit is not None and audit.begin(coming)
        fused = self.weights.update(step, ahead)
        if audit is not None and audited:
            audit.compare(coming, fused, self.weights.synchronous)

    @contextmanager
    def _scaled_lr(self, optimizer: Optimizer, lr_scale: Callable[[Program, int, int], float]) -> Iterator[None]:
        """The learning rate that the method wants for this update; the user's own is back afterwards."""
        scale = lr_scale(self.program, self.k, self.weights.version - self.synchronous_updates)
        if scale == 1.0:
            yield
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * scale
            yield
        finally:
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr

    def _step_scheduler(self, scheduler: LRScheduler) -> None:
        with warnings.catch_warnings() if self.finite.found else nullcontext():
            if self.finite.found:  # torch warns of a first call before any step of the optimizer
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            scheduler.step()
        self.script_calls.note_scheduled()

    def _note_version(self, version: int, bad: bool) -> None:
        if self.scaling is not None and not bad:
            self.scaling.update()
        for observer in self.observers:
            if bad:
                observer.forget()  # predictions over this update, which moves nothing
            observer.updated(version, self.weights.params)
        if self.on_update is not None:
            self._call_hook(self.on_update, version)

    def _call_hook(self, on_update: Callable[[int, int], None], version: int) -> None:
        """The hook may write into the weights, as for a projection: as with the step itself, backwards in flight see the new values."""
        params = tuple(self.weights.params)
        with _unsafe_preserve_version_counter(params):
            # The counters are put back after the hook, so that they must be compared inside this block.
            before = versions_of(params)
            on_update(self.k, version)
            written = versions_of(params) != before
        if written:
            self.weights.forget_predictions()  # those that the step has made along are of the old values
            if self.master_weights.pairs:
                raise ConfigError(
                    f"on_update wrote into weights of stage {self.k} that follow float32 masters, so the next update would undo it; write "
                    "into the masters, which the optimizer's param_groups hold"
                )


def _zero_grad(optimizer: Optimizer | None) -> None:
    if optimizer is None:
        return
    if type(optimizer).zero_grad is Optimizer.zero_grad:  # what it does, without its preparations
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
    else:
        optimizer.zero_grad(set_to_none=True)
