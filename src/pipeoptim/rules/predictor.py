"""`Predictor`: the prediction as an engine uses it: into given buffers, with the memory that a pure function lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.errors import ConfigError
from pipeoptim.optim import DelayCompensation
from pipeoptim.rules.checks import check_in_progress, check_steps
from pipeoptim.rules.clip_estimate import ClipEstimate
from pipeoptim.rules.combined import members
from pipeoptim.rules.displacement import PREVIOUS, Buffers, DisplacementMemory
from pipeoptim.rules.entries import EntrySet, EntryTable, optimizer_parameters
from pipeoptim.rules.fallback import copy_weights
from pipeoptim.rules.fused.dry import FusedDryStep
from pipeoptim.rules.fused.growing import GrowingPrediction
from pipeoptim.rules.fused.step import FusedStep
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.move import PartialGradient, Scalar
from pipeoptim.rules.rule_moves import predict_by_rule


class FusedAssumptions(NamedTuple):
    """What a fused prediction was made from, beyond the step itself; it holds as long as all of this is the same."""

    rates: Sequence[tuple[Scalar, ...]]
    scales: Sequence[float]
    kinds: list[str]
    weight_versions: list[int]


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
        shards: what this process holds of a parameter that is a distributed tensor; buffers then have the shape of the shard.

    Attributes:
        scales: of each param group the factor on its predicted displacements, ``W + scale * (W_hat - W)``; empty for 1. May be
            changed between two updates.

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
        shards: Mapping[Tensor, Tensor] = MappingProxyType({}),
    ) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        # Kernels step whole parameters; the optimizer's own step knows how to treat shards, and what to correct.
        corrected = any(isinstance(member, DelayCompensation) for member in members(optimizer))
        self.fused: Literal["auto", False] = False if shards or corrected else fused
        self.shards = shards
        self.scales: tuple[float, ...] = ()
        self._table = EntryTable(optimizer, kind, shards)
        self._fused_step = FusedStep(optimizer)
        self._dry_kernel = FusedDryStep()
        self._grads: Buffers | None = None  # the last gradients, where a rule needs them
        self._displacements = DisplacementMemory()
        self._fused_assumptions: FusedAssumptions | None = None

    @property
    def params(self) -> list[Tensor]:
        """The parameters, or the shards of them in this process, in param_groups order."""
        return [self.shards.get(p, p) for p in optimizer_parameters(self.optimizer)]

    @property
    def needs_grad(self) -> bool:
        """Whether gradients are kept from one update to the next, so that they must not be zeroed in place."""
        return self._table.current().need_grad

    @property
    def needs_previous(self) -> bool:
        """Whether `before_step` writes present weights into `spare`."""
        return bool(self._table.current().displaced)

    @property
    def uses_in_progress(self) -> bool:
        """Whether the gradient of the mini-batch in progress enters predictions."""
        return self._table.current().in_progress

    def _horizon(self, steps: int, *, after: int = 0) -> Horizon:
        """What to predict from, `after` so many further updates: the place where live information enters predictions."""
        return Horizon(steps, next_rates(self.optimizer, self.scheduler, steps, after=after), self.scales)

    # -- an update -------------------------------------------------------------------------------------------------

    @property
    def fuses(self) -> bool:
        """Whether `fused_step` can ever return True, so that a buffer is worth having ready."""
        entries = self._table.current()
        # What is made from a mini-batch in progress right after an update would be out of date with its first gradient.
        return not entries.in_progress and self._kernel_steps(entries)

    def _kernel_steps(self, entries: EntrySet) -> bool:
        return self.fused == "auto" and self._fused_step.possible(entries.all)

    def fused_step(self, out: Sequence[Tensor], steps: int) -> bool:
        """Step the optimizer and write ``W_hat(t + 1 + steps)`` into `out` in the same pass over memory.

        Replaces ``before_step``, ``optimizer.step()`` and the first ``predict_into(out, steps)``; a scheduler is assumed to
        step once right after. False, with nothing done, where torch's own step has to run (see `rules.fused`).
        """
        check_steps(steps)
        entries = self._table.current()
        if self.fused != "auto" or steps == 0 or entries.in_progress:
            return False
        horizon = self._horizon(steps, after=1)  # the present rate is that of this step; the prediction begins with the next
        if not self._fused_step(entries.all, horizon, out):
            return False
        self._note_fused(entries, horizon, out)
        return True

    def fused_step_over_gradients(self, steps: int) -> list[Tensor] | None:
        """As `fused_step`, into the memory of the gradients, which is faster: those, one per parameter, or None with nothing done.

        The parameters have no gradients afterwards. Impossible where one has none, where somebody else has it as well (a hook, a
        bucket of gradients), and where the rule needs it again.
        """
        check_steps(steps)
        entries = self._table.current()
        # A rule that needs the gradient again could not make a second prediction for this version.
        if self.fused != "auto" or steps == 0 or entries.need_grad or entries.in_progress:
            return None
        horizon = self._horizon(steps, after=1)
        out = self._fused_step.over_gradients(entries.all, horizon)
        if out is not None:
            for entry in entries.all:  # their memory holds predictions now
                entry.weight.grad = None
            self._note_fused(entries, horizon, out)
        return out

    def _note_fused(self, entries: EntrySet, horizon: Horizon, out: Sequence[Tensor]) -> None:
        """What a fused step has predicted, into which buffers."""
        # The buffers hold W_t + s d now: a point on the line from which other predictions can be made.
        positions = [horizon.displacements(entry) for entry in entries.displaced]
        self._displacements.remember(entries.displaced, out, positions)
        self._fused_assumptions = _assumptions(entries, horizon)

    def step(self) -> None:
        """``optimizer.step()``, by the kernel of `fused_step` where it has one: for a stage that has nothing to predict."""
        # No buffers, no horizon: the kernel steps only.
        entries = self._table.current()
        if not (self._kernel_steps(entries) and self._fused_step(entries.all)):
            self.optimizer.step()

    def still_holds(self, steps: int) -> bool:
        """Whether the prediction of the last `fused_step` is what `predict_into` would write now.

        It is not if someone changed learning rates, scale, kinds or weights since: a callback between two mini-batches, say.
        """
        # Compared instead of noted: nothing tells a predictor that a user changed a rate or a weight.
        return self._fused_assumptions == _assumptions(self._table.current(), self._horizon(steps))

    def before_step(self, spare: Sequence[Tensor] | None) -> None:
        """Call just before ``optimizer.step()``. By displacement, fills `spare` with W_t; without one nothing is predicted."""
        entries = self._table.current()
        if not entries.displaced:
            return
        # Known points belong to the displacement that this step replaces.
        self._displacements.forget()
        if spare is not None:
            _check_count(spare, len(entries.all))
            copy_weights([entry.weight for entry in entries.displaced], [spare[entry.number] for entry in entries.displaced])
            self._displacements.remember(entries.displaced, spare, [PREVIOUS] * len(entries.displaced))

    def after_step(self) -> None:
        """Call just after the step, with the gradients still in place."""
        entries = self._table.current()
        if entries.need_grad:
            # References, not copies: the engine drops p.grad afterwards, so these tensors are not written again.
            self._grads = [entry.weight.grad if entry.needs_grad else None for entry in entries.all]

    # -- predictions ---------------------------------------------------------------------------------------------------

    def predict_into(
        self,
        out: Sequence[Tensor],
        steps: int,
        in_progress: Sequence[PartialGradient | None] = (),
        clip: ClipEstimate | None = None,
    ) -> None:
        """Write ``W_hat(t + steps)`` into `out`: one buffer per parameter, none of them a parameter.

        `in_progress` and `clip` are what the kind "in_progress" is made from, see `predict_weights`.

        `out` may be the `spare` of `before_step`, whatever it holds by now; a call with another `steps` for
        the same version starts from that. Equal bit for bit to `predict_weights`, except that such a second
        call rounds twice.
        """
        check_steps(steps)
        self._dry_kernel.begin(out)  # before the checks, which read the same objects
        entries = self._table.current()
        weights = [entry.weight for entry in entries.all]
        check_in_progress(in_progress, clip, weights, used=entries.in_progress)
        _check_buffers(weights, out)
        if entries.displaced:
            unscaled = Horizon(steps, (), self.scales)
            self._displacements.predict_into(entries.displaced, out, [unscaled.displacements(e) for e in entries.displaced])
        if len(entries.displaced) == len(entries.all):
            return
        if steps == 0:
            others = [entry for entry in entries.all if entry.kind != "displacement"]
            copy_weights([entry.weight for entry in others], [out[entry.number] for entry in others])
        else:
            grads = self._grads if self._grads is not None else [None] * len(entries.all)
            horizon = self._horizon(steps)._replace(in_progress=in_progress, clip=clip)
            predict_by_rule(entries.all, grads, horizon, out, dry_kernel=self._dry_kernel)

    @property
    def growing(self) -> GrowingPrediction | None:
        """Makes the prediction of the last `predict_into` anew as gradients in progress grow, if kernels made all of it, else None.

        For whoever knows that meanwhile nothing else changes, neither weights nor state nor options.
        """
        return self._dry_kernel.growing

    # -- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs to predict the same bits: tensors (copies) and plain data only."""
        return {
            "kinds": self._table.current().kinds,
            "grads": _cloned(self._grads),
            "known": _cloned(self._displacements.points),
            "known_at": self._displacements.saved_positions(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state_dict()` of a predictor of the same kinds over the same parameters."""
        kinds = self._table.current().kinds
        if state["kinds"] != kinds:
            raise ConfigError(
                f"state of prediction kinds {state['kinds']} cannot be loaded into {kinds}: use those it was saved with"
            )
        self._grads = self._like_params(state["grads"])
        self._displacements.load(self._like_params(state["known"]), state["known_at"])
        # Whatever was predicted before the load belongs to other weights.
        self._fused_assumptions = None

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


def _assumptions(entries: EntrySet, horizon: Horizon) -> FusedAssumptions:
    # autograd counts in-place changes: a weight that was changed is noticed without reading it.
    # The lowest bit says whether it is trained: one that was frozen since stays where it is.
    weights = [2 * entry.weight._version + entry.weight.requires_grad for entry in entries.all]
    return FusedAssumptions(horizon.rates, horizon.scales, entries.kinds, weights)


@torch.no_grad()
def _copied(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.detach().to(weight.device, copy=True)


def _cloned(tensors: Sequence[Tensor | None] | None) -> Buffers | None:
    return None if tensors is None else [None if t is None else t.detach().clone() for t in tensors]


def _check_buffers(weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    _check_count(out, len(weights))
    for weight, buffer in zip(weights, out, strict=True):
        if weight.shape != buffer.shape:
            raise ConfigError(f"a buffer of shape {tuple(buffer.shape)} cannot hold a parameter of shape {tuple(weight.shape)}")
        if weight.numel() and weight.data_ptr() == buffer.data_ptr():
            raise ConfigError("a buffer is the parameter itself: a prediction must not overwrite the weights it starts from")


def _check_count(buffers: Sequence[Tensor], parameters: int) -> None:
    if len(buffers) != parameters:
        raise ConfigError(f"{len(buffers)} buffers for {parameters} parameters: pass one buffer per parameter")
