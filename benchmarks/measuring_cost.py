"""What it takes to measure stage times and link delays all the time (`pipe.stage_times`), per mini-batch.

python benchmarks/measuring_cost.py    writes results/measuring_cost.json, which docs/traces.md shows

The looks at clocks of one mini-batch on an inner stage, with what is done with them, as runners and links do it: in a loop, and after other
work has taken all caches, as a stage's own work may. Between whole pipelines with and without, the difference would drown.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.engine.stage_times import StageClock, now
from pipeoptim.engine.transport.link import NEVER, Receiver

RESULT = Path(__file__).parent / "results" / "measuring_cost.json"
REPEATS, TURNS = 9, 300
CACHES = torch.zeros(8 << 20, dtype=torch.float32)  # 32 MiB


class Header:
    """Of a message, as far as its delay is concerned."""

    sent = 0


def measure(clock: StageClock, receiver: Receiver, microbatches: int) -> None:
    """All that measuring is in one mini-batch: of F, B and U, and of the messages that come."""
    header = Header()
    for _ in range(2 * microbatches):  # F and B
        began = now()
        asked = now()
        waited = now() - asked
        receiver.note_late(header)  # type: ignore[arg-type]
        receiver.sequence += 1
        clock.waited += waited
        clock.computed += now() - began - waited
    began = now()
    clock.computed += now() - began
    clock.end_mini_batch(now())


def seconds(microbatches: int, cold: bool) -> float:
    """Per mini-batch, the median."""
    clock, receiver = StageClock(), Receiver.__new__(Receiver)
    receiver.least_late = receiver._late_now = receiver._late_before = NEVER
    receiver.sequence = 0
    samples = []
    for _ in range(TURNS):
        if cold:
            CACHES.add_(1.0)
        began = time.perf_counter()
        measure(clock, receiver, microbatches)
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for microbatches in (1, 8):
        for cold in (False, True):
            name = f"M = {microbatches}, {'caches taken by other work' if cold else 'in a loop'}"
            samples = [round(1e6 * seconds(microbatches, cold), 3) for _ in range(REPEATS)]
            rows.append(ResultRow(name, samples))
            print(f"{rows[-1].median:.2f} us  {name}")
    Record("measuring_cost", "microseconds per mini-batch", {"repeats": REPEATS}, rows).write(RESULT)


if __name__ == "__main__":
    main()
