"""All numerics of one stage: forward, backward and update of micro-batches, on the weights that the method says.

The emulator and the distributed engine call this one class, so what they compute is the same by construction. It knows
nothing of other stages: activations and gradients come in and go out as plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.random import StageRandom
from pipeoptim.engine.tree import as_args, differentiable
from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.methods import Method
from pipeoptim.rules import Predictor
from pipeoptim.schedule import Program
from pipeoptim.weights import Held, Latest, SavedWeights, StageWeights, Stashed, swapped
from pipeoptim.weights.store import WeightPredictor

LossFn = Callable[..., Tensor]


@dataclass
class Flight:
    """A micro-batch between its F and its B."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    saved: SavedWeights | None
    held: Held | None


class StageWorker:
    """Stage ``k`` of a pipeline: its module, its optimizer and every version of its weights that is alive.

    Args:
        module: the stage's part of the model.
        optimizer: moves the stage's parameters; stepped here, never by the user. None for a stage without parameters.
        method, program: which weights each action uses, and the order of the actions.
        k: the stage.
        loss_fn: ``loss_fn(output, target) -> scalar``, called on the last stage.
        scheduler: advanced once per update.
        prediction: kind of prediction (see :func:`pipeoptim.predict_weights`).
        seed: of the whole run; each stage draws from its own stream.
        device: where the stage computes.

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
        prediction: str = "refined",
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        params = _optimized(module, optimizer, scheduler, k)
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        self.method, self.program, self.k, self.loss_fn = method, program, k, loss_fn
        self.is_last = k == program.depth - 1
        self.predictor: WeightPredictor | None = None
        if optimizer is not None and method.predicts_on(program, k):
            own = method.predictor
            self.predictor = own(optimizer, program, k) if own else Predictor(optimizer, kind=prediction, scheduler=scheduler)
        self.weights = StageWeights(params, program, k, self.predictor)
        self.random = StageRandom(seed, k, device or (params[0].device if params else torch.device("cpu")))
        self._flights: dict[int, Flight] = {}
        self._ready: tuple[int, Held] | None = None
        self._next_forward = 0
        self._copy_inputs: bool | None = None  # None: not known yet whether the module changes its inputs in place

    # -- forward ---------------------------------------------------------------------------------------------------

    def prepare(self, i: int) -> None:
        """Choose (and predict) the weights for F of micro-batch ``i``; may be called while its input is on its way."""
        if self._ready is None:
            self._ready = (i, self.method.forward.acquire(self.weights, i))

    def forward(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any = None) -> Any:
        """F of micro-batch ``i``. Returns the output for the next stage, or the loss on the last stage."""
        self.prepare(i)
        assert self._ready is not None and self._ready[0] == i, f"F{i} out of order"
        held, self._ready = self._ready[1], None
        saved = self._hooks(i, held)
        inputs = differentiable((args, kwargs))
        try:
            with self.random.drawing():
                result = self._run(held, saved, args, kwargs, target)
        except BaseException:
            self.weights.release(held)
            raise
        stash = isinstance(self.method.backward, Stashed)
        outputs = [result / self.program.microbatches] if self.is_last else differentiable(as_args(result))
        if self.is_last and self.program.microbatches == 1:
            outputs = [result]
        self._flights[i] = Flight(inputs, outputs, saved, held if stash else None)
        if not stash:
            self.weights.release(held)
        self._next_forward = i + 1
        self._retain()
        return result.detach() if self.is_last else result

    def _hooks(self, i: int, held: Held) -> SavedWeights | None:
        """None where autograd's own saved tensors will hold the right weights when the backward runs."""
        in_place = held.copy is None
        backward = self.method.backward
        if in_place and (isinstance(backward, Latest) or (self.program.gap(self.k, i) == 0 and isinstance(backward, Stashed))):
            return None
        return SavedWeights(self.weights.buffers(held).table)

    def _run(self, held: Held, saved: SavedWeights | None, args: Any, kwargs: Any, target: Any) -> Any:
        hooks: AbstractContextManager[Any] = nullcontext() if saved is None else saved
        with swapped(self.weights.params, self.weights.tensors(held)):
            with hooks:
                output = self._call_module(args, kwargs)
                if self.is_last:
                    return check_loss(self.loss_fn(output, target))
        return output

    def _call_module(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module; learn in the first forward whether it changes its inputs in place, which a leaf forbids."""
        if self._copy_inputs is None:
            buffers = {name: b.detach().clone() for name, b in self.module.named_buffers()}
            state = torch.get_rng_state()
            try:
                output = self.module(*args, **kwargs)
                self._copy_inputs = False
                return output
            except RuntimeError as error:
                if "leaf Variable" not in str(error):
                    raise
                self._copy_inputs = True
                torch.set_rng_state(state)
                with torch.no_grad():
                    for name, b in self.module.named_buffers():
                        b.copy_(buffers[name])
        if self._copy_inputs:
            args = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, args)
        return self.module(*args, **kwargs)

    # -- backward and update -----------------------------------------------------------------------------------------

    def backward(self, i: int, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """B of micro-batch ``i``.

        Args:
            gradients: one per differentiable output of the forward, None where there is none; ``[]`` on the last stage.

        Returns:
            One per differentiable input, for the previous stage.
        """
        flight = self._flights.pop(i)
        held = flight.held or self.method.backward.acquire(self.weights, i)
        try:
            if flight.saved is not None:
                flight.saved.target = self.weights.buffers(held).bases
            pairs = [(flight.outputs[0], None)] if self.is_last else list(zip(flight.outputs, gradients, strict=True))
            roots = [(out, grad) for out, grad in pairs if self.is_last or grad is not None]
            if roots and roots[0][0].requires_grad:
                torch.autograd.backward([out for out, _ in roots], [grad for _, grad in roots])
        finally:
            self.weights.release(held)
        return [x.grad for x in flight.inputs]

    def update(self) -> None:
        """U: one step of the optimizer, of the schedule of its learning rate, and of the version count."""
        self._retain()
        self.weights.before_update()
        # In flight there may be forwards on the latest weights in place whose backward is meant to see the new values.
        if self.optimizer is not None:
            with _unsafe_preserve_version_counter(tuple(self.weights.params)), self._scaled_lr(self.optimizer):
                self.optimizer.step()
        self.weights.after_update()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()

    @contextmanager
    def _scaled_lr(self, optimizer: Optimizer) -> Iterator[None]:
        """The learning rate that the method wants for this update; the user's own is back afterwards."""
        scale = 1.0
        if self.method.lr_scale is not None:
            scale = self.method.lr_scale(self.program, self.k, self.weights.version)
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

    def _retain(self) -> None:
        """Keep the versions that coming forwards will ask for by number."""
        oldest = self.method.forward.oldest_needed(self.weights, self._next_forward)
        if oldest is not None:
            self.weights.retain(oldest)

    # -- evaluation and state ----------------------------------------------------------------------------------------

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any = None) -> Any:
        """Forward on the latest weights in eval mode without gradient; the loss on the last stage."""
        training = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad():
                output = self.module(*args, **kwargs)
                return check_loss(self.loss_fn(output, target)) if self.is_last else output
        finally:
            for m, mode in training.items():
                m.training = mode

    def weight_bytes(self) -> int:
        """Bytes of memory that hold weights of this stage: its parameters and every copy of them, each storage once."""
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.module.parameters()}
        return sum(storages.values()) + self.weights.nbytes_of_copies()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit, as tensors and plain data. Only with nothing in flight."""
        self._only_at_rest("saved")
        return {
            "module": self.module.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random": self.random.state_dict(),
            "version": self.weights.version,
            "predictor": None if self.predictor is None else self.predictor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Only with nothing in flight."""
        self._only_at_rest("loaded")
        self.module.load_state_dict(state["module"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.random.load_state_dict(state["random"])
        self.weights.version = state["version"]
        if self.predictor is not None and state["predictor"] is not None:
            self.predictor.load_state_dict(state["predictor"])
        self.restart()

    def _only_at_rest(self, what: str) -> None:
        if self._flights:
            raise PipeOptimError(
                f"the state of stage {self.k} cannot be {what} while {len(self._flights)} micro-batches are in flight; "
                "call drain() first"
            )


def check_loss(loss: Any) -> Tensor:
    """``loss``, if it is a scalar tensor.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dim() > 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"loss_fn returned {got}, must be a scalar tensor; reduce it, for instance with .mean()")
    return loss


def _optimized(module: nn.Module, optimizer: Optimizer | None, scheduler: LRScheduler | None, k: int) -> list[nn.Parameter]:
    """The parameters that ``optimizer`` moves, after checking that they are the module's."""
    if optimizer is None:
        if any(p.requires_grad for p in module.parameters()):
            raise ConfigError(f"stage {k} has parameters to train but no optimizer; make one from stage.parameters()")
        return []
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("LBFGS calls the model again inside its step, which a pipeline cannot do; use another optimizer")
    if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError(f"the scheduler of stage {k} belongs to another optimizer; make it from this stage's optimizer")
    own = {id(p) for p in module.parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [tuple(p.shape) for p in params if id(p) not in own]
    if foreign:
        raise ConfigError(
            f"the optimizer of stage {k} holds {len(foreign)} parameters that are not in the stage's module "
            f"(first shape {foreign[0]}); make one optimizer per stage, from stage.parameters()"
        )
    forgotten = {id(p) for p in module.parameters() if p.requires_grad} - {id(p) for p in params}
    if forgotten and not params:
        raise ConfigError(f"the optimizer of stage {k} holds none of its parameters")
    return params


__all__ = ["Flight", "LossFn", "StageWorker", "check_loss"]
