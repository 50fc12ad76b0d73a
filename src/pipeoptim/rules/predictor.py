"""`Predictor`: the prediction as an engine uses it: into given buffers, with the memory that a pure function lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.errors import ConfigError
from pipeoptim.rules.checks import check_group, check_kind, check_steps
from pipeoptim.rules.drive import parameters, write_by_rule
from pipeoptim.rules.fallback import copy_weights, extrapolate
from pipeoptim.rules.registry import find_rule

PREVIOUS = -1
"""Where the previous weights lie on the line ``W_t + h * (W_t - W_{t-1})``."""


class Predictor:
    """Predicts the weights of one optimizer, update after update, without a third copy of them.

    Each update is ``before_step(spare)``, ``optimizer.step()``, ``after_step()``, then any number of
    ``predict_into(out, s)``.

    With a rule it holds nothing but, where the rule needs them (`needs_grad`), references to the last
    gradients: the engine must then set ``p.grad = None`` and not zero it in place. By displacement
    (kind="displacement", or an optimizer without a rule) the one buffer `spare` holds W_{t-1} until the
    prediction is written over it.

    Args:
        optimizer: a torch optimizer.
        kind: see `predict_weights`.
        scheduler: the optimizer's scheduler; its future rates are used by the kinds "refined" and "decayed".

    Raises:
        ConfigError: as `predict_weights` does.
    """

    def __init__(self, optimizer: Optimizer, *, kind: str = "refined", scheduler: LRScheduler | None = None) -> None:
        self._rule = find_rule(optimizer)
        check_kind(kind, self._rule, optimizer)
        for group in optimizer.param_groups:
            check_group(group)
        self.optimizer = optimizer
        self.kind = kind
        self.scheduler = scheduler
        self._by_displacement = self._rule is None or kind == "displacement"
        self._grads: list[Tensor | None] | None = None
        self._known: Sequence[Tensor] | None = None  # buffers that hold W + h * d ...
        self._known_at = PREVIOUS  # ... and their h
        self._adopt = False  # after a resume: drop our own copy as soon as the engine's buffer holds its content

    @property
    def params(self) -> list[Tensor]:
        """The parameters, in param_groups order."""
        return parameters(self.optimizer)

    @property
    def needs_grad(self) -> bool:
        """Whether gradients are kept from one update to the next, so that they must not be zeroed in place."""
        return any(self._group_needs_grad(group) for group in self.optimizer.param_groups)

    @property
    def needs_previous(self) -> bool:
        """Whether `before_step` writes the present weights into `spare`."""
        return self._by_displacement

    def _group_needs_grad(self, group: Mapping[str, Any]) -> bool:
        return not self._by_displacement and self._rule is not None and self._rule.needs_grad(group, self.kind)

    def before_step(self, spare: Sequence[Tensor] | None) -> None:
        """Call just before ``optimizer.step()``. By displacement, fills `spare` with W_t; without one nothing is predicted."""
        if not self._by_displacement:
            return
        self._known, self._known_at, self._adopt = None if spare is None else list(spare), PREVIOUS, False
        if spare is not None:
            copy_weights(self.params, spare)

    def after_step(self) -> None:
        """Call just after ``optimizer.step()``, with the gradients still in place."""
        if self.needs_grad:
            groups = self.optimizer.param_groups
            self._grads = [p.grad if self._group_needs_grad(group) else None for group in groups for p in group["params"]]

    def predict_into(self, out: Sequence[Tensor], steps: int) -> None:
        """Write ``W_hat(t + steps)`` into `out`: one buffer per parameter, none of them a parameter.

        `out` may be the `spare` of `before_step`, whatever it holds by now; a call with another `steps` for
        the same version starts from that. Equal bit for bit to `predict_weights`, except that such a second
        call rounds twice.
        """
        check_steps(steps)
        weights = self.params
        _check_buffers(weights, out)
        if self._by_displacement:
            self._extrapolate_into(weights, out, steps)
        elif steps == 0:
            copy_weights(weights, out)
        else:
            assert self._rule is not None
            grads = self._grads if self._grads is not None else [None] * len(weights)
            write_by_rule(self._rule, self.optimizer, grads, steps, self.kind, self.scheduler, out)

    def _extrapolate_into(self, weights: list[Tensor], out: Sequence[Tensor], steps: int) -> None:
        known = self._known
        if known is None:
            copy_weights(weights, out)
            return
        same = _same_buffers(known, out)
        if steps == 0:
            if same:  # the direction would be lost; an engine uses W_t itself for s = 0, so this copy is a rare one
                self._known = [tensor.detach().clone() for tensor in known]
            copy_weights(weights, out)
            return
        for weight, tensor, buffer in zip(weights, known, out, strict=True):
            extrapolate(weight, tensor, self._known_at, steps, buffer)
        if same or self._adopt:
            self._known, self._known_at, self._adopt = list(out), steps, False

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs to predict the same bits: tensors (copies) and plain data only."""
        return {
            "kind": self.kind,
            "by_displacement": self._by_displacement,
            "grads": _cloned(self._grads),
            "known": _cloned(self._known),
            "known_at": self._known_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state_dict()` of a predictor of the same kind over the same parameters."""
        if state["kind"] != self.kind or state["by_displacement"] != self._by_displacement:
            raise ConfigError(
                f"state of kind={state['kind']!r} cannot be loaded into kind={self.kind!r}: use the kind it was saved with"
            )
        self._grads = self._like_params(state["grads"])
        known = self._like_params(state["known"])
        self._known = None if known is None else [tensor for tensor in known if tensor is not None]
        self._known_at = int(state["known_at"])
        self._adopt = self._known is not None

    def _like_params(self, saved: Sequence[Tensor | None] | None) -> list[Tensor | None] | None:
        """Copies of saved tensors on the devices of the parameters."""
        if saved is None:
            return None
        weights = self.params
        if len(saved) != len(weights):
            raise ConfigError(
                f"state of {len(saved)} parameters cannot be loaded into {len(weights)}: load it into the same stage"
            )
        pairs = zip(saved, weights, strict=True)
        return [None if tensor is None else tensor.detach().to(weight.device, copy=True) for tensor, weight in pairs]


def _cloned(tensors: Sequence[Tensor | None] | None) -> list[Tensor | None] | None:
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
