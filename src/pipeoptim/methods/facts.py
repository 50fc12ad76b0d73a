"""Facts about a method that follow from its table and its action program, computed instead of written down.

They are found by letting the method's own sources work: one stage goes through its program with the real bookkeeping of weights
(:class:`~pipeoptim.weights.StageWeights`), only without any weights in it. So a source of the user's own is counted like ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim.methods.method import Method
from pipeoptim.rules import KINDS
from pipeoptim.schedule import Action, ActionKind, Program
from pipeoptim.weights import StageWeights, UpdateProgress, WeightSet

REFRESH = 1
"""After how many micro-batches predictions from the mini-batch in progress are made anew, by default."""


def gap(method: Method, depth: int, microbatches: int, k: int, microbatch: int = 0, program: Program | None = None) -> int:
    """Updates from the weights that F uses or predicts from to the B of the same micro-batch, on stage ``k``, warm-up over.

    The version gap, counted in the program, for methods that forward on what is there; more for those that ask for an older
    version by its number.

    Args:
        microbatch: its place in the mini-batch, 0 .. M-1.
        program: None for that of the method.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> [[gap(get_method(name), 4, 4, k) for k in range(4)] for name in ("pipedream", "pipedream_2bw")]
        [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    program = program or method.program(depth, microbatches)
    use = weight_use(method, program, k, keep_forward=False, refresh=None)
    return use.gaps[2 * program.warm_up * microbatches + microbatch]


def mean_gap(method: Method, program: Program, k: int) -> float:
    """The version gap of stage ``k``, the mean over the micro-batches of a mini-batch; a whole number where they agree.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> pipedream = get_method("pipedream")
        >>> [mean_gap(pipedream, pipedream.program(4, m), 0) for m in (1, 4)]
        [3, 0.75]
    """
    m = program.microbatches
    total = sum(gap(method, program.depth, m, k, i, program) for i in range(m))
    return total // m if total % m == 0 else total / m


def copies(
    method: Method,
    depth: int,
    microbatches: int,
    k: int,
    keep_forward: bool = False,
    program: Program | None = None,
    refresh: int | None = None,
) -> int:
    """Copies of the weights that stage ``k`` holds at most, the latest included.

    Args:
        method, depth, microbatches, k: which stage of which pipeline.
        keep_forward: the forward's weights are kept until the backward, whatever the method.
        program: None for that of the method.
        refresh: predictions are made from the mini-batch in progress, anew every so many micro-batches; None where they are not.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> [copies(get_method("pipedream"), 4, 1, k) for k in range(4)]
        [4, 3, 2, 1]
        >>> [copies(get_method("pipeoptim_stash"), 4, 4, 0, refresh=r) for r in (1, 2, 4)]
        [4, 4, 3]
    """
    return weight_use(method, program or method.program(depth, microbatches), k, keep_forward, refresh).copies


class WeightPasses(NamedTuple):
    """What a stage does with its weights in a mini-batch of the steady state, beside the optimizer's step.

    Attributes:
        forward, backward: for each of the M micro-batches, whether its F or B makes a prediction.
        copied: whether U copies the weights before it overwrites them.
    """

    forward: tuple[bool, ...]
    backward: tuple[bool, ...]
    copied: bool


def weight_passes(method: Method, program: Program, k: int, refresh: int | None = None) -> WeightPasses:
    """The passes of stage ``k``; where step and prediction are one pass, it counts as that of the next F.

    Args:
        refresh: as for :func:`copies`.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> for name in ("pipeoptim", "pipedream", "gpipe"):
        ...     print(weight_passes(get_method(name), get_method(name).program(4, 2), 0))
        WeightPasses(forward=(True, True), backward=(False, False), copied=False)
        WeightPasses(forward=(False, False), backward=(False, False), copied=True)
        WeightPasses(forward=(False, False), backward=(False, False), copied=False)
    """
    use, m = weight_use(method, program, k, keep_forward=False, refresh=refresh), program.microbatches
    n = program.warm_up + 1  # behind the warm-up, and its B and U before the drain
    predicts = [tuple((kind, i) in use.predictions for i in range(n * m, (n + 1) * m)) for kind in (ActionKind.F, ActionKind.B)]
    return WeightPasses(predicts[0], predicts[1], n in use.copied)


def refresh_every(kind: str, refresh: int | None) -> int | None:
    """After how many micro-batches predictions of ``kind`` are made anew; None where they do not use the mini-batch in progress.

    Args:
        refresh: as the user chose it; None for :data:`REFRESH`.

    Raises:
        ConfigError: it was chosen for a kind that does not.
    """
    if KINDS[kind].in_progress:
        return refresh or REFRESH
    if refresh is not None:
        raise ConfigError(
            f"refresh is {refresh}, but predictions of the kind {kind!r} do not use the mini-batch in progress; leave it out, or use "
            "prediction='in_progress'"
        )
    return None


@dataclass(frozen=True)
class WeightUse:
    """What one stage does with its weights.

    Attributes:
        copies: the most that there are at once, the latest included.
        gaps: of each micro-batch the updates from the weights that its F uses or predicts from to its B.
        predictions: the F and B that make one.
        copied: the U that copy the weights first, by number.
    """

    copies: int
    gaps: dict[int, int]
    predictions: frozenset[Action]
    copied: frozenset[int]


@lru_cache(maxsize=1024)
def weight_use(method: Method, program: Program, k: int, keep_forward: bool = False, refresh: int | None = None) -> WeightUse:
    """What stage ``k`` does with its weights from the start until the steady state has repeated once; arguments as of :func:`copies`."""
    stage = _WeightlessStage(method, program, k, keep_forward, refresh)
    # Long enough for the warm-up and a mini-batch of the steady state, which `gap` reads.
    for action in program.full(k, minibatches=2 * program.warm_up + 2):
        stage.act(action)
    # The latest weights are no copy, but count in what a stage holds.
    return WeightUse(1 + stage.weights.most_copies, stage.gaps, frozenset(stage.predictor.made), frozenset(stage.copied))


class _WeightlessStage:
    """One stage going through its program as :class:`~pipeoptim.engine.stage.worker.StageWorker` does, with no weights to move."""

    def __init__(self, method: Method, program: Program, k: int, keep_forward: bool, refresh: int | None) -> None:
        self.method, self.program = method, program
        self.predictor = _NoPredictions()
        progress = None if refresh is None else UpdateProgress(program.microbatches, refresh)
        self.weights = StageWeights([], program, k, self.predictor if method.predicts_on(program, k) else None, progress)
        self.gaps: dict[int, int] = {}
        self._keeps = keep_forward or method.backward.reuses_forward  # the forward's set until the backward
        self._in_flight: dict[int, tuple[int, WeightSet | None]] = {}  # version that F used, and the set where it is kept
        self._next_forward = 0
        self.copied: list[int] = []

    def act(self, action: Action) -> None:
        self.predictor.action = action
        if action.kind is ActionKind.F:
            self._forward(action.number)
        elif action.kind is ActionKind.B:
            self._backward(action.number)
        else:
            self._update(action.number)

    def _forward(self, i: int) -> None:
        used = self.method.forward.acquire(self.weights, i)
        if not self._keeps:
            self.weights.release(used)
        self._in_flight[i] = used.key.version, used if self._keeps else None
        self._next_forward = i + 1
        self._retain()

    def _backward(self, i: int) -> None:
        version, kept = self._in_flight.pop(i)
        self.gaps[i] = self.weights.version - version
        if not self.method.backward.reuses_forward:
            self.weights.release(self.method.backward.acquire(self.weights, i))
        if kept is not None:
            self.weights.release(kept)
        if self.weights.progress is not None:
            self.weights.progress.note_backward(None)

    def _update(self, n: int) -> None:
        self._retain()  # before the update, which would overwrite a version that is still to be asked for
        if self.weights.latest_in_use:
            self.copied.append(n)
        self.weights.before_update()
        # Without `ahead`: the fused step is an optimization that never needs a copy more.
        self.weights.update(lambda: None)
        self.weights.after_update()

    def _retain(self) -> None:
        oldest = self.method.forward.oldest_needed(self.weights, self._next_forward)
        if oldest is not None:
            self.weights.retain(oldest)


class _NoPredictions:
    """A predictor of no weights, which notes the actions that ask it."""

    needs_previous = False

    def __init__(self) -> None:
        self.action: Action
        self.made: list[Action] = []

    def before_step(self, spare: Sequence[Tensor] | None) -> None: ...

    def after_step(self) -> None: ...

    def predict_into(self, out: Sequence[Tensor], steps: int) -> None:
        self.made.append(self.action)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
