"""Proof that a program can be carried out: every F before its B, transfers that match, no deadlock."""

from __future__ import annotations

from pipeoptim.errors import PipeOptimError
from pipeoptim.schedule.actions import Action, ActionKind
from pipeoptim.schedule.program import Program
from pipeoptim.schedule.timeline import timeline


def with_transfers(actions: list[Action], k: int, depth: int) -> list[Action]:
    """The same actions with the receives before and the sends after each F and B spelled out.

    Example:
        >>> [str(a) for a in with_transfers([Action(ActionKind.F, 0)], k=1, depth=3)]
        ['recv_activation0', 'F0', 'send_activation0']
    """
    out: list[Action] = []
    for action in actions:
        first, last = k == 0, k == depth - 1
        if action.kind is ActionKind.F:
            before, after = (not first, ActionKind.RECV_ACTIVATION), (not last, ActionKind.SEND_ACTIVATION)
        elif action.kind is ActionKind.B:
            before, after = (not last, ActionKind.RECV_GRADIENT), (not first, ActionKind.SEND_GRADIENT)
        else:
            out.append(action)
            continue
        out += [Action(before[1], action.number)] if before[0] else []
        out.append(action)
        out += [Action(after[1], action.number)] if after[0] else []
    return out


def validate(program: Program, minibatches: int) -> None:
    """Check a run of ``minibatches`` of ``program`` on every stage.

    Raises:
        PipeOptimError: an F, B or U is missing, repeated or out of order; sends and receives between two stages differ
            in order (the transfers are first-in first-out); or the stages wait for one another for ever.

    Example:
        >>> validate(Program("async_1f1b", depth=4, microbatches=2), minibatches=5)
    """
    # Per stage, not per process: stages that share a process still exchange messages one to one.
    plans = [program.full(k, minibatches) for k in range(program.depth)]
    for k, actions in enumerate(plans):
        _check_stage(k, actions, program.microbatches, minibatches)
    lists = [with_transfers(actions, k, program.depth) for k, actions in enumerate(plans)]
    for k in range(program.depth - 1):
        _check_channel(lists[k], ActionKind.SEND_ACTIVATION, k, lists[k + 1], ActionKind.RECV_ACTIVATION, k + 1)
        _check_channel(lists[k + 1], ActionKind.SEND_GRADIENT, k + 1, lists[k], ActionKind.RECV_GRADIENT, k)
    timeline(program, minibatches)  # raises where the stages wait for one another


def _check_stage(k: int, actions: list[Action], m: int, minibatches: int) -> None:
    seen: set[Action] = set()
    for action in actions:
        needs = {
            ActionKind.F: [],
            ActionKind.B: [Action(ActionKind.F, action.number)],
            ActionKind.U: [Action(ActionKind.B, i) for i in range(action.number * m, (action.number + 1) * m)],
        }.get(action.kind)
        if needs is None:
            raise PipeOptimError(f"stage {k}: {action} is not an F, B or U")
        missing = [str(a) for a in needs if a not in seen]
        if missing:
            raise PipeOptimError(f"stage {k}: {action} comes before {', '.join(missing)}")
        if action in seen:
            raise PipeOptimError(f"stage {k}: {action} comes twice")
        seen.add(action)
    counts = {ActionKind.F: minibatches * m, ActionKind.B: minibatches * m, ActionKind.U: minibatches}
    for kind, expected in counts.items():
        # `seen` has no duplicates by now.
        found = sum(a.kind is kind for a in seen)
        if found != expected:
            raise PipeOptimError(f"stage {k}: {found} {kind.value} where {expected} are due")


def _check_channel(sender: list[Action], send: ActionKind, k: int, receiver: list[Action], recv: ActionKind, to: int) -> None:
    sent = [a.number for a in sender if a.kind is send]
    received = [a.number for a in receiver if a.kind is recv]
    if sent != received:
        raise PipeOptimError(f"{send.value} of stage {k} {sent} does not match {recv.value} of stage {to} {received}")
