"""How a stage spent its time, and the ideal: the same actions where neither messages nor anything else cost time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipeoptim.schedule import Action, ActionKind, replay
from pipeoptim.schedule import Span as IdealSpan
from pipeoptim.telemetry.trace.read import StageTrace, TraceSpan, flatten

COMPUTE = ("F", "B", "U", "predict", "evaluate")
COMMUNICATION = ("send", "receive")
PACKING = ("pack", "unpack")  # of compressed messages


@dataclass(frozen=True)
class StageShares:
    """Shares of the time between the first and the last thing that stage ``stage`` was seen to do; they sum to 1.

    Attributes:
        compute: F, B, U, prediction and evaluation.
        communication: packing, sending and unpacking messages.
        waiting: for a message, or for what else another stage must tell.
        turns: other stages of the same process computed or communicated; 0 with one stage per process.
        other: the rest: the script's own work, such as loading data.
        ideal_idle: idle share of the stage's device in the ideal schedule.
    """

    stage: int
    compute: float
    communication: float
    waiting: float
    turns: float
    other: float
    ideal_idle: float

    @property
    def idle(self) -> float:
        """What is neither computing nor communicating."""
        return self.waiting + self.other


def shares(stages: Sequence[StageTrace]) -> list[StageShares]:
    """Of every stage; the stages are aligned (see :mod:`.align`)."""
    pieces = [flatten(s.spans) for s in stages]
    idle = _ideal_idle(ideal(stages), [s.device for s in stages])
    found = []
    for k, stage in enumerate(stages):
        own = pieces[k]
        if not own:
            found.append(StageShares(k, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
            continue
        begin, end = own[0].begin, own[-1].end
        total = max(1, end - begin)
        mates = [
            p
            for j, other in enumerate(stages)
            if j != k and (other.clock, other.process) == (stage.clock, stage.process)
            for p in pieces[j]
        ]
        turns = sum(max(0, min(p.end, end) - max(p.begin, begin)) for p in mates if p.what in COMPUTE + COMMUNICATION + PACKING)
        sums: dict[str, int] = defaultdict(int)
        for piece in own:
            sums[_class(piece)] += piece.end - piece.begin
        named = {name: sums[name] / total for name in ("compute", "communication", "waiting")}
        found.append(
            StageShares(
                k, **named, turns=turns / total, other=max(0.0, 1 - sum(named.values()) - turns / total), ideal_idle=idle[k]
            )
        )
    return found


def ideal(stages: Sequence[StageTrace]) -> list[IdealSpan]:
    """The recorded F, B and U, each as early as the order of its device and its neighbours allow, in nanoseconds.

    Every action takes the median of its kind and stage; a forward's prediction counts as part of it.
    """
    recorded: list[tuple[int, int, tuple[int, Action]]] = []
    durations: dict[tuple[int, ActionKind], float] = {}
    for k, stage in enumerate(stages):
        actions = [s for s in stage.spans if s.what in ("F", "B", "U")]
        recorded += [(s.begin, stage.device, (k, Action(ActionKind(s.what), s.number))) for s in actions]
        for kind in (ActionKind.F, ActionKind.B, ActionKind.U):
            durations[k, kind] = median([s.end - s.begin for s in actions if s.what == kind.value] or [0])
        predictions = sum(s.end - s.begin for s in stage.spans if s.what == "predict")
        # Spread over all forwards: one prediction may serve several micro-batches.
        durations[k, ActionKind.F] += predictions / max(1, sum(s.what == "F" for s in actions))
    # In order of begin: the stages of one device then keep the order in which it worked.
    recorded.sort(key=lambda entry: entry[0])
    devices = sorted({device for _, device, _ in recorded})
    plans = [[step for _, own, step in recorded if own == device] for device in devices]
    return replay(plans, len(stages), lambda k, kind: durations[k, kind])


def _ideal_idle(spans: Sequence[IdealSpan], devices: Sequence[int]) -> list[float]:
    """Of the device of each stage."""
    found = []
    for device in devices:
        own = [s for s in spans if devices[s.k] == device]
        busy, end = sum(s.end - s.start for s in own), max((s.end for s in own), default=0.0)
        found.append(1 - busy / end if end else 0.0)
    return found


def _class(span: TraceSpan) -> str:
    if span.what in COMPUTE:
        return "compute"
    if span.what in COMMUNICATION + PACKING:
        return "communication"
    return "waiting" if span.what == "wait" else "other"
