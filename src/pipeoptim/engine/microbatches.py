"""What a user feeds into a pipeline, split into micro-batches: equal slices, or uneven ones that count by their share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_flatten

from pipeoptim.engine.splitting import Rows, as_fed, split
from pipeoptim.errors import ConfigError
from pipeoptim.options import LossWeight

StageKwargs = Mapping[int, Mapping[str, Any]]


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

    def cut(self, where: str, args: Any, kwargs: dict[int, dict[str, Any]], target: Any, last: bool = True) -> list[MicroBatch]:
        """The micro-batches of a mini-batch; messages end the names of what was given with ``where``.

        ``last``: whether the last stage, which needs the target, is in this process.

        Raises:
            ConfigError: something cannot be split, there are no rows, inputs and target have different numbers of them, or
                there is no target for ``loss_weight``.
        """
        # Only where the last stage lives is there a target that could be missing.
        if last:
            check_weighable(self.loss_weight, target)
        # Nothing to cut or to unwrap, as in most pipelines that never flush: no need to look into the values.
        if self.m == 1 and self.loss_weight is None and not kwargs and _all_plain(args) and _all_plain((target,)):
            _check_rows(where, args)
            return [MicroBatch(args, kwargs, target, NO_ROWS, NO_ROWS, None)]
        _check_rows(where, tree_flatten((args, kwargs.get(0)))[0])
        inputs = {f"input {n}{where}": value for n, value in enumerate(args)}
        for k, own in kwargs.items():
            inputs |= {f"keyword {name!r} of stage {k}": value for name, value in own.items()}
        columns, rows = self._columns(inputs)
        # Before the target is looked at: "no rows" says more than a disagreement of rows.
        if rows and not any(rows):
            raise ConfigError(_no_rows(where))
        # By itself, so that a disagreement with the inputs gets a sentence of its own.
        targets, target_rows = self._columns({f"the target{where}": target})
        _check_alike(rows, target_rows)
        return self._assembled_batches(len(args), kwargs, columns, targets[0], rows, target_rows)

    def _columns(self, named: dict[str, Any]) -> tuple[list[Sequence[Any]], Rows]:
        """For each of the named values what the micro-batches get of it, and how many rows each of them has."""
        if self.m == 1:
            return [[as_fed(name, value)] for name, value in named.items()], ()
        found = {name: split(name, value, self.m) for name, value in named.items()}
        # Reversed, so that of several values with the same rows the first one given names them in messages.
        sizes = {rows: name for name, slices in reversed(found.items()) for rows in reversed(slices.rows)}
        if len(sizes) > 1:
            raise ConfigError(_disagreement(sizes))
        rows, name = next(iter(sizes.items()), ((), ""))
        if len(set(rows)) > 1 and not self.uneven:
            raise ConfigError(
                f"{name} has a batch of {sum(rows)}, which cannot be split into {self.m} equal micro-batches; use a batch size that "
                f"is a multiple of {self.m}, other microbatches, or uneven=True"
            )
        return [slices.values for slices in found.values()], rows

    def _assembled_batches(
        self,
        args: int,
        kwargs: dict[int, dict[str, Any]],
        columns: list[Sequence[Any]],
        targets: Sequence[Any],
        rows: Rows,
        target_rows: Rows,
    ) -> list[MicroBatch]:
        weights = self._loss_shares(targets, target_rows)
        made = []
        for i in range(self.m):
            # In the order in which cut() has named them: inputs first, then the keywords of each stage.
            values = iter([column[i] for column in columns])
            positional = tuple(itertools.islice(values, args))
            # zip asks `own` first, so that at its end no value of the next stage is lost.
            keywords = {k: dict(zip(own, values, strict=False)) for k, own in kwargs.items()}
            own, theirs = (RowShare(found[i], sum(found)) if found else NO_ROWS for found in (rows, target_rows))
            made.append(MicroBatch(positional, keywords, targets[i], own, theirs, weights[i]))
        return made

    def _loss_shares(self, targets: Sequence[Any], rows: Rows) -> Sequence[float | None]:
        if self.loss_weight is None or all(target is None for target in targets):  # no target here: not the last stage
            return [None] * self.m
        # an empty list has no entries to count, and a function of the user's need not expect one
        weights = [weight_of(self.loss_weight, target) if not rows or rows[i] else 0.0 for i, target in enumerate(targets)]
        total = sum(weights)
        if not total > 0:
            raise ConfigError(f"loss_weight returned {weights} for the {self.m} micro-batches; one of them must be above 0")
        return [weight / total for weight in weights]

    def share(self, micro_batch: MicroBatch, row_share: RowShare, of_target: bool) -> float | None:
        """The share of the loss with which ``micro_batch`` counts, ``row_share`` of the inputs of stage 0; None for exactly 1/M.

        ``of_target``: on the last stage, which counts by what the user's function says of the target.

        Raises:
            ConfigError: what was given to this stage has other rows than the inputs, whose number has only now come here.
        """
        # Keywords and target of a later stage meet the number of rows of the input only here.
        own = (("keywords", micro_batch.row_share), ("target", micro_batch.target_share))
        for name, theirs in own if row_share.of else ():
            if theirs != row_share and theirs.of:
                raise ConfigError(_row_mismatch(name, theirs, row_share))
        if of_target and micro_batch.loss_share is not None:
            return micro_batch.loss_share
        # None, not 1/M as a number: equal slices then take the same path, and the same bits, as without uneven=True.
        return None if row_share.of == row_share.rows * self.m else row_share.rows / row_share.of


def weight_of(loss_weight: LossWeight, target: Any) -> float:
    """What ``loss_weight`` returns for ``target``.

    Raises:
        ConfigError: it is no finite number of at least 0.
    """
    found = loss_weight(target)
    try:
        weight = float(found)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"loss_weight returned {_short_description(found)}, must be a number") from None
    if not 0 <= weight < math.inf:
        raise ConfigError(f"loss_weight returned {weight}, must be a finite number of at least 0")
    return weight


def check_weighable(loss_weight: LossWeight | None, target: Any) -> None:
    """Raise ConfigError where ``loss_weight`` is given but no ``target``, on the last stage."""
    if loss_weight is not None and target is None:
        raise ConfigError(
            "loss_weight was given, but no target that it could weigh; give the labels as target=, too, where the model takes them as an "
            "argument, or leave loss_weight out"
        )


def _all_plain(values: Sequence[Any]) -> bool:
    """Whether all are tensors or None, so that none is or holds a mark or an array."""
    return all(value is None or isinstance(value, Tensor) for value in values)


def _check_rows(where: str, inputs: Sequence[Any]) -> None:
    """``inputs``: those of stage 0, without their containers."""
    batches = [leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.dim()]
    if batches and not any(leaf.size(0) for leaf in batches):  # not .shape, which nested tensors do not have
        raise ConfigError(_no_rows(where))


def _no_rows(where: str) -> str:
    return f"the inputs{where} have no rows, so their mean loss would be NaN; leave out such a mini-batch, on all processes"


def _check_alike(rows: Rows, target_rows: Rows) -> None:
    """Of the inputs and of the target, where both are in this process: before anything is computed."""
    for own, theirs in zip(rows, target_rows, strict=False):
        if own != theirs:
            raise ConfigError(_row_mismatch("target", RowShare(theirs, sum(target_rows)), RowShare(own, sum(rows))))


def _row_mismatch(name: str, theirs: RowShare, own: RowShare) -> str:
    return (
        f"a micro-batch has {own.rows} of the {own.of} rows of the input, but {theirs.rows} of {theirs.of} of the {name}; give the {name} "
        "one row for each row of the input (of a list, each entry is a row), and flatten it, if need be, in loss_fn or in the module"
    )


def _disagreement(sizes: dict[Rows, str]) -> str:
    names = list(dict.fromkeys(reversed(sizes.values())))
    counts = [str(sum(rows)) for rows in reversed(sizes)]
    if len(set(counts)) < len(counts):  # equally many, cut at different places
        counts = ["+".join(map(str, rows)) for rows in reversed(sizes)]
    return (
        f"values in {' and '.join(names)} have {' and '.join(counts)} rows, so their slices would not belong together (of a list, each "
        "entry is a row); wrap what all micro-batches shall get in pipeoptim.Whole, what has another batch dimension in "
        "pipeoptim.Along, and give a tuple or a dict where a list only holds several inputs"
    )


def merge_kwargs(depth: int, kwargs: dict[str, Any], k: int, stage_kwargs: StageKwargs | None) -> dict[int, dict[str, Any]]:
    """Keyword arguments per stage: ``kwargs`` are those of stage ``k``.

    Raises:
        ConfigError: no mapping, a stage that does not exist, or a keyword given twice.
    """
    if not kwargs and stage_kwargs is None:
        return {}
    given = {} if stage_kwargs is None else stage_kwargs
    if not isinstance(given, Mapping) or not all(isinstance(own, Mapping) for own in given.values()):
        raise ConfigError(
            f'stage_kwargs is {_short_description(given)}, must map a stage to its keywords, as {{2: {{"mask": mask}}}}'
        )
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


def _short_description(value: Any) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, Mapping) else "a dict with other values than dicts"
