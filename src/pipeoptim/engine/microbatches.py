"""What a user feeds into a pipeline, split into micro-batches: equal slices, or uneven ones that count by their share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pipeoptim.errors import ConfigError
from pipeoptim.options import LossWeight

StageKwargs = Mapping[int, Mapping[str, Any]]


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


class RowShare(NamedTuple):
    """How much of its mini-batch a micro-batch is: ``rows`` of ``of`` rows; (0, 0) where nothing says so."""

    rows: int
    of: int

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: more micro-batches than rows."""
        return self.rows == 0 and self.of > 0


NO_ROWS = RowShare(0, 0)


class MicroBatch(NamedTuple):
    """One micro-batch as the user gave it.

    Attributes:
        args: of stage 0.
        kwargs: of every stage that is given some.
        target: of the loss.
        row_share: its rows of those of the inputs.
        target_share: its rows of those of the target, (0, 0) where nobody asks.
        loss_share: its share of the loss, where the user's function gave one.
    """

    args: tuple[Any, ...]
    kwargs: dict[int, dict[str, Any]]
    target: Any
    row_share: RowShare
    target_share: RowShare
    loss_share: float | None


@dataclass(frozen=True)
class BatchSplitter:
    """Splits mini-batches into M micro-batches.

    Args:
        m: how many.
        uneven: sizes may differ by one row, as ``torch.tensor_split`` does, and each counts by its share of the rows. Without
            it, a batch that ``m`` does not divide is an error.
        loss_weight: ``loss_weight(target) -> number``: a micro-batch counts by its share of these, instead of by rows. For losses that
            are a mean over something else, such as the tokens that are not padding.
    """

    m: int
    uneven: bool = False
    loss_weight: LossWeight | None = None

    def cut(self, what: str, args: Any, kwargs: dict[int, dict[str, Any]], target: Any) -> list[MicroBatch]:
        """The micro-batches of a mini-batch.

        Raises:
            ConfigError: a tensor has no dimension 0, all have no rows, or they cannot be cut alike.
        """
        _check_rows(what, (args, kwargs.get(0)))
        if self.m == 1 and self.loss_weight is None and not kwargs and _plain(args) and _plain((target,)):  # nothing to cut
            return [MicroBatch(args, kwargs, target, NO_ROWS, NO_ROWS, None)]
        inputs = split((args, kwargs), self.m, what, self.uneven)
        targets = split(target, self.m, f"target of {what}", self.uneven)
        parts = _row_shares((args, kwargs), self.m, what)
        wanted = _row_shares(target, self.m, f"target of {what}") if self.uneven else [NO_ROWS] * self.m
        weights = self._weights(targets)
        return [MicroBatch(*i, *rest) for i, *rest in zip(inputs, targets, parts, wanted, weights, strict=True)]

    def _weights(self, targets: list[Any]) -> Sequence[float | None]:
        if self.loss_weight is None or all(target is None for target in targets):  # no target here: not the last stage
            return [None] * self.m
        weights = [float(self.loss_weight(target)) for target in targets]
        total = sum(weights)
        if not total > 0 or min(weights) < 0:
            raise ConfigError(
                f"loss_weight returned {weights} for the {self.m} micro-batches; they must be at least 0, and one above"
            )
        return [weight / total for weight in weights]

    def share(self, micro_batch: MicroBatch, row_share: RowShare) -> float | None:
        """The share of the loss with which ``micro_batch`` counts, ``row_share`` of the inputs of stage 0; None for exactly 1/M.

        Raises:
            ConfigError: the target was split in other shares than the inputs.
        """
        if micro_batch.loss_share is not None:
            return micro_batch.loss_share
        theirs = micro_batch.target_share
        if theirs.of and theirs.rows * row_share.of != row_share.rows * theirs.of:
            raise ConfigError(
                f"a micro-batch has {row_share.rows} of the {row_share.of} rows of the input, but {theirs.rows} of "
                f"{theirs.of} of the target; give a target with one row for each row of the input"
            )
        return self.rows_share(row_share)

    def rows_share(self, row_share: RowShare) -> float | None:
        """The share of the rows; None for exactly 1/M."""
        return None if row_share.of == row_share.rows * self.m else row_share.rows / row_share.of


