"""Checks shared by all entry points of this package; each error states value, reason and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.rules.clip_estimate import ClipEstimate
from pipeoptim.rules.move import Group, PartialGradient
from pipeoptim.rules.registry import KINDS, Rule

MOST_STEPS = 10**6


def check_steps(steps: Any) -> None:
    """A version gap is an int, 0 or more."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise ConfigError(f"steps={steps!r} is not an int: a version gap counts updates, pass 0, 1, 2, ...")
    if steps < 0:
        raise ConfigError(f"steps={steps} is negative: only weights of the future are predicted, pass 0 or more")
    if steps > MOST_STEPS:
        raise ConfigError(f"steps={steps} is more than any pipeline has updates in flight: pass at most {MOST_STEPS}")


def check_kind(kind: str, rule: Rule | None, optimizer: Optimizer) -> None:
    """The kind exists, and this optimizer offers it."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is unknown: choose one of {', '.join(KINDS)}")
    name = type(optimizer).__name__
    if rule is None and kind == "decayed":
        raise ConfigError(
            f"kind='decayed' needs a rule, and {name} has none: use 'refined' or 'displacement', or register_rule"
        )
    if rule is not None and kind not in rule.kinds:
        raise ConfigError(f"kind={kind!r} is not offered for {name}: {rule.no_decayed}; choose one of {', '.join(rule.kinds)}")


def check_group(group: Group) -> None:
    """A rule reads values, not graphs."""
    if group.get("differentiable", False):
        raise ConfigError("differentiable=True is not supported: predicted weights carry no graph, set differentiable=False")


def check_dense(weight: Tensor, grad: Tensor | None) -> None:
    """Formulas are elementwise on dense tensors."""
    if weight.layout is not torch.strided:
        raise ConfigError(
            f"a parameter of shape {tuple(weight.shape)} has layout {weight.layout}: only dense parameters can be predicted"
        )
    if grad is not None and grad.layout is not torch.strided:
        raise ConfigError(
            f"the gradient of a parameter of shape {tuple(weight.shape)} has layout {grad.layout}: "
            "only dense gradients can be predicted, set sparse=False in the embedding"
        )


def check_in_progress(
    in_progress: Sequence[PartialGradient | None], clip: Any, weights: Sequence[Tensor], *, used: bool
) -> None:
    """One gradient in progress per parameter, in its shape, where predictions use them."""
    listed = isinstance(in_progress, (list, tuple))
    if not listed or not all(partial is None or isinstance(partial, PartialGradient) for partial in in_progress):
        raise ConfigError(f"in_progress is {in_progress!r}, must be a list with one PartialGradient or None for each parameter")
    if clip is not None and not isinstance(clip, ClipEstimate):
        raise ConfigError(f"clip is {clip!r}, must be a ClipEstimate, for example ClipEstimate(max_norm=1.0), or None")
    if clip is not None and clip.max_norms is not None and len(clip.max_norms) != len(weights):
        raise ConfigError(f"{len(clip.max_norms)} max_norms for {len(weights)} parameters: pass one per parameter")
    if not used and (clip is not None or len(in_progress)):
        raise ConfigError(
            "the gradient of the mini-batch in progress enters only predictions of the kind 'in_progress', which no parameter has: "
            "choose that kind, or pass neither in_progress nor clip"
        )
    if len(in_progress) not in (0, len(weights)):
        raise ConfigError(
            f"{len(in_progress)} gradients in progress for {len(weights)} parameters: pass one per parameter, or none"
        )
    for partial, weight in zip(in_progress, weights, strict=False):
        if partial is None:
            continue
        seen = isinstance(partial.seen, (int, float)) and not isinstance(partial.seen, bool) and 0 <= partial.seen <= 1
        if not seen:
            raise ConfigError(f"seen={partial.seen!r} is no share of a mini-batch: pass a number from 0 to 1")
        if partial.value is not None and not isinstance(partial.value, Tensor):
            raise ConfigError(f"a gradient in progress is a {type(partial.value).__name__}, must be a tensor or None")
        if partial.value is not None and partial.value.shape != weight.shape:
            raise ConfigError(
                f"a gradient in progress of shape {tuple(partial.value.shape)} is not that of a parameter of shape "
                f"{tuple(weight.shape)}: pass them in param_groups order"
            )
