"""All numerics of one stage: forward, backward and update of micro-batches, on the weights that the method says.

Every engine calls this one class, so what they compute is the same by construction. It knows nothing of other stages: activations and
gradients come in and go out as plain values::

    prepare(i)   finish a waiting update, choose (and predict) the weights of F(i)
    forward(i)   F: activations or inputs in, activations or the loss out; what B(i) needs is kept in an InFlight record
    backward(i)  B: gradients of the output in, gradients of the inputs out; those of the weights add up in .grad
    update()     U: when the micro-batches of a mini-batch have had their B (see :mod:`~pipeoptim.engine.stage.update`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.processes.exchange import NormExchange
from pipeoptim.engine.stage.audit import UpdateAudit
from pipeoptim.engine.stage.autocast import autocast_to
from pipeoptim.engine.stage.checks import (
    check_audit,
    check_delay_compensation,
    check_groups,
    check_loss_function,
    check_sharded,
    check_still_held,
    kernel_choice,
    optimizer_parameters,
    split_by_group,
    step_function,
)
from pipeoptim.engine.stage.clipped_stage import ClippedStage
from pipeoptim.engine.stage.clipping import StageClipper
from pipeoptim.engine.stage.displacement_samples import ScaledPredictor
from pipeoptim.engine.stage.finite_buffers import FiniteBuffers
from pipeoptim.engine.stage.finite_check import FiniteCheck
from pipeoptim.engine.stage.forward_weights import ForwardWeights
from pipeoptim.engine.stage.gradient_so_far import GradientSoFar, InProgressPredictor, progress_predictor
from pipeoptim.engine.stage.loss_scaling import LossScale
from pipeoptim.engine.stage.losses import (
    CutOffCheck,
    LossLog,
    call_loss,
    check_graph,
    collect_losses,
    own_number,
    read_loss,
)
from pipeoptim.engine.stage.master_weights import MasterWeightPredictor, MasterWeights
from pipeoptim.engine.stage.module_call import ModuleCall
from pipeoptim.engine.stage.origin import find_cut_model
from pipeoptim.engine.stage.parameter_places import ParameterPlaces
from pipeoptim.engine.stage.prediction_monitor import PredictionMonitor
from pipeoptim.engine.stage.prediction_scale import PredictionScale
from pipeoptim.engine.stage.recompute import check_recompute, recomputing
from pipeoptim.engine.stage.reduction import NO_REPLICAS, Reduction
from pipeoptim.engine.stage.rng import StageRandom
from pipeoptim.engine.stage.run_backward import run_backward
from pipeoptim.engine.stage.script_calls import ScriptCalls
from pipeoptim.engine.stage.state import check_state, restore, state_of
from pipeoptim.engine.stage.tied import Tied
from pipeoptim.engine.stage.tied_weights import TiedWeight, TieOnStage
from pipeoptim.engine.stage.update import StageUpdate, UpdateState
from pipeoptim.engine.stage.weight_writes import WeightWrites
from pipeoptim.engine.transport.compression import Compressor
from pipeoptim.engine.transport.pytree import as_args, differentiable
from pipeoptim.errors import ConfigError, PipeOptimError, counted
from pipeoptim.methods import Method, PredictorContext, mean_gap, refresh_every
from pipeoptim.optim import DelayCompensation
from pipeoptim.options import DEFAULTS, PipelineOptions
from pipeoptim.rules import Predictor
from pipeoptim.rules.combined import members
from pipeoptim.schedule import Program
from pipeoptim.weights import Latest, SavedWeights, StageWeights, UpdateProgress, WeightSet
from pipeoptim.weights.store import FollowsProgram, WeightPredictor

LossFn = Callable[..., Tensor]
_IDLE = UpdateState.IDLE


@dataclass
class InFlight:
    """A micro-batch between its F and its B.

    Attributes:
        inputs: leaves whose gradients the previous stage waits for.
        outputs: what the backward starts from.
        saved: puts the backward's weights in place of those that autograd saved; None where they are right by themselves.
        weight_set: the forward's weights, where they are kept for the backward.
        added_losses: raised by the stage itself.
        share: how much of the mini-batch's loss it is; None for 1/M.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    saved: SavedWeights | None
    weight_set: WeightSet | None
    added_losses: list[Tensor] = field(default_factory=list)
    share: float | None = None


