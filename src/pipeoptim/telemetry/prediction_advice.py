"""What the measured predictions of a stage say about its settings, in a sentence."""

from __future__ import annotations

OVERSHOOTS, FALLS_SHORT = 0.67, 1.5
"""Best factors beyond which predictions are told to be too long or too short."""

USELESS = 0.95
"""Relative error, with the best factor in use, from which on predictions are as good as none."""


def advice(stage: int, error: float | None, scale: float | None, best: float | None) -> str | None:
    """None where there is nothing to say.

    Args:
        error: mean relative error of the predictions.
        scale: the factor that they were made with.
        best: the factor that would have fitted best.

    Example:
        >>> advice(0, 1.2, 1.0, 0.4)
        'stage 0: predictions overshoot, 0.40 times as far would have been best; try --scale auto'
        >>> advice(0, 0.4, 1.0, 0.9) is None
        True
    """
    if error is None or scale is None or best is None:
        return None
    if scale != 1.0 and error > USELESS and OVERSHOOTS < scale / max(best, 1e-9) < FALLS_SHORT:
        # The noise of the gradients decides: docs/theory.md has its share in the error, by beta1 and the gap.
        remedy = "a larger beta1 (momentum) averages more noise, and M >= D shortens the gap to one update"
        return f"stage {stage}: predictions say next to nothing of the updates to come, even with the best factor, {best:.2f}; {remedy}"
    if scale != 1.0 or OVERSHOOTS <= best <= FALLS_SHORT:
        return None
    what = "overshoot" if best < 1 else "fall short"
    return f"stage {stage}: predictions {what}, {best:.2f} times as far would have been best; try --scale auto"
