"""State of predictors and loss scales that moves to other stages.

A predictor's lists with one tensor per parameter (gradients, averages, points on the line of the last displacement) are kept by the
names of these parameters. The loss scale in force is that of the last stage, wherever the cuts are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeoptim.rules.displacement import PREVIOUS, extrapolate

_POINTS, _POSITION = "known", "known_at"  # of the displacement memory in a Predictor's state


def split_predictor(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``{"parameters": {name: {entry: tensor}}, "shared": all other entries}``; ``names`` in the order of the optimizer."""
    lists = {key: value for key, value in state.items() if _one_per_parameter(value, len(names))}
    parameters: dict[str, dict[str, Tensor]] = {}
    for key, tensors in lists.items():
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None:
                parameters.setdefault(name, {})[key] = tensor
    return {"parameters": parameters, "shared": {key: value for key, value in state.items() if key not in lists}}


def joined_predictor(
    fresh: Mapping[str, Any],
    names: Sequence[str],
    saved: Mapping[int, Mapping[str, Any]],
    same_cut: bool,
    weights: Sequence[Tensor],
) -> dict[str, Any]:
    """The state of a predictor of the parameters ``names``, as its ``load_state_dict`` takes it.

    What all parameters share is kept for the same cut only: with another one it is the predictor's own, as in ``fresh``.

    Args:
        saved: stage -> what :func:`split_predictor` returned there, of stages that had a predictor.
        weights: the latest, in the order of ``names``.
    """
    found = {name: (stage, own) for stage, state in saved.items() for name, own in state["parameters"].items()}
    entries = {key for name in names if name in found for key in found[name][1]}
    state = dict(fresh)
    if same_cut and saved:
        state |= next(iter(saved.values()))["shared"]
    for key in entries:
        own = fresh.get(key) or [None] * len(names)
        state[key] = [found[name][1].get(key, mine) if name in found else mine for name, mine in zip(names, own, strict=True)]
    # A stage predicts for its own gap, so parameters of several stages come with points at several distances.
    if _POINTS in entries:
        # Stages may have predicted over different distances, so each point comes with its own position.
        positions = [saved[found[name][0]]["shared"][_POSITION] if name in found else None for name in names]
        state[_POSITION], state[_POINTS] = _at_one_position(state[_POINTS], positions, weights)
    return state


def carried_loss_scale(k: int, depth: int, origins: Iterable[int], saved: Mapping[int, Any]) -> dict[str, Any]:
    """The loss scale of stage ``k`` of ``depth``, whose weights come from the stages ``origins``.

    Args:
        saved: stage -> state of its loss scale.
    """
    # The last stage computes the loss and hence decides about its scale.
    last = max(saved)
    own = sorted(set(origins) & set(saved)) or [last]
    # An overflow that one of them found and the last stage has not heard of must still reach it.
    waiting = [saved[stage]["overflowed"] for stage in own if saved[stage]["overflowed"]]
    return {"scaler": saved[last if k == depth - 1 else own[0]]["scaler"], "overflowed": min(waiting, default=0.0)}


def _one_per_parameter(value: Any, count: int) -> bool:
    tensors = isinstance(value, list) and len(value) == count and all(v is None or isinstance(v, Tensor) for v in value)
    return tensors and any(v is not None for v in value)


def _at_one_position(
    points: Sequence[Tensor | None], positions: Sequence[float | None], weights: Sequence[Tensor]
) -> tuple[float, list[Tensor | None]]:
    """Points ``W_t + h d`` with the same h for all parameters; those of stages with another h are moved along their lines."""
    used = {position for point, position in zip(points, positions, strict=True) if point is not None and position is not None}
    if len(used) == 1:
        return used.pop(), list(points)
    moved: list[Tensor | None] = []
    for point, position, weight in zip(points, positions, weights, strict=True):
        if point is None or position is None:
            moved.append(None)
        else:
            moved.append(torch.empty_like(point))
            extrapolate(weight.detach().to(point), point, position, PREVIOUS, moved[-1])  # type: ignore[arg-type]
    return PREVIOUS, moved