class StageWorker:
    """Stage ``k`` of a pipeline: its module, its optimizer and every version of its weights that is alive.

    Args:
        module: the stage's part of the model.
        optimizer: moves the stage's parameters; stepped here, never by the user. None for a stage without parameters.
        method, program: which weights each action uses, and the order of the actions.
        k: the stage.
        loss_fn: ``loss_fn(output, target) -> scalar``, called on the last stage.
        scheduler: advanced once per update.
        device: where the stage computes.
        options: those of the pipeline, with this stage's own scaler. Each stage draws from its own stream of the seed's.
        norms: exchange of gradient norms with the other stages, where clipping needs it.
        reduction: makes gradients the mean over the replicas of this stage.
        ties: weights that other stages have copies of.

    Raises:
        ConfigError: optimizer and module do not belong together, or the optimizer needs a closure.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        method: Method,
        program: Program,
        k: int,
        loss_fn: LossFn,
        *,
        scheduler: LRScheduler | None = None,
        device: torch.device | None = None,
        options: PipelineOptions = DEFAULTS,
        norms: NormExchange | None = None,
        reduction: Reduction = NO_REPLICAS,
        ties: Sequence[TieOnStage] = (),
    ) -> None:
        if k == program.depth - 1:
            check_loss_function(loss_fn)
        # Two lists in one order: what the optimizer moves (perhaps float32 masters), and the module's own parameters.
        parameters, params = optimizer_parameters(module, optimizer, scheduler, k)
        check_sharded(reduction, method, options, ties)
        check_delay_compensation(optimizer, method)
        optimizer = method.compensated(optimizer)
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        self.method, self.program, self.k, self.loss_fn = method, program, k, loss_fn
        self.reduction, self.options, self.is_last = reduction, options, k == program.depth - 1
        self._places = ParameterPlaces(module)
        held = params
        # From here on sharded parameters are represented by what this process holds of them.
        self.parameters, params = ([reduction.shards.get(p, p) for p in tensors] for tensors in (parameters, params))
        self.device = device or (params[0].device if params else torch.device("cpu"))
        seed = torch.initial_seed() if options.seed is None else options.seed
        self.random = StageRandom(seed, k, self.device, reduction.index)
        # A tied weight that this stage's optimizer does not move has no gradient to exchange, hence the None that is dropped.
        copies = (tie.on(reduction.unwrapped(module), self.parameters, params, program) for tie in ties)
        self.tied: list[TiedWeight] = [weight for weight in copies if weight is not None]
        self.clipper: StageClipper | None = None
        if options.clip is not None:
            # The norm over all stages counts a tied weight once, on its first holder, though every holder scales its copy.
            twice = [weight.optimized for weight in self.tied if not weight.counted]
            self.clipper = options.clip.clipper(ClippedStage(self.parameters, program, norms, reduction.whole_norm, twice))
        names = {id(p): name for name, p in reduction.unwrapped(module).named_parameters()}
        outlier = options.outlier if self.is_last else None
        self.finite = FiniteCheck(options.on_bad, k, self.device, [names[id(p)] for p in held], bool(self.tied), outlier)
        self._buffers = FiniteBuffers(reduction.unwrapped(module)) if self.finite.looks else None
        scaler = options.scaler
        self.scaling = LossScale(scaler, self.is_last, program.microbatches) if scaler and scaler.is_enabled() else None
        self.predictor: WeightPredictor | None = None
        self.monitor: PredictionMonitor | None = None
        self.scale: PredictionScale | None = None
        progress: UpdateProgress | None = None
        self._in_progress: InProgressPredictor | None = None
        if optimizer is not None and method.predicts_on(program, k):
            if options.monitor and method.forward.predicts:
                every = None if options.monitor is True else options.monitor
                self.monitor = PredictionMonitor(split_by_group(optimizer, params), k, every)
            fused, shards = kernel_choice(ties), reduction.shards
            context = PredictorContext(optimizer, program, k, scheduler, options.prediction, fused, shards, self.monitor)
            self.predictor = method.make_predictor(context)
            scaled = self.predictor if isinstance(self.predictor, ScaledPredictor) else None  # those of methods' own have none
            if self.monitor is not None:
                self.monitor.predictor = scaled
            if scaled is not None and options.scale == "auto":
                self.scale = PredictionScale(split_by_group(optimizer, params), k, scaled, reduction.summed)
            elif scaled is not None and options.scale != 1.0:
                scaled.scales = (float(options.scale),) * len(optimizer.param_groups)
            told = progress_predictor(self.predictor, method, options.prediction)
            refresh = refresh_every(options.prediction, options.refresh)
            if told is not None and refresh is not None:
                progress = UpdateProgress(program.microbatches, refresh)
                sums = [weight.optimized for weight in self.tied]
                gradient = GradientSoFar(self.parameters, progress, sums, self.clipper, self.scaling, self.finite)
                self.predictor = self._in_progress = InProgressPredictor(told, gradient)
        step = step_function(optimizer, method, program, self.predictor, reduction, ties)
        self.master_weights = MasterWeights(self.parameters, params)
        if self.predictor is not None and self.master_weights.pairs:
            self.predictor = MasterWeightPredictor(self.predictor, self.parameters)
        # Versions are kept of the module's parameters, not of the masters: that is what a forward runs on.
        self.weights = StageWeights(params, program, k, self.predictor, progress)
        observers = [observer for observer in (self.monitor, self.scale) if observer is not None]
        self.forward_weights = ForwardWeights(method, self.weights, observers)
        self._stashes_weights = method.backward.reuses_forward
        # The weights of a forward until its backward.
        self._keeps_weights = self._stashes_weights or options.recompute == "forward"
        if not (self._stashes_weights and options.recompute == "forward"):  # there, forward and backward have the same weights
            check_recompute(options.recompute, module, reduction.replaces_saved)
        elsewhere = {weight.parameter: "the other stages that tie it" for weight in self.tied}
        elsewhere |= {p: "its float32 master" for _, p in self.master_weights.pairs}
        whole = () if reduction.shards else self.weights.params  # a forward writes into what was gathered from shards
        self._weight_writes = WeightWrites(reduction.unwrapped(module), whole, method, program, k, elsewhere)
        audit: UpdateAudit | None = None
        if options.audit is not None and optimizer is not None:
            check_audit(reduction)
            by_kernel = isinstance(getattr(step, "__self__", None), Predictor)
            audit = UpdateAudit(options.audit, optimizer, [names[id(p)] for p in held], by_kernel, k)
        self.script_calls = ScriptCalls(optimizer, scheduler, k, program.flushes, find_cut_model(module))
        self.update = StageUpdate(
            optimizer,
            scheduler,
            step,
            self.parameters,
            self.weights,
            self.forward_weights,
            self.master_weights,
            method,
            program,
            k,
            reduction=reduction,
            tied=self.tied,
            clipper=self.clipper,
            scaling=self.scaling,
            finite=self.finite,
            observers=observers,
            scale=self.scale,
            audit=audit,
            on_update=options.on_update,
            script_calls=self.script_calls,
        )
        self.compressor = Compressor(options.compress, program.microbatches)
        self.losses = LossLog(program.microbatches)
        self._in_flight: dict[int, InFlight] = {}  # by number of the micro-batch, counted from the last restart
        self._call_module = ModuleCall()
        self.prefetch_code: Callable[[], None] | None = None  # see `hot_code`
        self._autocast, self._no_autocast = (autocast_to(self.device.type, dtype) for dtype in (options.autocast, None))
        found = [] if optimizer is None else members(optimizer)
        self._compensations = [member for member in found if isinstance(member, DelayCompensation)]
        self._tell_compensations()
        self._note_phase()
        # The last stage looks at its loss in the forward; None once the first mini-batch has shown that all is well.
        self._cut_off_check = None if self.is_last else CutOffCheck(k, program.microbatches, self.parameters)

    # -- forward ---------------------------------------------------------------------------------------------------

    def begin_mini_batch(self) -> None:
        """Before the actions of a mini-batch.

        Raises:
            ConfigError: since the stage was made the optimizer was given parameters, or the module has lost some that it moves; or
                weights were given other memory while micro-batches are in flight.
        """
        self.losses.begin()
        if self.optimizer is None:
            return
        check_groups(self.optimizer, len(self.parameters), self.k)
        self.script_calls.begin_mini_batch()
        if self._in_progress is not None:  # between mini-batches a script may have changed rates, say
            self._in_progress.forget()
        if not self.reduction.shards:  # whole weights come and go there
            # In full where nothing is in flight; else only whether each parameter is still where it was, which is a look into a dict.
            if self.forward_weights.next_forward == 0 or not self._places.all_hold():
                check_still_held(self.module, self.optimizer, self.k)
            self.weights.follow_memory(bool(self._in_flight))

    def prepare(self, i: int) -> None:
        """Choose (and predict) the weights for F of micro-batch ``i``; may be called while its input is on its way."""
        if self.update.state is not _IDLE:
            self.finish_update()
        self.forward_weights.choose(i)

    def forward(
        self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any = None, share: float | None = None
    ) -> Any:
        """F of micro-batch ``i``. Returns the output for the next stage, or the loss on the last stage.

        ``share``: how much of the mini-batch's loss this is; None for 1/M.
        """
        self.prepare(i)
        # Usually chosen already: a runner calls prepare() before the input is there, so that a prediction overlaps with the transfer.
        weight_set = self.forward_weights.take(i)
        saved = self._saved_weights(i, weight_set)
        inputs = differentiable(args) if self.k > 0 else []  # nobody waits for gradients of the user's own inputs
        try:
            # strict: a loss added under no_grad, as in a reentrant checkpoint's first forward, would be lost in silence.
            with self.random.seeded_draws(), collect_losses(strict=True) as added:
                result = self._run_module(weight_set, saved, args, kwargs, target, share)
            if self.prefetch_code is not None:
                self.prefetch_code()
            if self._buffers is not None:
                self._buffers.mend()
            if self.is_last and not result.requires_grad:
                check_graph(self.k, share, [*inputs, *self.weights.params], added.values())
        # A module or loss that raises must not keep a copy of the weights in use: the user may catch the error and go on.
        except BaseException:
            self.weights.release(weight_set)
            raise
        self.losses.add(added, share)
        # Added losses are roots of this stage's own backward; nothing of them travels to other stages.
        own = [self._weighted_loss(loss, share) for loss in added.values() if loss.requires_grad]
        if self.is_last:
            # What is kept of the loss would keep the graph of the whole stage alive, and perhaps a large memory, until the end of the step.
            loss, result = result, own_number(result)
            if share != 0:
                self.finite.note_loss(i, result)
            outputs = self._loss_roots(i, loss, share)
        else:
            outputs = differentiable(as_args(result))
        self._keep_for_backward(i, InFlight(inputs, outputs, saved, weight_set, own, share))
        return result

    def skip(self, i: int) -> None:
        """F of an empty micro-batch: nothing is computed or drawn, its place in the order is kept."""
        self.prepare(i)
        # The weights are chosen and released all the same, so that copies and predictions are those of a full micro-batch.
        self._keep_for_backward(i, InFlight([], [], None, self.forward_weights.take(i), share=0.0))

    def _keep_for_backward(self, i: int, flight: InFlight) -> None:
        """Note what the backward of micro-batch ``i`` needs; let go of its forward's weights unless they are stashed."""
        if flight.weight_set is not None and not self._keeps_weights:
            self.weights.release(flight.weight_set)
            flight.weight_set = None
        self._in_flight[i] = flight
        self.forward_weights.note_forward(i)

    def _loss_roots(self, i: int, loss: Tensor, share: float | None) -> list[Tensor]:
        """What the backward starts from: the loss times its share; nothing where that is 0, for 0 times a mean of nothing is NaN."""
        loss = self._weighted_loss(loss, share)
        if self.scaling is not None:
            loss = self.scaling.scale(i, loss)
        return [] if share == 0 else [loss]

    def _weighted_loss(self, loss: Tensor, share: float | None) -> Tensor:
        if share is not None:
            return loss * share
        # A division by 1 would cost a kernel and a node of the graph for nothing.
        return loss if self.program.microbatches == 1 else loss / self.program.microbatches

    def _saved_weights(self, i: int, weight_set: WeightSet) -> SavedWeights | None:
        """None where autograd's own saved tensors will hold the right weights when the backward runs."""
        in_place = weight_set.copy is None
        backward = self.method.backward
        # Sharded: whole weights are gathered again for the backward, into the memory that autograd saved.
        if not self.reduction.replaces_saved:
            return None
        if self._weight_writes.possible:  # autograd would refuse weights that another forward has written into since
            return SavedWeights(self.weights.buffers(weight_set).table)
        moved = self.program.gap(self.k, i) > 0  # in place, the latest weights of the backward are right by themselves
        if in_place and type(backward) is Latest and not (moved and self._keeps_weights):  # a subclass may acquire others
            return None
        # No update comes between F and B: the saved tensors are the latest weights, and those are what B wants.
        if in_place and self._stashes_weights and not moved:
            return None
        return SavedWeights(self.weights.buffers(weight_set).table)

    def _run_module(
        self, weight_set: WeightSet, saved: SavedWeights | None, args: Any, kwargs: Any, target: Any, share: float | None
    ) -> Any:
        hooks: AbstractContextManager[Any] = nullcontext() if saved is None else saved
        with self.reduction.forward_on(self.weights.params, self.weights.tensors(weight_set)):
            with self._autocast, hooks:
                before = self._weight_writes.before()
                output = self._call_module(self.module, args, kwargs)
                if self.is_last:
                    output, parts = read_loss(call_loss(self.loss_fn, output, target))
                    self.losses.add(parts, share)
                self._weight_writes.check(before)
        return output

    # -- backward and update -----------------------------------------------------------------------------------------

    def backward(
        self, i: int, gradients: list[Tensor | None], loss_scale: float = 0.0, bad: bool = False
    ) -> list[Tensor | None]:
        """B of micro-batch ``i``.

        Args:
            gradients: one per differentiable output of the forward, None where there is none; ``[]`` on the last stage.
            loss_scale: what they came with (see :attr:`loss_scale`).
            bad: whether they came with the verdict that the loss of their mini-batch is bad.

        Returns:
            One per differentiable input, for the previous stage.

        Raises:
            DivergedError: on the last stage, where the loss is bad and ``on_bad`` is "stop".
        """
        if self.update.state is not _IDLE:
            self.finish_update()
        # After the update that was waiting, of the mini-batch before.
        self.finite.note_verdict(bad)
        if self.scaling is not None:
            self.scaling.begin_backward(i, loss_scale)
        # Removed first: whatever fails below, the graph of this micro-batch dies with this call.
        flight = self._in_flight.pop(i)
        weight_set = (
            self.method.backward.acquire(self.weights, i)
            if not self._stashes_weights or flight.weight_set is None
            else flight.weight_set
        )
        # Recomputation runs on the forward's weights where they were kept (recompute="forward"), else on those of the backward.
        again = flight.weight_set or weight_set
        try:
            if flight.saved is not None:
                # From now on what autograd saved by place is read from these weights.
                flight.saved.target = self.weights.buffers(weight_set).bases
            pairs = (
                [(out, None) for out in flight.outputs] if self.is_last else list(zip(flight.outputs, gradients, strict=True))
            )
            roots = [(out, grad) for out, grad in pairs if self.is_last or grad is not None]
            # Only the last micro-batch's gradients are final; averaging them earlier would send sums that still grow.
            self.reduction.before_backward((i + 1) % self.program.microbatches == 0, flight.outputs)
            roots += [(loss, self._scale_of(loss)) for loss in flight.added_losses]
            # Nothing may be left (share 0, all frozen, a cut graph), which is no error: the previous stage then gets None for each input.
            roots = [(out, grad) for out, grad in roots if out.requires_grad]
            if self._cut_off_check is not None and self._cut_off_check.note(i, bool(roots), bool(flight.outputs)):
                self._cut_off_check = None
            if roots:
                # autocast_to: recomputation runs the module again
                with self._backward_on(again, weight_set), self._no_autocast:
                    run_backward([out for out, _ in roots], [grad for _, grad in roots])
                if self.prefetch_code is not None:
                    self.prefetch_code()
                self.master_weights.collect()
            if self.is_last:
                self.finite.judge_loss(i, self.weights.version)
            if self._buffers is not None:  # recomputation runs the module again
                self._buffers.mend()
            self.weights.next_is_skipped = bool(self.finite.found)
            if self.weights.progress is not None:
                self.weights.progress.note_backward(flight.share)
            if (i + 1) % self.program.microbatches:
                self.script_calls.note_summed(self.parameters)
            else:
                self.script_calls.forget_sum()
                # Begun here and not in U, so that the averages travel while the gradients go back to the previous stage.
                self.reduction.start(bool(self.finite.found))
        finally:
            self.weights.release(weight_set)
            if flight.weight_set is not None and not self._stashes_weights:
                self.weights.release(flight.weight_set)
        # The leaves die with the flight, so the receiver of these tensors is their only owner.
        return [x.grad for x in flight.inputs]

    def _backward_on(self, again: WeightSet, weight_set: WeightSet) -> AbstractContextManager[Any]:
        if self.reduction.replaces_saved:
            if again is weight_set and weight_set.copy is None:  # the usual case: the module holds these weights as it is
                return nullcontext()
            return recomputing(self.weights, again, weight_set)
        return self.reduction.backward_on(self.weights.params, self.weights.tensors(weight_set))

    def _scale_of(self, loss: Tensor) -> Tensor | None:
        return None if self.scaling is None else torch.full_like(loss, self.scaling.current)

    def finish_update(self) -> None:
        """Carry out an update that waits for other processes, if there is one."""
        if self.update.state is not _IDLE:
            self.update.finish()

    def can_finish_update(self) -> bool:
        """As :meth:`StageUpdate.can_finish <pipeoptim.engine.stage.update.StageUpdate.can_finish>`."""
        return self.update.can_finish()

    def prediction_scales(self) -> tuple[float, ...]:
        """As :meth:`pipeoptim.Emulator.prediction_scales`."""
        predictor = self._inner_predictor
        if self.optimizer is None or not isinstance(predictor, ScaledPredictor):
            return ()
        return predictor.scales or (1.0,) * len(self.optimizer.param_groups)

    def tied_weight(self, tie: Tied) -> TiedWeight | None:
        """This stage's copy of a tied weight; None where nothing trains it."""
        return next((weight for weight in self.tied if weight.name == tie.name_on(self.k)), None)

    def use_program(self, program: Program) -> None:
        """Follow ``program`` from here on, which differs in its micro-batches or slack. Only with nothing in flight."""
        self._only_at_rest("given another program")
        m = program.microbatches
        self.program = self.weights.program = self.update.program = self._weight_writes.program = program
        self.losses.microbatches = m
        if self.weights.progress is not None:
            self.weights.progress.microbatches = m
        self.compressor.use_positions(m)
        if self.scaling is not None:
            self.scaling.microbatches = m
        if self.clipper is not None:
            self.clipper.use_program(program)
        if self._cut_off_check is not None:
            self._cut_off_check.microbatches = m
        predictor = self._inner_predictor
        if isinstance(predictor, FollowsProgram):
            predictor.use_program(program, self.k)
        self._tell_compensations()

    def check_program(self, program: Program) -> None:
        """Whether :meth:`use_program` can be given ``program``.

        Raises:
            ConfigError: something here depends on the present one, and cannot follow.
        """
        k, method = self.k, self.method
        if self.optimizer is not None and method.predicts_on(program, k) != (self.predictor is not None):
            raise ConfigError(
                f"method {method.name!r} predicts weights of stage {k} with {max(program.microbatches, self.program.microbatches)} "
                "micro-batches and not with fewer, so that their number cannot be changed; make a new pipeline"
            )
        predictor = self._inner_predictor
        if method.predictor is not None and predictor is not None and not isinstance(predictor, FollowsProgram):
            raise ConfigError(
                f"the predictor of method {method.name!r} was made for {self.program.microbatches} micro-batches; give it a method "
                "use_program(program, stage), or make a new pipeline"
            )
        for weight in self.tied:
            weight.check_program(program)

    @property
    def _inner_predictor(self) -> WeightPredictor | None:
        found: Any = self.predictor
        while isinstance(found, MasterWeightPredictor | InProgressPredictor):
            found = found.inner
        return found  # type: ignore[no-any-return]

    def restart(self) -> None:
        """Nothing is in flight: the next micro-batch is number 0 again."""
        # Gaps and version numbers are counted from the restart: a micro-batch in flight would get weights of the wrong number.
        assert not self._in_flight, f"stage {self.k} restarts with micro-batches {sorted(self._in_flight)} in flight"
        self.forward_weights.restart()
        self.script_calls.restart()
        if self.scale is not None:
            # A resumed run knows no predictions for versions beyond the drain, which methods that count otherwise may have made.
            self.scale.forget()
        self._note_phase()

    def _tell_compensations(self) -> None:
        """How old the gradients of this stage are."""
        for compensation in self._compensations:
            compensation.set_stage_gap(mean_gap(self.method, self.program, self.k))

    def _note_phase(self) -> None:
        """Synchronous or not: it changes at a restart only, since each synchronous update ends with a drain."""
        self.weights.synchronous = self.weights.version < self.method.synchronous_updates
        for compensation in self._compensations:
            compensation.paused = self.weights.synchronous

    def abandon(self) -> None:
        """Give up all that is in flight, at whatever point a failure has left it; :meth:`load_state_dict` must follow.

        Micro-batches, the update in progress, gradients, and what was exchanged for them are forgotten. The weights may be those of a
        half-finished update, so that only a state that was saved makes them whole again.
        """
        self._in_flight.clear()
        self.finite.abandon()
        self.update.abandon()
        for p in self.module.parameters():
            p.grad = None
        self.weights.abandon()
        # Not released: the weights have forgotten all their sets already.
        self.forward_weights.chosen = None
        self.losses.begin()
        self.script_calls.restart()

    # -- loss scaling: what travels with the activations and with the gradients ---------------------------------------

    @property
    def loss_scale(self) -> float:
        """The loss scale in the gradients that the newest backward returned; 0 without loss scaling."""
        return 0.0 if self.scaling is None else self.scaling.current

    def note_overflow(self, overflowed: float) -> None:
        """An activation arrived with a report of the loss scale that was too large; 0: none was."""
        if self.scaling is not None:
            self.scaling.note_overflow(overflowed)

    def overflow_to_send(self) -> float:
        """The report that goes on with the next activation."""
        return 0.0 if self.scaling is None else self.scaling.overflow_to_send()

    # -- evaluation and state ----------------------------------------------------------------------------------------

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any = None) -> Any:
        """Forward on the latest weights in eval mode without gradient; the loss on the last stage, whose parts are noted."""
        if not self.tied and (
            self.clipper is None or not self.clipper.rule.waits
        ):  # else it may wait for stages that are not there yet
            self.finish_update()
        # By module, not one flag: a user may have frozen a BatchNorm with eval() inside a training module.
        training = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad(), self._autocast:
                with self.reduction.forward_on(self.weights.params, None):
                    output = self._call_module(self.reduction.unwrapped(self.module), args, kwargs)
                if not self.is_last:
                    return output
                loss, parts = read_loss(call_loss(self.loss_fn, output, target))
                self.losses.add(parts, 1.0)
                return loss
        finally:
            for m, mode in training.items():
                m.training = mode

    def weight_bytes(self) -> int:
        """Bytes of memory that hold weights of this stage: its parameters and every copy of them, each storage once."""
        # By storage: tied or flattened parameters share one, which must count once.
        parts = [self.reduction.shards.get(p, p) for p in self.module.parameters()]
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}
        extra = self.predictor.nbytes() if isinstance(self.predictor, MasterWeightPredictor) else 0
        return sum(storages.values()) + self.weights.nbytes_of_copies() + self.master_weights.nbytes() + extra

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit, as tensors and plain data. Only with nothing in flight."""
        self._only_at_rest("saved")
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Only with nothing in flight.

        Raises:
            ConfigError: it is the state of something else.
        """
        self._only_at_rest("loaded")
        check_state(self.k, state)
        # Before restart(), which counts micro-batches from the version restored here, and drops predictions of older weights.
        restore(self, state)
        self.restart()

    def _only_at_rest(self, what: str) -> None:
        if self._in_flight or self.update.state is not _IDLE:
            raise PipeOptimError(
                f"the state of stage {self.k} cannot be {what} while {counted(len(self._in_flight), 'micro-batch')} are in flight; "
                "call drain() first"
            )


__all__ = ["InFlight", "LossFn", "StageWorker"]
