"""Losses and metrics as module-level functions: a loss must be picklable to reach another process."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

__all__ = [
    "IGNORE",
    "PADDING",
    "Output",
    "accuracy",
    "auxiliary_cross_entropy",
    "cross_entropy",
    "label_smoothing",
    "token_accuracy",
]

#: The id of padding in every padded input.
PADDING = 0
#: The target of a position that does not count.
IGNORE = -100

#: Logits, or (logits, auxiliary logits, ...) as models with auxiliary heads return in training.
Output = Tensor | tuple[Tensor, ...]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats: logits ``[..., C]`` against class ids ``[...]`` (int64).

    The mean is over the targets that are not IGNORE; it is 0 where there is none.

    >>> import torch
    >>> round(float(cross_entropy(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))), 4)
    1.6094
    """
    return _token_mean(output, target, smoothing=0.0)


def label_smoothing(output: Tensor, target: Tensor, smoothing: float = 0.1) -> Tensor:
    """:func:`cross_entropy` against ``1 - smoothing`` on the target and ``smoothing / C`` on every class.

    Source: Szegedy et al. (2016), section 7. Use ``functools.partial`` for another ``smoothing``.
    """
    return _token_mean(output, target, smoothing)


def _token_mean(output: Tensor, target: Tensor, smoothing: float) -> Tensor:
    logits, targets = output.flatten(0, -2), target.flatten()
    total = functional.cross_entropy(logits, targets, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
    # A micro-batch of padding alone must give 0 with zero gradients; torch's own mean would be 0 / 0.
    return total / (targets != IGNORE).sum().clamp(min=1)


def auxiliary_cross_entropy(output: Output, target: Tensor, weight: float = 0.3) -> Tensor:
    """``cross_entropy(logits) + weight * sum of cross_entropy(auxiliary logits)``.

    Equals :func:`cross_entropy` for a model without auxiliary heads and in evaluation. Source: Szegedy et al.
    (2015), section 5, weight 0.3.
    """
    if isinstance(output, Tensor):
        return cross_entropy(output, target)
    loss = cross_entropy(output[0], target)
    for logits in output[1:]:
        loss = loss + weight * cross_entropy(logits, target)
    return loss


def accuracy(output: Output, target: Tensor) -> dict[str, float]:
    """Share of ``[B]`` targets that are the largest of the ``[B, C]`` logits, 0..1."""
    logits = output if isinstance(output, Tensor) else output[0]
    return {"accuracy": float((logits.argmax(-1) == target).float().mean())}


def token_accuracy(output: Tensor, target: Tensor) -> dict[str, float]:
    """Share of target tokens ``[B, T]`` predicted by logits ``[B, T, V]``; ignored positions do not count.

    ``bits`` is the cross-entropy in bits per token. (Perplexity, ``2**bits``, is no mean: take it of the mean bits.)
    """
    counted = target != IGNORE
    hits = (output.argmax(-1) == target) & counted
    nats = float(cross_entropy(output.detach(), target))
    return {
        "accuracy": float(hits.sum() / counted.sum().clamp(min=1)),
        "bits": nats / math.log(2),
    }
