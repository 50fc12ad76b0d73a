"""Facts about a method that follow from its table and its action program, computed instead of written down."""

from __future__ import annotations

from functools import lru_cache

from pipeoptim.methods.method import Method
from pipeoptim.schedule import Action, ActionKind, Program
from pipeoptim.weights import Numbered, Source, Stashed

Key = tuple[int, int]
"""One set of weights: updates applied, and updates predicted ahead."""


def gap(method: Method, depth: int, microbatches: int, k: int, microbatch: int = 0) -> int:
    """Updates from the weights that F uses or predicts from to the B of the same micro-batch, on stage ``k``, warm-up over.

    The version gap, counted in the program, for methods that forward on what is there; more for those that ask for an older
    version by its number.

    Args:
        microbatch: its place in the mini-batch, 0 .. M-1.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> [[gap(get_method(name), 4, 4, k) for k in range(4)] for name in ("pipedream", "pipedream_2bw")]
        [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    program = method.program(depth, microbatches)
    if isinstance(method.forward, Numbered):
        i = 2 * depth * microbatches + microbatch  # its B comes after the updates of all mini-batches before its own
        return i // microbatches - method.forward.number(program, k, i)
    return program.steady_gap(k, 0 if method.forward.once else microbatch)


@lru_cache(maxsize=1024)
def copies(
    method: Method, depth: int, microbatches: int, k: int, keep_forward: bool = False, program: Program | None = None
) -> int:
    """Copies of the weights that stage ``k`` holds at most, the latest included.

    Counted by walking the action program and noting which sets of weights are in use at each action.

    Args:
        method, depth, microbatches, k: which stage of which pipeline.
        keep_forward: the forward's weights are kept until the backward, whatever the method.
        program: None for that of the method.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> [copies(get_method("pipedream"), 4, 1, k) for k in range(4)]
        [4, 3, 2, 1]
    """
    walk = _Walk(method, program or method.program(depth, microbatches), k, keep_forward)
    for action in walk.program.full(k, minibatches=2 * depth + 2):
        walk.act(action)
    return walk.most


class _Walk:
    """Which sets of weights one stage uses as it goes through its program."""

    def __init__(self, method: Method, program: Program, k: int, keep_forward: bool) -> None:
        self.method, self.program, self.k, self.keep_forward = method, program, k, keep_forward
        self.version, self.next_forward, self.most = 0, 0, 1
        self.stash: dict[int, Key] = {}  # of micro-batches in flight
        self.shared: dict[Source, Key] = {}  # of mini-batches whose first micro-batch chose for all
        self.kept: set[Key] = set()  # versions that coming forwards ask for by number

    def act(self, action: Action) -> None:
        i = action.number
        if action.kind is ActionKind.F:
            key = self._use(self.method.forward, i)
            if self.keep_forward or isinstance(self.method.backward, Stashed):
                self.stash[i] = key
            self.next_forward = i + 1
            self._retain()
        elif action.kind is ActionKind.B:
            if not isinstance(self.method.backward, Stashed):
                self._use(self.method.backward, i)
            self.stash.pop(i, None)
        else:
            self._retain()
            self.version += 1
            self._count()

    def _retain(self) -> None:
        if isinstance(self.method.forward, Numbered):
            oldest = self._key(self.method.forward, self.next_forward)[0]
            self.kept = {key for key in self.kept | {(self.version, 0)} if key[0] >= oldest}

    def _use(self, source: Source, i: int) -> Key:
        key = self.shared.get(source) or self._key(source, i)
        if source.once:
            self.shared[source] = key
        self._count(key)
        if source.once and (i + 1) % self.program.microbatches == 0:
            del self.shared[source]
        return key

    def _key(self, source: Source, i: int) -> Key:
        if isinstance(source, Numbered):
            return source.number(self.program, self.k, i), 0
        return self.version, source.steps_ahead(self.program, self.k, i)

    def _count(self, *using: Key) -> None:
        sets = {*self.stash.values(), *self.shared.values(), *self.kept, *using} - {(self.version, 0)}
        self.most = max(self.most, 1 + len(sets))
