"""How long stages take, as rows of ``metrics.jsonl``, and the stage that has become slow as a sentence.

What is measured is the engine's (:mod:`pipeoptim.engine.stage_times`); here it becomes something to look at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeoptim.engine.stage_times import StageTimes

SLOWER, NO_LONGER_SLOW = 1.2, 1.1
"""From which factor on a stage is called slow, and below which it no longer is."""

TIMED_EVERY = 50
"""Mini-batches between two rows of stage times in the metrics."""


def timing_rows(times: Iterable[StageTimes | None]) -> list[dict[str, Any]]:
    """One plain dictionary per stage, in seconds with four digits; nothing of stages that have no figures yet."""
    return [
        {name: value if isinstance(value, int) else float(f"{value:.4g}") for name, value in one._asdict().items()}
        for one in times
        if one is not None
    ]


def times_of(rows: Sequence[dict[str, Any]]) -> list[StageTimes]:
    """What :func:`timing_rows` wrote, also before links were measured.

    >>> times_of(timing_rows([StageTimes(1, 0.0123456, 0.5, 0.25, 0.0, 1.0, 1.0)]))[0].computing
    0.01235
    """
    return [StageTimes(**{name: row[name] for name in StageTimes._fields if name in row}) for row in rows]


class SlowStages:
    """Says which stages have become slow, and which no more, each once.

    What all stages share is not held against one of them: on a machine that others use as well, all become slow together.
    """

    def __init__(self) -> None:
        self._slow: set[int] = set()
        self._all_slow = False

    def note(self, times: Sequence[StageTimes]) -> list[str]:
        """What changed with these figures, as sentences.

        >>> slow = SlowStages()
        >>> slow.note([StageTimes(2, 0.0131, 0.001, 0.0142, 0.0, 1.31, 1.25)])[0]
        'stage 2 has become slow: a mini-batch takes it 13.1 ms, 1.31 times as long as at first; steps take 1.25 times as long'
        >>> slow.note([StageTimes(2, 0.0131, 0.001, 0.0142, 0.0, 1.31, 1.25)])
        []
        """
        shared = min((one.slowed for one in times), default=1.0) if len(times) > 1 else 1.0
        found = self._note_all(shared)
        for one in times:
            alone = one.slowed / max(1.0, shared)
            if one.stage not in self._slow and alone >= SLOWER:
                self._slow.add(one.stage)
                found.append(
                    f"stage {one.stage} has become slow: a mini-batch takes it {_time(one.computing)}, {one.slowed:.2f} times as "
                    f"long as at first; steps take {one.held_up:.2f} times as long"
                )
            elif one.stage in self._slow and alone < NO_LONGER_SLOW:
                self._slow.discard(one.stage)
                found.append(f"stage {one.stage} is as fast as at first again ({_time(one.computing)} per mini-batch)")
        return found

    def _note_all(self, shared: float) -> list[str]:
        """``shared``: how many times as long as at first even the least slowed stage takes."""
        if not self._all_slow and shared >= SLOWER:
            self._all_slow = True
            return [
                f"all stages have become slow, each takes at least {shared:.2f} times as long as at first: something else may use the "
                "machine"
            ]
        if self._all_slow and shared < NO_LONGER_SLOW:
            self._all_slow = False
            return ["not all stages are slow any more"]
        return []


def _time(seconds: float) -> str:
    """With three digits.

    >>> _time(0.01314), _time(0.9996), _time(12.345), _time(1234.5)
    ('13.1 ms', '1.00 s', '12.3 s', '1234 s')
    """
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.{max(0, 3 - len(str(int(seconds))))}f} s"
