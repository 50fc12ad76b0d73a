"""What a script keeps from plain training although the pipeline does it: refused in a sentence.

A leftover ``optimizer.step()`` would move weights with a part of a mini-batch's gradients, a leftover ``zero_grad()`` drop that part, and
``scheduler.step()`` advance the rate twice: all in silence, or until torch complains of an in-place write somewhere else. From a mini-batch
to the next ``drain()`` these belong to the pipeline; afterwards the script may train on with the same optimizers by itself. An evaluation
by the model that was cut belongs behind a ``drain()`` as well, since until then its stages have weights of different versions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from pipeoptim.errors import ConfigError
from pipeoptim.rules.combined import members


class ScriptCalls:
    """Tells the calls of stage ``k``'s pipeline from those of the script around it.

    Args:
        optimizer, scheduler: of the stage.
        k: the stage.
        flushes: whether nothing is in flight between mini-batches.
        whole: the model that the stage was cut from, where there is one.

    Attributes:
        by_pipeline: whether the pipeline itself is stepping the optimizer.
        in_flight: whether mini-batches are in flight.
    """

    def __init__(
        self, optimizer: Optimizer | None, scheduler: LRScheduler | None, k: int, flushes: bool, whole: nn.Module | None
    ) -> None:
        self.optimizer, self.scheduler, self.k, self.flushes = optimizer, scheduler, k, flushes
        self._whole = None if whole is None else weakref.ref(whole)
        self._hook: RemovableHandle | None = None  # on the whole model, while mini-batches are in flight
        self.by_pipeline = self.in_flight = False
        self._epoch: int | None = None
        self._summed: tuple[Tensor, Tensor, int] | None = None
        for one in () if optimizer is None else (optimizer, *members(optimizer)):
            _watch(one, self)
        if whole is not None:
            _forget_earlier(whole)

    def check_step(self, optimizer: Optimizer) -> None:
        """Before every ``optimizer.step()``, whoever calls it."""
        if self.by_pipeline:
            return
        idle = optimizer is self.optimizer and all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        if self.in_flight or idle:
            raise ConfigError(
                f"optimizer.step() was called on the optimizer of stage {self.k}, which the pipeline steps itself, once per mini-batch; "
                "remove the call, and those of zero_grad(), loss.backward() and scheduler.step(); to train on without the pipeline, call "
                "drain() first"
            )

    def check_zero_grad(self) -> None:
        """Before every ``optimizer.zero_grad()``, whoever calls it."""
        if self.in_flight and not self.by_pipeline:
            raise ConfigError(
                f"zero_grad() was called on the optimizer of stage {self.k} while mini-batches are in flight, whose gradients the pipeline "
                "sums and clears itself; remove the call, or call drain() first"
            )

    def note_scheduled(self) -> None:
        """The pipeline has advanced the scheduler."""
        self._epoch = _epoch_of(self.scheduler)

    def note_summed(self, parameters: Sequence[Tensor]) -> None:
        """A backward has ended that was not the last of its mini-batch."""
        p = next((p for p in parameters if p.grad is not None), None)
        self._summed = None if p is None or p.grad is None else (p, p.grad, p.grad._version)

    def forget_sum(self) -> None:
        """The gradients of a mini-batch are complete, or given up."""
        self._summed = None

    def begin_mini_batch(self) -> None:
        """Before the actions of a mini-batch: what the script has done since the last one.

        Raises:
            ConfigError: it has stepped the scheduler, or changed a sum of gradients that is not complete.
        """
        # One more than the pipeline's own: a state that was loaded is anywhere else.
        if self._epoch is not None and _epoch_of(self.scheduler) == self._epoch + 1:
            raise ConfigError(
                f"the scheduler of stage {self.k} was stepped by the script as well, but the pipeline advances it, once per update; remove "
                "scheduler.step(), or do not give it to the pipeline"
            )
        if self._summed is not None:
            p, gradient, version = self._summed
            if p.grad is not gradient or gradient._version != version:
                raise ConfigError(
                    f"the gradients of stage {self.k}, of which the pipeline has not yet summed all micro-batches, were cleared or changed "
                    "between mini-batches; remove optimizer.step() and zero_grad(), and instead of clip_grad_norm_() give clip="
                )
        if not self.in_flight and not self.flushes:
            self.in_flight = True
            whole = None if self._whole is None else self._whole()
            if whole is not None:
                self._hook = whole.register_forward_pre_hook(_BeforeForward(weakref.ref(self)))

    def restart(self) -> None:
        """Nothing is in flight any more."""
        self.in_flight, self._epoch, self._summed = False, None, None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _epoch_of(scheduler: Any) -> int | None:
    """How often ``scheduler`` was stepped; a chained one does not count, but its members do."""
    for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
        if hasattr(one, "last_epoch"):
            return int(one.last_epoch)
    return None


def _watch(optimizer: Optimizer, calls: ScriptCalls) -> None:
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # an optimizer that torch did not make
        return
    if optimizer not in _WATCHED:
        optimizer.register_step_pre_hook(_before_step)
        vars(optimizer).setdefault("zero_grad", _ZeroGrad(optimizer))  # torch has no hook for it
    _WATCHED[optimizer] = weakref.ref(calls)  # in place of an earlier pipeline's: the newest has it


_WATCHED: WeakKeyDictionary[Optimizer, weakref.ref[ScriptCalls]] = WeakKeyDictionary()


def _calls_of(optimizer: Optimizer) -> ScriptCalls | None:
    """None for an optimizer whose pipeline is gone, and for a copy of one: these are the script's."""
    found = _WATCHED.get(optimizer)
    return None if found is None else found()


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    calls = _calls_of(optimizer)
    if calls is not None:
        calls.check_step(optimizer)


_before_step.only_checks = True  # type: ignore[attr-defined]  # a kernel may step in place of torch although this hook is there


class _BeforeForward:
    """Of the model that was cut, with its stages in flight. Copied or saved with the model it does nothing."""

    def __init__(self, calls: weakref.ref[ScriptCalls] | None = None) -> None:
        self._calls = calls

    def __call__(self, *_: Any) -> None:
        calls = None if self._calls is None else self._calls()
        if calls is not None and calls.in_flight:
            raise ConfigError(
                "the model that was cut into stages was called while mini-batches are in flight, when its stages have weights of different "
                "versions, so that the result would be that of no model; call drain() first, or pipe.evaluate(), which does"
            )

    def __deepcopy__(self, _memo: Any) -> _BeforeForward:
        return _BeforeForward()

    def __reduce__(self) -> tuple[type[_BeforeForward], tuple[()]]:
        return _BeforeForward, ()


def _forget_earlier(whole: nn.Module) -> None:
    """An earlier pipeline may have left mini-batches in flight, but the weights are the newest's."""
    hooks = whole._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _BeforeForward)]:
        del hooks[key]


class _ZeroGrad:
    """``zero_grad`` of one optimizer, with a look before it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)  # which holds this object

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            calls = _calls_of(optimizer)
            if calls is not None:
                calls.check_zero_grad()
            type(optimizer).zero_grad(optimizer, *args, **kwargs)

    def __deepcopy__(self, _memo: Any) -> _ZeroGrad:
        return self
