"""All numerics of one stage: forward, backward and update of micro-batches, on the weights that the method says.

The emulator and the distributed engine call this one class, so what they compute is the same by construction. It knows
nothing of other stages: activations and gradients come in and go out as plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves, tree_map_only

from pipeoptim.engine.processes.exchange import Norms
from pipeoptim.engine.replicas.reduction import NO_REPLICAS, Reduction
from pipeoptim.engine.stage.autocast import autocast_to
from pipeoptim.engine.stage.checks import (
    check_sharded,
    kernel_choice,
    optimizer_parameters,
    skip_step,
    split_by_group,
    step_function,
)
from pipeoptim.engine.stage.clip import Clipper
from pipeoptim.engine.stage.loss_scaling import LossScale
from pipeoptim.engine.stage.losses import LossLog, call_loss, check_graph, collect_losses, read_loss, warn_cut_off
from pipeoptim.engine.stage.master_weights import MasterWeightPredictor, MasterWeights
from pipeoptim.engine.stage.prediction_monitor import PredictionMonitor
from pipeoptim.engine.stage.recompute import check_recompute, recomputing
from pipeoptim.engine.stage.rng import StageRandom
from pipeoptim.engine.stage.state import restore, state_of
from pipeoptim.engine.stage.tied_weights import Tied, TiedWeight, TieOnStage
from pipeoptim.engine.transport.compression import Compressor
from pipeoptim.engine.transport.pytree import as_args, differentiable
from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.methods import Method, PredictorContext
from pipeoptim.options import DEFAULTS, PipelineOptions
from pipeoptim.schedule import Program
from pipeoptim.weights import Latest, SavedWeights, StageWeights, WeightSet
from pipeoptim.weights.store import WeightPredictor

LossFn = Callable[..., Tensor]


@dataclass
class Flight:
    """A micro-batch between its F and its B."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    saved: SavedWeights | None
    weight_set: WeightSet | None
    extra: list[Tensor] = field(default_factory=list)  # losses raised by the stage itself


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
        norms: Norms | None = None,
        reduction: Reduction = NO_REPLICAS,
        ties: Sequence[TieOnStage] = (),
    ) -> None:
        if k == program.depth - 1 and not callable(loss_fn):
            raise ConfigError(f"loss_fn is {loss_fn!r}, must be a function of output and target on the last stage")
        held, params = optimizer_parameters(module, optimizer, scheduler, k)
        check_sharded(reduction, method, options, ties)
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        self.method, self.program, self.k, self.loss_fn = method, program, k, loss_fn
        self.is_last = k == program.depth - 1
        held, params = ([reduction.shards.get(p, p) for p in tensors] for tensors in (held, params))
        self.predictor: WeightPredictor | None = None
        self.monitor: PredictionMonitor | None = None
        if optimizer is not None and method.predicts_on(program, k):
            if options.monitor and method.forward.predicts:
                every = None if options.monitor is True else options.monitor
                self.monitor = PredictionMonitor(split_by_group(optimizer, params), k, every)
            fused, shards = kernel_choice(ties), reduction.shards
            context = PredictorContext(optimizer, program, k, scheduler, options.prediction, fused, shards, self.monitor)
            self.predictor = method.make_predictor(context)
        self._optimizer_step = step_function(optimizer, method, program, self.predictor, reduction, ties)
        self.master_weights = MasterWeights(held, params)
        if self.predictor is not None and self.master_weights.pairs:
            self.predictor = MasterWeightPredictor(self.predictor, held)
        self.weights = StageWeights(params, program, k, self.predictor)
        self.device = device or (params[0].device if params else torch.device("cpu"))
        seed = torch.initial_seed() if options.seed is None else options.seed
        self.random = StageRandom(seed, k, self.device, reduction.index)
        self.reduction = reduction
        self.options = options
        self.parameters = held
        self.losses = LossLog(program.microbatches)
        self._stashes = method.backward.reuses_forward
        self._keeps = self._stashes or options.recompute == "forward"  # the weights of a forward until its backward
        if not (self._stashes and options.recompute == "forward"):  # there, forward and backward have the same weights
            check_recompute(options.recompute, module, reduction.replaces_saved)
        copies = (tie.on(reduction.unwrapped(module), held, params, program) for tie in ties)
        self.tied: list[TiedWeight] = [weight for weight in copies if weight is not None]
        self.clipper: Clipper | None = None
        if options.clip is not None:
            twice = [weight.held for weight in self.tied if not weight.counted]
            self.clipper = Clipper(options.clip, held, program, norms, reduction.whole_norm, twice)
        scaler = options.scaler
        self.scaling = LossScale(scaler, self.is_last, program.microbatches) if scaler and scaler.is_enabled() else None
        self.compressor = Compressor(options.compress, program.microbatches)
        self._announced = False  # the backwards of an update are done and the update is not carried out yet
        self._own = False  # and its gradients are final but for tied weights and clipping
        self._complete = False  # and but for clipping
        self._flights: dict[int, Flight] = {}
        self._ready: tuple[int, WeightSet] | None = None
        self._next_forward = 0
        self._reached: bool | None = False  # whether a gradient has come; None where that is not looked at, or no longer
        self._copy_inputs: bool | None = None  # None: not known yet whether the module changes its inputs in place

    # -- forward ---------------------------------------------------------------------------------------------------

    def prepare(self, i: int) -> None:
        """Choose (and predict) the weights for F of micro-batch ``i``; may be called while its input is on its way."""
        self.finish_update()
        if self._ready is None:
            weight_set = self.method.forward.acquire(self.weights, i)
            self._ready = (i, weight_set)
            if self.monitor is not None and weight_set.copy is not None and weight_set.key[1]:
                self.monitor.predicted(*weight_set.key, self.weights.params, weight_set.copy.tensors)

    def forward(
        self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any = None, share: float | None = None
    ) -> Any:
        """F of micro-batch ``i``. Returns the output for the next stage, or the loss on the last stage.

        ``share``: how much of the mini-batch's loss this is; None for 1/M.
        """
        weight_set = self._weights_for(i)
        saved = self._hooks(i, weight_set)
        inputs = differentiable(args) if self.k > 0 else []  # nobody waits for gradients of the user's own inputs
        try:
            with self.random.seeded_draws(), collect_losses(strict=True) as extra:
                result = self._run(weight_set, saved, args, kwargs, target, share)
            if self.is_last and not result.requires_grad:
                check_graph(self.k, share, [*inputs, *self.weights.params], extra.values())
        except BaseException:
            self.weights.release(weight_set)
            raise
        self.losses.add(extra, share)
        own = [self._scaled(loss, share) for loss in extra.values() if loss.requires_grad]
        outputs = self._roots(i, result, share) if self.is_last else differentiable(as_args(result))
        self._keep(i, Flight(inputs, outputs, saved, weight_set, own))
        return result.detach() if self.is_last else result

    def skip(self, i: int) -> None:
        """F of an empty micro-batch: nothing is computed or drawn, its place in the order is kept."""
        self._keep(i, Flight([], [], None, self._weights_for(i)))

    def _weights_for(self, i: int) -> WeightSet:
        self.prepare(i)
        assert self._ready is not None and self._ready[0] == i, f"F{i} out of order"
        weight_set, self._ready = self._ready[1], None
        return weight_set

    def _keep(self, i: int, flight: Flight) -> None:
        """Note what the backward of micro-batch ``i`` needs; let go of its forward's weights unless they are stashed."""
        if flight.weight_set is not None and not self._keeps:
            self.weights.release(flight.weight_set)
            flight.weight_set = None
        self._flights[i] = flight
        self._next_forward = i + 1
        self._retain()

    def _roots(self, i: int, loss: Tensor, share: float | None) -> list[Tensor]:
        """What the backward starts from: the loss times its share; nothing where that is 0, for 0 times a mean of nothing is NaN."""
        loss = self._scaled(loss, share)
        if self.scaling is not None:
            loss = self.scaling.scale(i, loss)
        return [] if share == 0 else [loss]

    def _scaled(self, loss: Tensor, share: float | None) -> Tensor:
        if share is not None:
            return loss * share
        return loss if self.program.microbatches == 1 else loss / self.program.microbatches

    def _hooks(self, i: int, weight_set: WeightSet) -> SavedWeights | None:
        """None where autograd's own saved tensors will hold the right weights when the backward runs."""
        in_place = weight_set.copy is None
        backward = self.method.backward
        if not self.reduction.replaces_saved:
            return None
        moved = self.program.gap(self.k, i) > 0  # in place, the latest weights of the backward are right by themselves
        if in_place and type(backward) is Latest and not (moved and self._keeps):  # a subclass may acquire others
            return None
        if in_place and self._stashes and not moved:
            return None
        return SavedWeights(self.weights.buffers(weight_set).table)

    def _run(
        self, weight_set: WeightSet, saved: SavedWeights | None, args: Any, kwargs: Any, target: Any, share: float | None
    ) -> Any:
        hooks: AbstractContextManager[Any] = nullcontext() if saved is None else saved
        with self.reduction.forward_on(self.weights.params, self.weights.tensors(weight_set)):
            with autocast_to(self.device.type, self.options.autocast), hooks:
                output = self._call(self.module, args, kwargs)
                if self.is_last:
                    output, parts = read_loss(call_loss(self.loss_fn, output, target))
                    self.losses.add(parts, share)
        return output

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``module``. One that changes its inputs in place, which the first forward shows, gets copies of them.

        A leaf may not be changed in place, and micro-batches are views of one tensor: changing one would invalidate the others.
        """
        if self._copy_inputs is False:
            return module(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        copies = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [copy._version for copy in copies]
        output = module(*args, **kwargs)
        if self._copy_inputs is None and torch.is_grad_enabled():
            self._copy_inputs = versions != [copy._version for copy in copies]
        return output

    # -- backward and update -----------------------------------------------------------------------------------------

    def backward(self, i: int, gradients: list[Tensor | None], loss_scale: float = 0.0) -> list[Tensor | None]:
        """B of micro-batch ``i``.

        Args:
            gradients: one per differentiable output of the forward, None where there is none; ``[]`` on the last stage.
            loss_scale: what they came with (see :attr:`loss_scale`).

        Returns:
            One per differentiable input, for the previous stage.
        """
        self.finish_update()
        if self.scaling is not None:
            self.scaling.begin_backward(i, loss_scale)
        flight = self._flights.pop(i)
        weight_set = (
            self.method.backward.acquire(self.weights, i)
            if not self._stashes or flight.weight_set is None
            else flight.weight_set
        )
        again = flight.weight_set or weight_set
        try:
            if flight.saved is not None:
                flight.saved.target = self.weights.buffers(weight_set).bases
            pairs = (
                [(out, None) for out in flight.outputs] if self.is_last else list(zip(flight.outputs, gradients, strict=True))
            )
            roots = [(out, grad) for out, grad in pairs if self.is_last or grad is not None]
            self.reduction.before_backward((i + 1) % self.program.microbatches == 0, flight.outputs)
            roots += [(loss, self._scale_of(loss)) for loss in flight.extra]
            roots = [(out, grad) for out, grad in roots if out.requires_grad]
            if self._reached is not None:
                self._note_reached(i, bool(roots), flight)
            if roots:
                with (
                    self._backward_on(again, weight_set),
                    autocast_to(self.device.type, None),
                ):  # recomputation runs the module again
                    torch.autograd.backward([out for out, _ in roots], [grad for _, grad in roots])
                self.master_weights.collect()
            if (i + 1) % self.program.microbatches == 0:
                self.reduction.start()
        finally:
            self.weights.release(weight_set)
            if flight.weight_set is not None and not self._stashes:
                self.weights.release(flight.weight_set)
        return [x.grad for x in flight.inputs]

    def _note_reached(self, i: int, found: bool, flight: Flight) -> None:
        """Warn after the first mini-batch if nothing came that this stage could learn from (the last stage's loss is checked in F)."""
        self._reached = self._reached or found
        if (i + 1) % self.program.microbatches == 0:
            if not self._reached and not self.is_last and any(p.requires_grad for p in self.parameters):
                warn_cut_off(self.k, bool(flight.outputs))
            self._reached = None

    def _backward_on(self, again: WeightSet, weight_set: WeightSet) -> AbstractContextManager[Any]:
        if self.reduction.replaces_saved:
            return recomputing(self.weights, again, weight_set)
        return self.reduction.backward_on(self.weights.params, self.weights.tensors(weight_set))

    def _scale_of(self, loss: Tensor) -> Tensor | None:
        return None if self.scaling is None else torch.full_like(loss, self.scaling.current)

    def update(self) -> None:
        """U: one step of the optimizer, of the schedule of its learning rate, and of the version count.

        Where it waits for others (replicas, or other stages for tied weights and when clipping by the global norm) only its part
        in the exchange is begun here, and the rest is done by :meth:`finish_update`, which the stage's next F or B calls.
        """
        self._announced = True
        if self.clipper is not None and self.clipper.rule.waits and self.program.depth > 1:
            self._own_gradients()
            if self._sums_ready():
                self._complete_gradients()  # the other stages wait for our norm
        elif self.tied and not self.reduction.deferred:
            self._own_gradients()
        elif not self.reduction.deferred:
            self.finish_update()

    def _own_gradients(self) -> None:
        """Gradients become the mean over the replicas, without loss scale; those of tied weights are told to the other holders."""
        if self._own:
            return
        self.reduction.finish()
        if self.scaling is not None:
            self.scaling.unscale(self.parameters)
        for weight in self.tied:
            weight.send_gradient(self.weights.version)
        self._own = True

    def tied_weight(self, tie: Tied) -> TiedWeight | None:
        """This stage's copy of a tied weight; None where nothing trains it."""
        return next((weight for weight in self.tied if weight.name == tie.name_on(self.k)), None)

    def _sums_ready(self) -> bool:
        return all(weight.can_receive(self.weights.version) for weight in self.tied)

    def _complete_gradients(self) -> None:
        """Gradients become what clipping starts from: those of tied weights the sum over their holders."""
        self._own_gradients()
        for weight in self.tied:
            weight.receive_sum(self.weights.version)
        if self.clipper is not None:
            self.clipper.send_norm(self.weights.version)
        self._complete = True

    def finish_update(self) -> None:
        """Carry out an update that waits for other processes, if there is one."""
        if not self._announced:
            return
        if not self._complete:
            self._complete_gradients()
        skipped = not self._clip()
        self._announced = self._own = self._complete = False
        self._retain()
        self.weights.before_update()
        # In flight there may be forwards on the latest weights in place whose backward is meant to see the new values.
        if self.optimizer is not None and not skipped:
            scaled = nullcontext() if self.method.lr_scale is None else self._scaled_lr(self.optimizer, self.method.lr_scale)
            with _unsafe_preserve_version_counter(tuple(self.weights.params)), scaled:
                self.weights.update(self._optimizer_step, self._ahead())
                self.master_weights.write_back()
        if skipped:  # a version like any other, but the predictor must not take in gradients that are not finite
            self.weights.update(skip_step)
            self.weights.version += 1
        else:
            self.weights.after_update()
        self._zero_grad()
        if self.scheduler is not None and not skipped:
            self.scheduler.step()
        self._after_update()

    def _zero_grad(self) -> None:
        if self.optimizer is None:
            return
        if type(self.optimizer).zero_grad is Optimizer.zero_grad:  # what it does, without its preparations
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def can_finish_update(self) -> bool:
        """Whether :meth:`finish_update` would not wait for a stage whose turn is later (see the emulator); tells others what it now can."""
        if not self._announced:
            return True
        if not self._complete and not self._sums_ready():
            return False
        if self.clipper is None:
            return True
        if not self._complete:
            self._complete_gradients()
        return self.clipper.can_clip(self.weights.version)

    def _clip(self) -> bool:
        """Scale the gradients. Returns False where loss scaling finds that the update must be skipped."""
        finite = self.scaling is None or self.scaling.finite
        if self.clipper is None:
            return finite
        norm = self.clipper.norm(self.weights.version)
        if self.scaling is not None and self.clipper.rule.waits and not math.isfinite(norm):
            self.scaling.note_overflow(self.scaling.current)  # all stages find it, and all of them skip
            self.scaling.finite = finite = False
        if finite:
            self.clipper.apply(norm)
        return finite

    def _after_update(self) -> None:
        version = self.weights.version
        if self.scaling is not None:
            self.scaling.update()
        if self.monitor is not None:
            self.monitor.updated(version, self.weights.params)
        if self.options.on_update is not None:
            self.options.on_update(self.k, version)

    def _ahead(self) -> int:
        """The steps that the first predicting forward after this update will ask for; 0 if they are not known, or none does."""
        if self.method.lr_scale is not None:  # the rates of this update are not those of the next
            return 0
        coming = range(self._next_forward, self._next_forward + self.program.microbatches)
        return next(filter(None, (self.method.forward.steps_ahead(self.program, self.k, i) for i in coming)), 0)

    @contextmanager
    def _scaled_lr(self, optimizer: Optimizer, lr_scale: Callable[[Program, int, int], float]) -> Iterator[None]:
        """The learning rate that the method wants for this update; the user's own is back afterwards."""
        scale = lr_scale(self.program, self.k, self.weights.version)
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

    def restart(self) -> None:
        """Nothing is in flight: the next micro-batch is number 0 again."""
        assert not self._flights, f"stage {self.k} restarts with micro-batches {sorted(self._flights)} in flight"
        if self._ready is not None:
            self.weights.release(self._ready[1])
        self._ready, self._next_forward = None, 0
        self.weights.retain(self.weights.version + 1)
        self.weights.restart = self.weights.version
        self.weights.forget_predictions()

    def _retain(self) -> None:
        """Keep the versions that coming forwards will ask for by number."""
        oldest = self.method.forward.oldest_needed(self.weights, self._next_forward)
        if oldest is not None:
            self.weights.retain(oldest)

    # -- loss scaling: what travels with the activations and with the gradients ---------------------------------------

    @property
    def loss_scale(self) -> float:
        """The loss scale in the gradients that the newest backward returned; 0 without loss scaling."""
        return 0.0 if self.scaling is None else self.scaling.current

    def note_overflow(self, overflowed: float) -> None:
        """An activation came with the news that a loss scale was too large; 0: none was."""
        if self.scaling is not None:
            self.scaling.note_overflow(overflowed)

    def overflow_to_send(self) -> float:
        """The news that goes on with the next activation."""
        return 0.0 if self.scaling is None else self.scaling.overflow_to_send()

    # -- evaluation and state ----------------------------------------------------------------------------------------

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any = None) -> Any:
        """Forward on the latest weights in eval mode without gradient; the loss on the last stage."""
        if not self.tied and (
            self.clipper is None or not self.clipper.rule.waits
        ):  # else it may wait for stages that are not there yet
            self.finish_update()
        training = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad(), autocast_to(self.device.type, self.options.autocast):
                with self.reduction.forward_on(self.weights.params, None):
                    output = self._call(self.reduction.unwrapped(self.module), args, kwargs)
                return read_loss(call_loss(self.loss_fn, output, target))[0] if self.is_last else output
        finally:
            for m, mode in training.items():
                m.training = mode

    def weight_bytes(self) -> int:
        """Bytes of memory that hold weights of this stage: its parameters and every copy of them, each storage once."""
        parts = [self.reduction.shards.get(p, p) for p in self.module.parameters()]
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}
        extra = self.predictor.nbytes() if isinstance(self.predictor, MasterWeightPredictor) else 0
        return sum(storages.values()) + self.weights.nbytes_of_copies() + self.master_weights.nbytes() + extra

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit, as tensors and plain data. Only with nothing in flight."""
        self._only_at_rest("saved")
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Only with nothing in flight."""
        self._only_at_rest("loaded")
        restore(self, state)
        self.restart()

    def _only_at_rest(self, what: str) -> None:
        if self._flights or self._announced:
            raise PipeOptimError(
                f"the state of stage {self.k} cannot be {what} while {len(self._flights)} micro-batches are in flight; "
                "call drain() first"
            )


__all__ = ["Flight", "LossFn", "StageWorker"]
