"""What was measured of the cost of staleness, and the figure that is nearest to a situation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

UNKNOWN = "unknown: nothing of this kind was measured; pipeoptim compare measures it on your model"

_ALIKE = {"paper": "refined", "displacement": "refined"}
"""Kinds that predict by the last momentum."""

_SAME_OPTIMIZER = {"adam": "adamw", "momentum": "sgd", "nesterov": "sgd", "muon_adamw": "muon"}

_OTHER_BACKWARD = {"pipeoptim": "pipeoptim_stash", "pipeoptim_stash": "pipeoptim", "naive": "pipedream", "pipedream": "naive"}


@dataclass(frozen=True)
class Evidence:
    """The loss that one method reached, beside that of synchronous training and of none of the remedies.

    Attributes:
        source: where the figure stands.
        depth, microbatches, optimizer, method, prediction: of the runs; prediction is empty where the method has none.
        seeds: how many runs the figures are means of.
        loss, synchronous, without: final validation losses: of the method, of synchronous training, and asynchronous without a remedy.
    """

    source: str
    depth: int
    microbatches: int
    optimizer: str
    method: str
    prediction: str
    seeds: int
    loss: float
    synchronous: float
    without: float

    @property
    def share(self) -> float:
        """Of what staleness costs without a remedy, the share that the method avoids."""
        return (self.without - self.loss) / (self.without - self.synchronous)

    def describe(self) -> str:
        """As a sentence."""
        runs = f"{self.seeds} seeds" if self.seeds > 1 else "one seed"
        figures = f"validation loss {self.loss:.3f}, synchronous {self.synchronous:.3f}, without a remedy {self.without:.3f}"
        share = "" if self.loss == self.without else f"; {self.share:.0%} of the gap closed"
        what = f"{self.method} {self.prediction}".strip()
        return f"{figures}{share} ({what}, D = {self.depth}, M = {self.microbatches}, {self.optimizer}, {runs}; {self.source})"


@lru_cache(maxsize=1)
def evidence() -> tuple[Evidence, ...]:
    """All figures. ``benchmarks/render.py`` writes them from the result files that docs/results.md shows as well."""
    rows = json.loads(files("pipeoptim.advise").joinpath("evidence.json").read_text(encoding="utf-8"))
    return tuple(Evidence(**row) for row in rows)


def nearest(
    depth: int, microbatches: int, optimizer: str, method: str, prediction: str, among: Sequence[Evidence] | None = None
) -> Evidence | None:
    """The figure of the same method, kind of prediction, optimizer and regime (M = 1, between, M >= D) at the nearest depth; None
    for none. Where the method itself was not measured, that of the other backward's weights. Of several the one of most seeds.

    Example:
        >>> nearest(8, 1, "adamw", "pipeoptim", "refined").method
        'pipeoptim'
    """

    def regime(d: int, m: int) -> int:
        return 2 if m >= d else int(m > 1)

    name = optimizer.rsplit(":", 1)[-1].lower()
    wanted = (_SAME_OPTIMIZER.get(name, name), _ALIKE.get(prediction, prediction), regime(depth, microbatches))
    found = [
        row
        for row in (evidence() if among is None else among)
        if (row.optimizer, _ALIKE.get(row.prediction, row.prediction), regime(row.depth, row.microbatches)) == wanted
        and row.method in (method, _OTHER_BACKWARD.get(method))
    ]

    def distance(row: Evidence) -> tuple[object, ...]:
        return (row.method != method, abs(row.depth - depth), abs(row.microbatches - microbatches), -row.seeds)

    return min(found, key=distance, default=None)
