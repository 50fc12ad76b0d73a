"""The versions of one stage's weights that are alive: the latest, and the copies that in-flight micro-batches need.

A copy is made as late as possible. A forward on the latest weights takes none; weights are copied only when an update is about to
overwrite them and a micro-batch in flight must see them again. Free copies are reused, so there are never more of them than were
needed at once.

    F   latest() or predicted(s)  ──►  WeightSet, users + 1     (kept with the micro-batch, or released after F)
    B   the same set, or latest() ──►  WeightSet, users + 1     then release(): at 0 users its copy is free again
    U   before_update()  copies the latest weights if a set of them is in use
        update(step)     overwrites the latest weights, and may predict in the same pass
        after_update()   version + 1
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim.kernels import calls
from pipeoptim.schedule import Program
from pipeoptim.weights.layout import BufferSet, StorageLayout
from pipeoptim.weights.progress import UpdateProgress

_data_ptr = torch.Tensor.data_ptr

LARGE = calls.STREAM_FROM
"""Stages of at least so many weights write predictions over gradients: more than caches keep until the next forward."""


class WeightPredictor(Protocol):
    """What a stage asks for the weights of later versions (see :class:`pipeoptim.rules.Predictor`)."""

    @property
    def needs_previous(self) -> bool: ...

    def before_step(self, spare: Sequence[Tensor] | None) -> None: ...

    def after_step(self) -> None: ...

    def predict_into(self, out: Sequence[Tensor], steps: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class FusingPredictor(Protocol):
    """A predictor that can also step the optimizer and predict in one pass over memory."""

    @property
    def fuses(self) -> bool: ...

    def fused_step(self, out: Sequence[Tensor], steps: int) -> bool: ...

    def fused_step_over_gradients(self, steps: int) -> list[Tensor] | None: ...

    def still_holds(self, steps: int) -> bool: ...


class WeightKey(NamedTuple):
    """What the weights of a set are.

    Attributes:
        version: that they are, or are predicted from.
        steps: updates predicted from there; 0 for the version itself.
        seen: micro-batches of the update in progress that the prediction was made from; 0 where it is made without.
    """

    version: int
    steps: int = 0
    seen: int = 0


@runtime_checkable
class FollowsProgram(Protocol):
    """A predictor of a method's own, which depends on the program and can go over to another one."""

    def use_program(self, program: Program, stage: int) -> None: ...


class WeightSet:
    """One set of weights in use: the latest in place (``copy`` is None) or a copy.

    Attributes:
        key: what they are.
        early: predicted by the update itself, and not used yet.
    """

    __slots__ = ("copy", "early", "key", "users")

    def __init__(self, key: WeightKey, copy: BufferSet | None = None) -> None:
        self.key = key
        self.copy = copy
        self.users = 0
        self.early = False


