"""`Predictor`: the prediction as an engine uses it: into given buffers, with the memory that a pure function lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.errors import ConfigError
from pipeoptim.rules.checks import check_steps
from pipeoptim.rules.entries import ParameterEntry, parameter_entries, parameters, predict_by_rule
from pipeoptim.rules.fallback import copy_weights, extrapolate
from pipeoptim.rules.fused.step import FusedStep, could_fuse
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.move import Scalar

PREVIOUS = -1
"""Where the previous weights lie on the line ``W_t + h * (W_t - W_{t-1})``."""

Buffers = list[Tensor | None]


class Predictor:
    """Predicts the weights of one optimizer, update after update, without a third copy of them.

    Each update is ``before_step(spare)``, ``optimizer.step()``, ``after_step()``, then any number of
    ``predict_into(out, s)``. Or, faster where it returns True, ``fused_step(out, s)``, ``after_step()``.

    With a rule it holds nothing but, where the rule needs them (`needs_grad`), references to the last
    gradients: the engine must then set ``p.grad = None`` and not zero it in place. By displacement
    (kind="displacement", or an optimizer without a rule) the one buffer `spare` holds W_{t-1} until the
    prediction is written over it.

    Args:
        optimizer: a torch optimizer, or a `CombinedOptimizer`.
        kind: see `predict_weights`; a param group with an entry "prediction" uses that one instead.
        scheduler: the optimizer's scheduler; its future rates are used by the kinds "refined" and "decayed".
        fused: "auto" lets `fused_step` work where it can; False switches it off, so that every update is
            torch's own, bit for bit.
        parts: what this process holds of a parameter that is a distributed tensor; buffers then have the shape of the part.

    Raises:
        ConfigError: as `predict_weights` does.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        kind: str = "refined",
        scheduler: LRScheduler | None = None,
        fused: Literal["auto", False] = "auto",
        parts: Mapping[Tensor, Tensor] = MappingProxyType({}),
    ) -> None:
        self.optimizer = optimizer
        self.kind = kind
        self.scheduler = scheduler
        self.fused: Literal["auto", False] = False if parts else fused
        self.parts = parts
        self._made: list[ParameterEntry] = []
        self._made_for: list[tuple[Any, ...]] | None = None
        self._one_each: list[ParameterEntry] = []  # a parameter of each group: kind and options are the group's
        self._moves_by_itself = False  # whether any is predicted by displacement
        self._fusable: bool | None = None  # None: not asked yet, which may build the kernels
        self._fused_step = FusedStep(optimizer)
        self._items()  # refuses what cannot be predicted
        self._grads: Buffers | None = None
        self._known: Buffers | None = None  # by displacement: buffers that hold W + h * d ...
        self._known_at = PREVIOUS  # ... and their h
        self._adopt = False  # after a resume: drop our own copy as soon as the engine's buffer holds its content
        self._fused_for: tuple[Any, ...] | None = None  # what the last fused prediction assumed

    @property
    def params(self) -> list[Tensor]:
        """The parameters, or the parts of them in this process, in param_groups order."""
        return [self.parts.get(p, p) for p in parameters(self.optimizer)]

    @property
    def needs_grad(self) -> bool:
        """Whether gradients are kept from one update to the next, so that they must not be zeroed in place."""
        self._items()
        return any(item.needs_grad for item in self._one_each)

    @property
    def needs_previous(self) -> bool:
        """Whether `before_step` writes present weights into `spare`."""
        self._items()
        return self._moves_by_itself

    def _items(self) -> list[ParameterEntry]:
        """As `parameter_entries`, made anew only when the param groups are others than before."""
        groups = self.optimizer.param_groups
        made_for = [(id(group), id(group["params"]), len(group["params"]), group.get("prediction")) for group in groups]
        if self._made_for != made_for:
            self._made, self._made_for = parameter_entries(self.optimizer, self.kind, self.parts), made_for
            self._one_each = list({item.group_number: item for item in self._made}.values())
            self._moves_by_itself = any(item.kind == "displacement" for item in self._one_each)
            self._fusable = None
        return self._made

    # -- an update -------------------------------------------------------------------------------------------------

    @property
    def fuses(self) -> bool:
        """Whether `fused_step` can ever return True, so that a buffer is worth having ready."""
        parts = self._items()
        if self.fused == "auto" and self._fusable is None:
            self._fusable = could_fuse(parts)
        return bool(self._fusable)

    def fused_step(self, out: Sequence[Tensor], steps: int) -> bool:
        """Step the optimizer and write ``W_hat(t + 1 + steps)`` into `out` in the same pass over memory.

        Replaces ``before_step``, ``optimizer.step()`` and the first ``predict_into(out, steps)``; a scheduler is assumed to
        step once right after. False, with nothing done, where torch's own step has to run (see `rules.fused`).
        """
        check_steps(steps)
        if self.fused != "auto" or steps == 0:
            return False
        parts = self._items()
        rates = next_rates(self.optimizer, self.scheduler, steps, after=1)
        if not self._fused_step(parts, rates, out):
            return False
        self._note(parts, rates, out, steps)
        return True

    def fused_step_over_gradients(self, steps: int) -> list[Tensor] | None:
        """As `fused_step`, into the memory of the gradients, which is faster: those, one per parameter, or None with nothing done.

        The parameters have no gradients afterwards. Not where one has none, somebody else has it as well (a hook, a bucket of
        gradients), or the rule needs it again.
        """
        check_steps(steps)
        if self.fused != "auto" or steps == 0 or self.needs_grad:
            return None
        parts = self._items()
        rates = next_rates(self.optimizer, self.scheduler, steps, after=1)
        out = self._fused_step.over_gradients(parts, rates)
        if out is not None:
            for item in parts:
                item.weight.grad = None
            self._note(parts, rates, out, steps)
        return out

    def _note(
        self, parts: Sequence[ParameterEntry], rates: list[tuple[Scalar, ...]], out: Sequence[Tensor], steps: int
    ) -> None:
        """What a fused step has predicted, into which buffers."""
        self._known_at, self._adopt = steps, False
        self._known = None
        if self._moves_by_itself:
            self._known = [b if item.kind == "displacement" else None for item, b in zip(parts, out, strict=True)]
        self._fused_for = self._circumstances(parts, rates)

    def step(self) -> None:
        """``optimizer.step()``, by the kernel of `fused_step` where it has one: for a stage that has nothing to predict."""
        if not (self.fuses and self._fused_step(self._items())):
            self.optimizer.step()

    def still_holds(self, steps: int) -> bool:
        """Whether the prediction of the last `fused_step` is what `predict_into` would write now.

        It is not if someone changed learning rates, kinds or weights since: a callback between two mini-batches, say.
        """
        parts = self._items()
        return self._fused_for == self._circumstances(parts, next_rates(self.optimizer, self.scheduler, steps))

    def _circumstances(self, parts: Sequence[ParameterEntry], rates: list[tuple[Scalar, ...]]) -> tuple[Any, ...]:
        return rates, [item.kind for item in self._one_each], [item.weight._version for item in parts]

    def before_step(self, spare: Sequence[Tensor] | None) -> None:
        """Call just before ``optimizer.step()``. By displacement, fills `spare` with W_t; without one nothing is predicted."""
        parts = self._items()
        if not self._moves_by_itself:
            return
        self._known, self._known_at, self._adopt = None, PREVIOUS, False
        if spare is not None:
            moved = [(i.weight, b) for i, b in zip(parts, spare, strict=True) if i.kind == "displacement"]
            copy_weights([w for w, _ in moved], [b for _, b in moved])
            self._known = [b if i.kind == "displacement" else None for i, b in zip(parts, spare, strict=True)]

    def after_step(self) -> None:
        """Call just after the step, with the gradients still in place."""
        if self.needs_grad:
            parts = self._items()
            self._grads = [item.weight.grad if item.needs_grad else None for item in parts]

    # -- predictions ---------------------------------------------------------------------------------------------------

    def predict_into(self, out: Sequence[Tensor], steps: int) -> None:
        """Write ``W_hat(t + steps)`` into `out`: one buffer per parameter, none of them a parameter.

        `out` may be the `spare` of `before_step`, whatever it holds by now; a call with another `steps` for
        the same version starts from that. Equal bit for bit to `predict_weights`, except that such a second
        call rounds twice.
        """
        check_steps(steps)
        parts = self._items()
        _check_buffers([item.weight for item in parts], out)
        moved = [n for n, item in enumerate(parts) if item.kind == "displacement"]
        if moved:
            self._extrapolate_into([parts[n].weight for n in moved], [out[n] for n in moved], steps, moved)
        if steps == 0:
            rest = [n for n in range(len(parts)) if n not in set(moved)]
            copy_weights([parts[n].weight for n in rest], [out[n] for n in rest])
        elif len(moved) < len(parts):
            rates = next_rates(self.optimizer, self.scheduler, steps)
            predict_by_rule(parts, self._grads if self._grads is not None else [None] * len(parts), rates, out)

    def _extrapolate_into(self, weights: list[Tensor], out: list[Tensor], steps: int, numbers: list[int]) -> None:
        """The parameters by displacement, whose places in all are `numbers`."""
        known = None if self._known is None else [self._known[n] for n in numbers]
        if known is None or any(tensor is None for tensor in known):
            copy_weights(weights, out)
            return
        line = [tensor for tensor in known if tensor is not None]
        same = _same_buffers(line, out)
        if steps == 0:
            if same:  # the direction would be lost; an engine uses W_t itself for s = 0, so this copy is a rare one
                self._know([tensor.detach().clone() for tensor in line], numbers)
            copy_weights(weights, out)
            return
        for weight, tensor, buffer in zip(weights, line, out, strict=True):
            extrapolate(weight, tensor, self._known_at, steps, buffer)
        if same or self._adopt:
            self._know(out, numbers)
            self._known_at, self._adopt = steps, False

    def _know(self, tensors: list[Tensor], numbers: list[int]) -> None:
        assert self._known is not None
        for n, tensor in zip(numbers, tensors, strict=True):
            self._known[n] = tensor

    # -- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs to predict the same bits: tensors (copies) and plain data only."""
        return {
            "kinds": self._kinds(),
            "grads": _cloned(self._grads),
            "known": _cloned(self._known),
            "known_at": self._known_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state_dict()` of a predictor of the same kinds over the same parameters."""
        if state["kinds"] != self._kinds():
            raise ConfigError(
                f"state of prediction kinds {state['kinds']} cannot be loaded into {self._kinds()}: use those it was saved with"
            )
        self._grads = self._like_params(state["grads"])
        self._known = self._like_params(state["known"])
        self._known_at = int(state["known_at"])
        self._adopt = self._known is not None
        self._fused_for = None

    def _kinds(self) -> list[str]:
        """The kind of each param group that has parameters."""
        return list({item.group_number: item.kind for item in self._items()}.values())

    def _like_params(self, saved: Sequence[Tensor | None] | None) -> Buffers | None:
        """Copies of saved tensors on the devices of the parameters."""
        if saved is None:
            return None
        weights = self.params
        if len(saved) != len(weights):
            raise ConfigError(
                f"state of {len(saved)} parameters cannot be loaded into {len(weights)}: load it into the same stage"
            )
        pairs = zip(saved, weights, strict=True)
        return [None if tensor is None else _copied(tensor, weight) for tensor, weight in pairs]


@torch.no_grad()
def _copied(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.detach().to(weight.device, copy=True)


def _cloned(tensors: Sequence[Tensor | None] | None) -> Buffers | None:
    return None if tensors is None else [None if t is None else t.detach().clone() for t in tensors]


def _same_buffers(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists name the same memory."""
    same = [a is b or a.data_ptr() == b.data_ptr() for a, b in zip(first, second, strict=True) if a.numel()]
    if any(same) and not all(same):
        raise ConfigError("some of the buffers hold the previous weights and some do not: pass all of them, or none")
    return all(same)


def _check_buffers(weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    if len(out) != len(weights):
        raise ConfigError(f"{len(out)} buffers for {len(weights)} parameters: pass one buffer per parameter")
    for weight, buffer in zip(weights, out, strict=True):
        if weight.shape != buffer.shape:
            raise ConfigError(f"a buffer of shape {tuple(buffer.shape)} cannot hold a parameter of shape {tuple(weight.shape)}")
        if weight.numel() and weight.data_ptr() == buffer.data_ptr():
            raise ConfigError("a buffer is the parameter itself: a prediction must not overwrite the weights it starts from")
