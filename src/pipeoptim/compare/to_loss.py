"""How many samples a method needed for a loss, in a comparison that has ended: what a longer way to the same loss costs."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from pipeoptim.compare.api import read
from pipeoptim.compare.folder import ComparisonFolder
from pipeoptim.compare.statistics import steps_to
from pipeoptim.errors import ConfigError, unknown_name


def samples_to_loss(path: Path, model: str, method: str, loss: float) -> tuple[float, float, float]:
    """The least, the median and the most over the seeds, until the validation loss first was ``loss`` or lower.

    Args:
        path: folder of the comparison.
        model: name of the recipe that it must be of.
        method: that must have taken part.

    Raises:
        ConfigError: another model, no such method, or a run that never got there.
    """
    comparison = read(ComparisonFolder(path))
    config = comparison.settings.config
    if config.recipe != model:
        raise ConfigError(
            f"the comparison in {path} is of {config.recipe!r}, the plan of {model!r}; give one of the same model"
        )
    if config.batch_size_schedule:
        raise ConfigError(
            f"the batch size of the comparison in {path} changes ({config.batch_size_schedule}); give --samples instead"
        )
    if method not in comparison.methods:
        raise unknown_name("method", method, comparison.methods, f"; the comparison in {path} has no other")
    outcomes = comparison.of(method)
    steps = [steps_to(outcome.validation, loss) for outcome in outcomes]
    reached = [step * config.batch_size for step in steps if step is not None]
    if len(reached) < len(steps) or not reached:
        lowest = min((min(o.validation.values) for o in outcomes if o.validation.values), default=None)
        best = "no validation" if lowest is None else f"the lowest validation loss is {lowest:.4g}"
        raise ConfigError(
            f"{method} did not reach loss {loss:g} with every seed in {path} ({best}); give a higher one with --to-loss"
        )
    return float(min(reached)), float(median(reached)), float(max(reached))
