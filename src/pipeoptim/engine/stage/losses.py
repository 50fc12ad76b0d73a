"""Several losses: named parts of the loss function's result, and losses that a stage in the middle raises by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError

Losses = dict[str, Tensor]

# Per context, not global: pipelines in threads of their own do not collect each other's losses.
_open_collector: ContextVar[tuple[Losses, bool] | None] = ContextVar("pipeoptim_losses", default=None)


def add_loss(name: str, value: Tensor) -> None:
    """Called in a module's forward: ``value`` is added to what is minimised, wherever in the pipeline the module is.

    The total is ``loss_fn(output, target) + sum of these``, each a mean over its micro-batch; weight it before. Nothing travels
    between stages: the stage's own backward starts from its losses and from the gradients that it receives. Values are
    reported by :attr:`Emulator.loss_parts` under their name, on their own stage. Outside a pipeline, in evaluation and in
    recomputation nothing happens, unless :func:`collect_losses` is around.

    Raises:
        ConfigError: not a scalar tensor, or inside ``checkpoint(..., use_reentrant=True)``, where its graph is thrown away.

    Example:
        >>> import torch, pipeoptim as po
        >>> class Sparse(torch.nn.Linear):
        ...     def forward(self, x):
        ...         y = super().forward(x)
        ...         po.add_loss("sparsity", 0.01 * y.abs().mean())
        ...         return y
        >>> stages = [Sparse(2, 2), torch.nn.Linear(2, 1)]
        >>> pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss)
        >>> _ = pipe.step(torch.ones(4, 2), target=torch.ones(4, 1))
        >>> sorted(pipe.loss_parts)
        ['sparsity']
    """
    collector = _open_collector.get()
    if collector is None:
        return
    found, strict = collector
    if not isinstance(value, Tensor) or value.dim() or value.is_complex():
        raise ConfigError(
            f"add_loss({name!r}) was given {_describe_value(value)}, must be a scalar tensor of real numbers; reduce it, "
            "for instance with .mean()"
        )
    if strict and not torch.is_grad_enabled():
        raise ConfigError(
            f"add_loss({name!r}) was called without gradients, so it would be lost; with activation checkpointing use "
            "use_reentrant=False"
        )
    # The same name in several layers adds up, as the losses themselves do.
    found[name] = found[name] + value if name in found else value


class collect_losses:  # noqa: N801  # used like a function; as a generator it took three times as long
    """What :func:`add_loss` is given inside the block, by name: to train the same model without a pipeline.

    ``strict``: refuse losses that have no graph.

    Example:
        >>> import torch, pipeoptim as po
        >>> with po.collect_losses() as found:
        ...     po.add_loss("balance", torch.tensor(2.0))
        >>> sum(found.values())
        tensor(2.)
    """

    __slots__ = ("_strict", "_token")

    _token: Token[tuple[Losses, bool] | None]

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict

    def __enter__(self) -> Losses:
        found: Losses = {}
        self._token = _open_collector.set((found, self._strict))
        return found

    def __exit__(self, *_: object) -> None:
        _open_collector.reset(self._token)


def call_loss(loss_fn: Callable[..., Any], output: Any, target: Any) -> Any:
    """What ``loss_fn`` returns.

    Raises:
        ConfigError: it fails, and nobody gave a target.
    """
    try:
        return loss_fn(output, target)
    # What None as a target raises in the loss functions of torch.
    except (TypeError, AttributeError) as error:
        if target is not None:
            raise
        raise ConfigError(
            f"loss_fn failed without a target ({error}); give the one of this mini-batch where the last stage lives, step(..., target=y)"
        ) from error


def read_loss(result: Any) -> tuple[Tensor, Losses]:
    """The loss to minimise and the parts to report, from what ``loss_fn`` returned.

    A scalar tensor; or a mapping with the entry ``"loss"``; or a pair of the loss and a mapping. Entries besides ``"loss"`` are
    reported and nothing else.

    Raises:
        ConfigError: it is something else.

    Example:
        >>> total, parts = read_loss({"loss": torch.tensor(3.0), "nll": torch.tensor(2.5)})
        >>> total.item(), parts["nll"].item()
        (3.0, 2.5)
    """
    parts: Mapping[str, Any] = {}
    loss = result
    if isinstance(result, Mapping):
        if "loss" not in result:
            raise ConfigError(f"loss_fn returned {sorted(result)} without 'loss'; add the scalar to minimise under that name")
        loss, parts = result["loss"], {name: value for name, value in result.items() if name != "loss"}
    elif isinstance(result, (tuple, list)):
        if len(result) != 2 or not isinstance(result[1], Mapping):
            raise ConfigError(
                f"loss_fn returned a {type(result).__name__} of {len(result)}; return the loss, or (loss, {{name: part}})"
            )
        loss, parts = result
    return check_loss(loss), {name: _reported_part(name, value) for name, value in parts.items()}


def check_loss(loss: Any) -> Tensor:
    """``loss``, if it is a scalar tensor.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dim() > 0:
        raise ConfigError(
            f"loss_fn returned {_describe_value(loss)}, must be a scalar tensor; reduce it, for instance with .mean()"
        )
    if loss.is_complex():
        raise ConfigError("loss_fn returned a complex number, which cannot be minimised; take its .abs() or .real")
    return loss


