"""A figure that is known to lie between two others, with one that is typical."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Triangular:
    """A triangular distribution from ``low`` to ``high`` with its peak at ``typical``; one value where they are the same."""

    low: float
    typical: float
    high: float

    def quantile(self, share: Any) -> Values:
        """Below which ``share`` of the draws lie.

        Example:
            >>> [float(Triangular(0.0, 1.0, 2.0).quantile(share)) for share in (0.0, 0.125, 0.5, 1.0)]
            [0.0, 0.5, 1.0, 2.0]
        """
        share = np.asarray(share, dtype=np.float64)
        width, left = self.high - self.low, self.typical - self.low
        below = self.low + np.sqrt(share * width * left)
        above = self.high - np.sqrt((1 - share) * width * (width - left))
        found: Values = np.where(share * width < left, below, above)
        return found
