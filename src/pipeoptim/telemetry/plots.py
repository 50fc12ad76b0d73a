"""The loss curve of a run as a picture: every training loss faintly, their running mean, validation as points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeoptim.telemetry.metrics import Row


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last ``width`` values (fewer at the start).

    >>> running_mean([2.0, 4.0, 6.0], 2)
    [2.0, 3.0, 5.0]
    """
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def loss_curve(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw the losses in ``rows`` (of ``metrics.jsonl``) into the PNG ``path``, 1200 x 750 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no display needed, and the caller's pyplot is left alone
    axes = figure.add_subplot()
    if train:
        steps, losses = [s for s, _ in train], [loss for _, loss in train]
        width = max(1, len(losses) // 30)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        label = f"training (mean of {width} steps)" if width > 1 else "training"
        axes.plot(steps, running_mean(losses, width), color="tab:blue", linewidth=2, label=label)
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", linewidth=2, markersize=5, label="validation")
    axes.set(title=title, xlabel="step (mini-batches)", ylabel="loss")
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    figure.savefig(path)
    return path
