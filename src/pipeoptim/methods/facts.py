"""Facts about a method that follow from its table and its action program, computed instead of written down."""

from __future__ import annotations

from pipeoptim.methods.method import Method
from pipeoptim.schedule import Kind
from pipeoptim.weights import Numbered, Stashed


def gap(method: Method, depth: int, microbatches: int, k: int, microbatch: int = 0) -> int:
    """Version gap of micro-batch ``microbatch`` of every mini-batch on stage ``k``, warm-up over."""
    return method.program(depth, microbatches).steady_gap(k, microbatch)


def copies(method: Method, depth: int, microbatches: int, k: int) -> int:
    """Copies of the weights that stage ``k`` holds at most, the latest included.

    Counted by walking the action program and noting which sets of weights are in use at each action. A set is the latest
    as it was after a number of updates, or a prediction from such a version.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> [copies(get_method("pipedream"), 4, 1, k) for k in range(4)]
        [4, 3, 2, 1]
    """
    program = method.program(depth, microbatches)
    actions = program.full(k, 2 * depth + 2)
    forwards = [a.number for a in actions if a.kind is Kind.F]
    version, most = 0, 0
    in_flight: dict[int, tuple[int, int]] = {}
    for position, (kind, i) in enumerate(actions):
        if kind is Kind.F:
            forward = _key(method.forward, program, k, i, version)
            if isinstance(method.backward, Stashed):
                in_flight[i] = forward
            most = max(most, _extra({*in_flight.values(), forward}, version))
        elif kind is Kind.B:
            backward = in_flight.get(i) or _key(method.backward, program, k, i, version)
            most = max(most, _extra({*in_flight.values(), backward}, version))
            in_flight.pop(i, None)
        else:
            version += 1
            upcoming = [f for f in forwards if f >= _forwards_done(actions[: position + 1])]
            kept = {_key(method.forward, program, k, f, version) for f in upcoming[:1] if isinstance(method.forward, Numbered)}
            most = max(most, _extra({*in_flight.values(), *kept}, version))
    return 1 + most


def _key(source: object, program: object, k: int, i: int, version: int) -> tuple[int, int]:
    if isinstance(source, Numbered):
        return source.number(program, k, i), 0  # type: ignore[arg-type]
    return version, source.steps_ahead(program, k, i)  # type: ignore[attr-defined,no-any-return]


def _forwards_done(actions: list) -> int:  # type: ignore[type-arg]
    return sum(a.kind is Kind.F for a in actions)


def _extra(keys: set[tuple[int, int]], version: int) -> int:
    return len(keys - {(version, 0)})
