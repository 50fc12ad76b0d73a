"""What a user may wrap an input, a keyword or a target in, to say how it becomes micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeoptim.errors import ConfigError


@dataclass(frozen=True)
class Whole:
    """Marks an input that every micro-batch gets as it is, instead of a slice of it: a table, an attention mask of (T, T).

    Args:
        value: anything; the module sees it without the mark.

    Example:
        >>> import torch, pipeoptim as po
        >>> mask = torch.ones(6, 6).tril()
        >>> stage_kwargs = {1: {"mask": po.Whole(mask)}}  # pipe.step(x, target=y, stage_kwargs=stage_kwargs)
    """

    value: Any


@dataclass(frozen=True)
class Along:
    """Marks an input whose rows do not lie along dimension 0: time-major sequences of shape (T, batch, features).

    Args:
        value: a tensor, or a structure of tensors that are all cut along ``dim``, such as the (h, c) of an LSTM.
        dim: the batch dimension; negative values count from the last.

    Raises:
        ConfigError: ``dim`` is not an integer.

    Example:
        >>> import torch, pipeoptim as po
        >>> recurrent, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
        >>> pipe = po.Emulator([recurrent, head], lambda p: torch.optim.SGD(p, lr=0.1),
        ...                    torch.nn.functional.mse_loss, "1f1b", microbatches=2)
        >>> x, y = torch.ones(7, 4, 3), torch.ones(7, 4, 2)  # 7 time steps of 4 sequences
        >>> loss = pipe.step(po.Along(x, dim=1), target=po.Along(y, dim=1))
    """

    value: Any
    dim: int

    def __post_init__(self) -> None:
        # Not isinstance(): True would be dimension 1.
        if type(self.dim) is not int:
            raise ConfigError(f"dim of pipeoptim.Along is {self.dim!r}, must be an integer, the batch dimension")


@dataclass(frozen=True)
class MicroBatches:
    """Marks an input that is cut already: one entry per micro-batch, in order.

    Args:
        value: a list of M values; micro-batch i gets the i-th as it is. Where the rows of all can be counted, they count as those of a
            batch that the pipeline cuts itself: equally many in each, or ``uneven=True``.

    Raises:
        ConfigError: ``value`` is not a list or tuple, or has no entry.

    Example:
        >>> import torch, pipeoptim as po
        >>> pipe = po.Emulator([torch.nn.Linear(3, 3)], lambda p: torch.optim.SGD(p, lr=0.1),
        ...                    lambda output, target: output.square().mean(), "1f1b", microbatches=2)
        >>> loss = pipe.step(po.MicroBatches([torch.ones(4, 3), torch.zeros(4, 3)]))
    """

    value: Sequence[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.value, (list, tuple)) or not self.value:
            raise ConfigError(
                f"pipeoptim.MicroBatches was given {_named(self.value)}, must be given a list with one entry per micro-batch"
            )


MARKS = (Whole, Along, MicroBatches)


def _named(value: Any) -> str:
    return "no entry" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