def own_number(loss: Tensor) -> Tensor:
    """``loss`` without its graph, and in memory of its own: the result of torch's ``mse_loss`` keeps that of all the squares."""
    loss = loss.detach()
    return loss if loss.untyped_storage().nbytes() == loss.itemsize else loss.clone()


def check_graph(k: int, share: float | None, trained: Iterable[Tensor], added: Iterable[Tensor]) -> None:
    """For a loss on the last stage, ``k``, that has no graph.

    Raises:
        ConfigError: it ought to have one, as something is ``trained`` and nothing else was ``added``.
    """
    # A micro-batch that counts 0 may well have no graph.
    if share != 0 and any(t.requires_grad for t in trained) and not any(loss.requires_grad for loss in added):
        raise ConfigError(
            f"the loss on stage {k} does not depend on any weight, so nothing would be learnt; leave out detach(), item(), no_grad() and "
            "argmax in loss_fn and in the last stage"
        )


class CutOffCheck:
    """Warns after the first mini-batch if no gradient came to stage ``k`` that its ``parameters`` could learn from."""

    def __init__(self, k: int, microbatches: int, parameters: Sequence[Tensor]) -> None:
        self.k, self.microbatches, self.parameters = k, microbatches, parameters
        self._reached = False

    def note(self, i: int, found: bool, sent: bool) -> bool:
        """Whether a gradient was ``found`` in B of micro-batch ``i``, whose output could be ``sent`` one. Returns whether it is done."""
        # Over the whole mini-batch: one micro-batch may have nothing to learn from, for instance none of the rows that count.
        self._reached = self._reached or found
        done = (i + 1) % self.microbatches == 0
        if done and not self._reached and any(p.requires_grad for p in self.parameters):
            warn_cut_off(self.k, sent)
        return done


def warn_cut_off(k: int, sent: bool) -> None:
    """Say that the weights of stage ``k`` get no gradient; ``sent``: although its output could take one."""
    if sent:
        why = f"stage {k + 1} sends none back; leave out detach(), no_grad() and argmax in stage {k + 1}, or in one after it"
    else:
        why = f"its output has no graph; leave out detach(), no_grad() and argmax in stage {k}"
    warnings.warn(f"stage {k} learns nothing, for no gradient comes to it: {why}", stacklevel=2)


def _reported_part(name: str, value: Any) -> Tensor:
    if isinstance(value, Real):  # NumPy's numbers, too
        return torch.tensor(float(value))
    if not isinstance(value, Tensor) or value.dim():
        raise ConfigError(
            f"loss_fn returned {_describe_value(value)} as the part {name!r}, must be a number; return only what is to be reported"
        )
    # Parts are reported only: with their graph they would keep the stage's activations alive.
    return value.detach()


def _describe_value(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class LossLog:
    """The parts that one stage has seen of the mini-batch that was fed last."""

    def __init__(self, microbatches: int) -> None:
        self.microbatches = microbatches
        self._part_sums: Losses = {}

    def begin(self) -> None:
        """A new mini-batch."""
        self._part_sums = {}

    def add(self, parts: Losses, share: float | None) -> None:
        """Those of a micro-batch that is ``share`` of the mini-batch; None for 1/M."""
        for name, value in parts.items():
            # Detached and not read: item() would wait for the device in every forward.
            part = value.detach() * (1 / self.microbatches if share is None else share)
            self._part_sums[name] = self._part_sums[name] + part if name in self._part_sums else part

    def means(self) -> Losses:
        """Over the mini-batch."""
        return dict(self._part_sums)