class StageWeights:
    """All live versions of the parameters that the optimizer of stage ``k`` moves.

    Args:
        params: the parameters, in the order of the optimizer's groups.
        program, k: the action program and the stage, for gaps.
        predictor: writes predicted weights; None where the method predicts nothing.
        progress: of the coming update, where predictions are made from its gradients so far; None where they are not, so that there is
            one per version and number of steps.

    Attributes:
        version: updates applied since the stage was made.
        restart: the version at the last (re)start; micro-batches are counted from there.
        next_is_skipped: whether it is known that the coming update will change nothing.
        synchronous: whether no update comes between a forward and its backward now, so that nothing is predicted.
        most_copies: the largest number of copies that was needed at once. It decides whether an update may step and predict in
            one pass, which rounds differently from two, so a resumed run must know it to continue bit for bit.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        program: Program,
        k: int,
        predictor: WeightPredictor | None,
        progress: UpdateProgress | None = None,
    ) -> None:
        self.params = list(params)
        self.program = program
        self.k = k
        self.predictor = predictor
        self.progress = progress
        self._fusing = predictor if isinstance(predictor, FusingPredictor) else None  # asked once: it takes 0.1 ms
        self.layout = StorageLayout(self.params)
        self.version = 0
        self.restart = 0
        self.synchronous = False
        self.next_is_skipped = False
        self._sets: dict[WeightKey, WeightSet] = {}  # while anybody may ask for the set
        self._pinned: dict[Hashable, WeightSet] = {}  # sets that a source shares between micro-batches
        self._retained: dict[int, WeightSet] = {}  # versions that coming forwards will ask for by number
        self._free: list[BufferSet] = []  # copies that nobody uses; each is among `_copies` as well
        self._copies: list[BufferSet] = []
        self.most_copies = 0
        self._pointers = _pointers_of(self.params)
        self._over_gradients = self._may_predict_over_gradients()

    def _may_predict_over_gradients(self) -> bool:
        return sum(p.numel() for p in self.params) >= LARGE and self.layout.one_storage_each

    def latest(self) -> WeightSet:
        """The latest weights, in place; :meth:`before_update` turns them into a copy if they are still in use then."""
        return self._acquire(WeightKey(self.version))

    def numbered(self, version: int) -> WeightSet:
        """The weights of ``version``, which must have been in use or retained ever since."""
        return self._acquire(WeightKey(version), must_exist=version != self.version)

    def predicted(self, steps: int) -> WeightSet:
        """The weights predicted for ``steps`` updates after the latest; the latest themselves for 0, or while synchronous."""
        if steps and self.next_is_skipped:
            steps -= 1
        if steps == 0 or self.predictor is None or self.synchronous:  # no predictor: a stage without parameters
            return self._acquire(WeightKey(self.version))
        weight_set = self._shared_prediction(steps)
        if weight_set is not None and (not weight_set.early or self._still_holds(steps)):
            # Used from here on: a second forward of this version shares it without another check.
            weight_set.early = False
            weight_set.users += 1
            return weight_set
        if self._over_gradients and self._has_adopted():
            self._over_gradients = False  # several predictions for one version: a buffer that stays serves them better
        self._drop_stale_predictions()  # first, so that the new prediction may overwrite the old one
        # Kept under its key with 0 users as well, until an update or another prediction needs the memory.
        key = WeightKey(self.version, steps, 0 if self.progress is None else self.progress.microbatches_done)
        weight_set = self._sets[key] = WeightSet(key, self._take_copy())
        assert weight_set.copy is not None
        with torch.no_grad():
            self.predictor.predict_into(weight_set.copy.tensors, steps)
            for p, predicted in zip(self.params, weight_set.copy.tensors, strict=True):
                if not p.requires_grad:  # frozen since its last update, whose direction predictors still know
                    predicted.copy_(p)
        weight_set.users += 1
        return weight_set

    def _has_adopted(self) -> bool:
        return any(s.key.version == self.version and s.copy is not None and s.copy.adopted for s in self._sets.values())

    def _shared_prediction(self, steps: int) -> WeightSet | None:
        """The prediction that there is for ``steps`` updates after the latest, unless it is due to be made anew."""
        if self.progress is None:
            return self._sets.get(WeightKey(self.version, steps))
        found = (self._sets.get(WeightKey(self.version, steps, n)) for n in self.progress.shareable)
        return next(filter(None, found), None)

    def pin(self, tag: Hashable, weight_set: WeightSet) -> None:
        """Keep ``weight_set`` under ``tag`` until :meth:`unpin`; takes over the caller's hold on it."""
        self._pinned[tag] = weight_set

    def pinned(self, tag: Hashable) -> WeightSet:
        """What is kept under ``tag``; the caller releases it."""
        weight_set = self._pinned[tag]
        weight_set.users += 1
        return weight_set

    def unpin(self, tag: Hashable) -> None:
        """Release what is kept under ``tag``."""
        self.release(self._pinned.pop(tag))

    def retain(self, oldest: int) -> None:
        """Hold the latest version if it is ``oldest`` or newer, and release older ones."""
        if self.version >= oldest and self.version not in self._retained:
            self._retained[self.version] = self.latest()
        # Listed first: `release` deletes entries.
        for version in [v for v in self._retained if v < oldest]:
            self.release(self._retained.pop(version))

    def release(self, weight_set: WeightSet) -> None:
        """Give back what :meth:`latest`, :meth:`numbered` or :meth:`predicted` returned."""
        weight_set.users -= 1
        if weight_set.users == 0 and weight_set.key.steps == 0:
            # A prediction stays until it is overwritten: micro-batches of one version share it.
            self._forget_set(weight_set)

    def abandon(self) -> None:
        """Release every version but the latest, in use or not: all micro-batches in flight were abandoned."""
        self._sets.clear()
        self._pinned.clear()
        self._retained.clear()
        self._begin_progress()
        # Adopted memory belongs to the gradients of an update that is over; own copies are reused.
        self._copies = [copy for copy in self._copies if not copy.adopted]
        self._free = list(self._copies)

    def follow_memory(self, in_flight: bool) -> None:
        """Look whether parameters were given other memory (``p.data = ...``, as ``vector_to_parameters`` does); before a mini-batch.

        Raises:
            ConfigError: they were, and micro-batches ``in_flight`` still need what they had; or type, shape or device changed.
        """
        pointers = _pointers_of(self.params)
        if pointers == self._pointers:
            return
        p = next(p for p, old, new in zip(self.params, self._pointers, pointers, strict=True) if old != new)
        told = f"a weight of stage {self.k} of shape {tuple(p.shape)} was given other memory (p.data = ..., also in a forward?)"
        if in_flight:
            raise ConfigError(
                f"{told} while micro-batches are in flight; write into the weight in place, with copy_() under no_grad(), or drain() before"
            )
        layout = StorageLayout(self.params)
        if _forms_of(layout) != _forms_of(self.layout):
            raise ConfigError(f"{told} of another type, shape or device; make a new pipeline with a new optimizer")
        # Nothing is in use. Copies have the places of the former memory, and predictions began with its values.
        self.layout, self._pointers = layout, pointers
        self._sets, self._free, self._copies = {}, [], []
        self._over_gradients = self._may_predict_over_gradients()

    @property
    def latest_in_use(self) -> bool:
        """Whether a micro-batch in flight holds the latest weights in place, so that an update has to copy them first."""
        weight_set = self._sets.get(WeightKey(self.version))
        return weight_set is not None and weight_set.copy is None

    def before_update(self) -> None:
        """Copy the latest weights if they are in use; free unused predictions."""
        if self.latest_in_use:  # else the update overwrites in place
            weight_set = self._sets[WeightKey(self.version)]
            weight_set.copy = self._take_copy()
            with torch.no_grad():
                # By storage, not by parameter: what autograd saved may be a view that reaches across parameters.
                for copy, latest in zip(weight_set.copy.bases, self.layout.latest.bases, strict=True):
                    copy.copy_(latest)
        if self.predictor is not None:
            self._drop_stale_predictions(everything=True)

    def update(self, step: Callable[[], object], ahead: int = 0) -> bool:
        """Let ``step`` overwrite the latest weights, and the predictor note what it needs; after :meth:`before_update`.

        With ``ahead``, the number of steps that the coming forwards will ask to be predicted, step and prediction are done in
        one pass over memory in place of ``step``, where the predictor can do that and a copy is free for it. Returns whether they were.
        """
        if self.predictor is None:
            step()
            return False
        if ahead and self._update_and_predict(ahead):
            return True
        if self.predictor.needs_previous:
            self._free.append(self._take_copy())  # stays free: it holds W_{t-1} until the next prediction overwrites it
        self.predictor.before_step(self._free[-1].tensors if self._free else None)
        step()
        return False

    def _update_and_predict(self, ahead: int) -> bool:
        room = len(self._copies) - len(self._free) < self.most_copies  # or it would be one copy more than ever needed
        if not room or self._fusing is None or not self._fusing.fuses:
            return False
        # First choice: it allocates nothing and writes back the cache lines that the step has just read.
        copy = self._predicted_over_gradients(self._fusing, ahead)
        if copy is None:
            copy = self._take_copy()
            if not self._fusing.fused_step(copy.tensors, ahead):  # nothing was done: torch's step has to run
                self._free.append(copy)
                return False
        coming = WeightKey(self.version + 1, ahead)  # `after_update` counts it right after the step
        weight_set = self._sets[coming] = WeightSet(coming, copy)
        weight_set.early = True
        return True

    def _predicted_over_gradients(self, fusing: FusingPredictor, ahead: int) -> BufferSet | None:
        """The prediction in the memory of the gradients, which takes the place of a copy; None where that is impossible."""
        tensors = fusing.fused_step_over_gradients(ahead) if self._over_gradients else None
        if tensors is None:
            return None
        if self._free:  # the gradients' memory replaces a copy, or it would be one more than promised
            self._copies.remove(self._free.pop())
        self._copies.append(self.layout.adopt(tensors))
        return self._copies[-1]

    def _still_holds(self, steps: int) -> bool:
        return self._fusing is not None and self._fusing.still_holds(steps)

    def forget_predictions(self) -> None:
        """Free unused predictions: they were made for other weights, or for another place in the order."""
        self._drop_stale_predictions(everything=True)

    def after_update(self) -> None:
        """Count the update."""
        self.after_skipped_update()
        if self.predictor is not None:
            self.predictor.after_step()

    def after_skipped_update(self) -> None:
        """Count an update that has changed nothing, so that the predictor has nothing to take in."""
        self.version += 1
        self._begin_progress()

    def tensors(self, weight_set: WeightSet) -> list[Tensor] | None:
        """What :func:`~pipeoptim.weights.swap.swapped` puts into the module; None for the latest in place."""
        return None if weight_set.copy is None else weight_set.copy.tensors

    def buffers(self, weight_set: WeightSet) -> BufferSet:
        """The memory of ``weight_set``, for :class:`~pipeoptim.weights.saved.SavedWeights`."""
        return self.layout.latest if weight_set.copy is None else weight_set.copy

    def nbytes_of_copies(self) -> int:
        """Bytes of all copies that there are, in use or free."""
        return sum(copy.nbytes() for copy in self._copies)

    def _begin_progress(self) -> None:
        if self.progress is not None:
            self.progress.begin()

    def _acquire(self, key: WeightKey, must_exist: bool = False) -> WeightSet:
        weight_set = self._sets.get(key)
        if weight_set is None:
            assert not must_exist, f"stage {self.k}: version {key.version} is gone, the latest is {self.version}"
            weight_set = self._sets[key] = WeightSet(key)
        weight_set.users += 1
        return weight_set

    def _take_copy(self) -> BufferSet:
        if not self._free:
            copy = self.layout.copy()
            self._copies.append(copy)
        else:
            copy = self._free.pop()
        # Counted by those in use, not by those allocated: a run that goes back to an earlier checkpoint has copies left over.
        self.most_copies = max(self.most_copies, len(self._copies) - len(self._free))
        return copy

    def _forget_set(self, weight_set: WeightSet) -> None:
        del self._sets[weight_set.key]
        # Not reusable: the next update brings gradients of its own.
        if weight_set.copy is not None and weight_set.copy.adopted:
            self._copies.remove(weight_set.copy)
        elif weight_set.copy is not None:
            self._free.append(weight_set.copy)

    def _drop_stale_predictions(self, everything: bool = False) -> None:
        for weight_set in [s for s in self._sets.values() if s.users == 0]:
            if everything or weight_set.key.steps > 0:
                self._forget_set(weight_set)


def _pointers_of(params: Sequence[Tensor]) -> list[int]:
    """Addresses of the data; a loop in C, 30 ns for each."""
    return list(map(_data_ptr, params))


def _forms_of(layout: StorageLayout) -> list[tuple[Any, ...]]:
    """What copies and the optimizer's state rest on besides the place in memory."""
    return [(t.shape, t.dtype, t.device) for t in layout.latest.tensors]
