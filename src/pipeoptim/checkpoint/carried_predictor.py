"""State of predictors and loss scales that moves to other stages.

A predictor's lists with one tensor per parameter (gradients, averages, points on the line of the last displacement) are kept by the
names of these parameters. The loss scale in force is that of the last stage, wherever the cuts are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeoptim.rules.displacement import PREVIOUS

_POINTS, _POSITION = "known", "known_at"  # of the displacement memory in a Predictor's state


def split_predictor(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``{"parameters": {name: {entry: tensor}}, "shared": all other entries}``; ``names`` in the order of the optimizer."""
    lists = {key: value for key, value in state.items() if _one_per_parameter(value, len(names))}
    parameters: dict[str, dict[str, Tensor]] = {}
    for key, tensors in lists.items():
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None:
                parameters.setdefault(name, {})[key] = tensor
    shared = {key: value for key, value in state.items() if key not in lists}
    if isinstance(shared.get(_POSITION), list):  # param groups were scaled differently
        shared[_POSITION] = dict(zip(names, shared[_POSITION], strict=True))
    return {"parameters": parameters, "shared": shared}


def joined_predictor(
    fresh: Mapping[str, Any],
    names: Sequence[str],
    saved: Mapping[int, Mapping[str, Any]],
    same_cut: bool,
) -> dict[str, Any]:
    """The state of a predictor of the parameters ``names``, as its ``load_state_dict`` takes it.

    What all parameters share is kept for the same cut only: with another one it is the predictor's own, as in ``fresh``.

    Args:
        saved: stage -> what :func:`split_predictor` returned there, of stages that had a predictor.
    """
    found = {name: (stage, own) for stage, state in saved.items() for name, own in state["parameters"].items()}
    entries = {key for name in names if name in found for key in found[name][1]}
    state = dict(fresh)
    if same_cut and saved:
        state |= next(iter(saved.values()))["shared"]
    for key in entries:
        own = fresh.get(key) or [None] * len(names)
        state[key] = [found[name][1].get(key, mine) if name in found else mine for name, mine in zip(names, own, strict=True)]
    if _POINTS in entries:
        # A stage predicts for its own gap, so parameters of several stages come with points at several distances.
        positions = [
            _position(saved[found[name][0]]["shared"][_POSITION], name) if name in found else PREVIOUS for name in names
        ]
        state[_POSITION] = positions[0] if len(set(positions)) == 1 else positions
    return state


def _position(saved: float | Mapping[str, float], name: str) -> float:
    return saved[name] if isinstance(saved, Mapping) else saved


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