def _plain(values: Sequence[Any]) -> bool:
    """Whether all are tensors or None, so that none is or holds a :class:`Whole`."""
    return all(value is None or isinstance(value, Tensor) for value in values)


def _check_rows(what: str, inputs: Any) -> None:
    """``inputs``: those of stage 0."""
    batches = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.dim()]
    if batches and not any(leaf.shape[0] for leaf in batches):
        raise ConfigError(
            f"{what} have no rows, so their mean loss would be NaN; leave out such a mini-batch, on all processes"
        )


def merge_kwargs(depth: int, kwargs: dict[str, Any], k: int, stage_kwargs: StageKwargs | None) -> dict[int, dict[str, Any]]:
    """Keyword arguments per stage: ``kwargs`` are those of stage ``k``.

    Raises:
        ConfigError: no mapping, a stage that does not exist, or a keyword given twice.
    """
    given = {} if stage_kwargs is None else stage_kwargs
    if not isinstance(given, Mapping) or not all(isinstance(own, Mapping) for own in given.values()):
        raise ConfigError(f'stage_kwargs is {_short(given)}, must map a stage to its keywords, as {{2: {{"mask": mask}}}}')
    every = {stage: dict(own) for stage, own in given.items()}
    unknown = [stage for stage in every if not (isinstance(stage, int) and 0 <= stage < depth)]
    if unknown:
        raise ConfigError(f"stage_kwargs names stage {unknown[0]!r}; stages 0 .. {depth - 1} exist")
    twice = sorted(set(kwargs) & set(every.get(k, ())))
    if twice:
        raise ConfigError(f"the keyword {twice[0]!r} of stage {k} is given twice, directly and in stage_kwargs; give it once")
    if kwargs:
        every[k] = {**every.get(k, {}), **kwargs}
    return every


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, Mapping) else "a dict with other values than dicts"


def split(tree: Any, m: int, what: str, uneven: bool = False) -> list[Any]:
    """``m`` slices of every tensor in ``tree`` along dimension 0; other values, and what is marked as whole, are repeated.

    Raises:
        ConfigError: a tensor has no dimension 0, or its length is not a multiple of ``m`` and they may not be uneven.
    """
    leaves, spec = tree_flatten(tree)
    if m == 1 and not any(type(leaf) is Whole for leaf in leaves):
        return [tree]
    columns = [_slices(leaf, m, what, uneven) for leaf in leaves]
    return [tree_unflatten([column[i] for column in columns], spec) for i in range(m)]


def _slices(leaf: Any, m: int, what: str, uneven: bool) -> Sequence[Any]:
    if isinstance(leaf, Whole):
        return [leaf.value] * m
    if m == 1 or not isinstance(leaf, Tensor):
        return [leaf] * m
    if leaf.dim() == 0:
        raise ConfigError(
            f"a tensor in {what} has no batch dimension; it cannot be split into {m} micro-batches. "
            "Wrap it in pipeoptim.Whole if all of them shall get it"
        )
    rows = leaf.shape[0]
    if rows % m and not uneven:
        raise ConfigError(
            f"the batch of {rows} in {what} cannot be split into {m} equal micro-batches; use a batch size that is a multiple "
            f"of {m}, other microbatches, or uneven=True"
        )
    return leaf.tensor_split(m) if rows else [leaf] * m


def _row_shares(tree: Any, m: int, what: str) -> list[RowShare]:
    """The part that each micro-batch is, from the tensors' common number of rows."""
    sizes = {leaf.shape[0] for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.dim()} if m > 1 else set()
    if len(sizes) > 1:
        raise ConfigError(
            f"tensors in {what} have {' and '.join(map(str, sorted(sizes)))} rows, so their slices would not belong together; "
            "wrap what all micro-batches shall get whole in pipeoptim.Whole"
        )
    rows = sizes.pop() if sizes else 0
    return [RowShare((rows + m - 1 - i) // m, rows) for i in range(m)]
