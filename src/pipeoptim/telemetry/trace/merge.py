"""From the stages' files to one trace to open, one picture, and shares of time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pipeoptim.errors import ConfigError
from pipeoptim.files import as_path, reading
from pipeoptim.telemetry.trace.align import align
from pipeoptim.telemetry.trace.chrome import to_chrome
from pipeoptim.telemetry.trace.picture import picture
from pipeoptim.telemetry.trace.read import read
from pipeoptim.telemetry.trace.shares import StageShares, ideal, shares


@dataclass(frozen=True)
class MergedTrace:
    """What :func:`merge_trace` wrote.

    Attributes:
        path: the trace of all stages, for https://ui.perfetto.dev or chrome://tracing.
        picture: an SVG of some mini-batches beside the ideal schedule.
        shares: what each stage's time went to.
        emulated: all stages were in one process, and took turns.
    """

    path: Path
    picture: Path
    shares: tuple[StageShares, ...]
    emulated: bool

    def to_text(self) -> str:
        """The shares as a table for the terminal, and where the files are."""
        names = ("compute", "communication", "waiting", "turns", "other", "idle", "ideal_idle")
        lines = ["stage  " + "  ".join(f"{name.replace('_', ' '):>13}" for name in names)]
        for one in self.shares:
            lines.append(f"{one.stage:5d}  " + "  ".join(f"{getattr(one, name):13.1%}" for name in names))
        return "\n".join([*lines, f"trace: {self.path}  (open it with https://ui.perfetto.dev)", f"picture: {self.picture}"])


def merge_trace(folder: Path | str) -> MergedTrace:
    """Merge what :meth:`pipeoptim.Trace.save` wrote in ``folder``, with aligned clocks.

    Writes ``folder/trace.json`` (Chrome's trace-event format: the run, and below it the ideal schedule of the same actions)
    and ``folder/trace.svg``. Call it in one process, when all have saved.

    Raises:
        ConfigError: no trace there, stages missing, or the files cannot be written.

    Example:
        >>> import tempfile, torch, pipeoptim as po
        >>> trace = po.Trace()
        >>> stages = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
        >>> pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, trace=trace)
        >>> losses = [pipe.step(torch.ones(2, 4), target=torch.ones(2, 1)) for _ in range(3)]
        >>> pipe.drain()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = trace.save(folder)
        ...     merged = merge_trace(folder)
        >>> merged.path.name, merged.emulated, [one.stage for one in merged.shares]
        ('trace.json', True, [0, 1])
    """
    folder = as_path("folder", folder)
    with reading(folder):
        stages = align(read(folder))
        best, found = ideal(stages), shares(stages)
        chrome, drawn = to_chrome(stages, best, found), picture(stages, best)
    path, drawing = folder / "trace.json", folder / "trace.svg"
    try:
        path.write_text(json.dumps(chrome, separators=(",", ":")), encoding="utf-8")
        drawing.write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the trace cannot be written to {folder} ({error.strerror}); make the folder writable") from error
    emulated = len(stages) > 1 and len({(s.clock, s.process) for s in stages}) == 1
    return MergedTrace(path, drawing, tuple(found), emulated)
