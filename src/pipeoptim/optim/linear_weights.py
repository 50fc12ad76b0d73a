"""Which weights of a module are those of linear layers, as parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeoptim.errors import ConfigError


def linear_weights(module: nn.Module) -> list[dict[str, Any]]:
    """The parameters of ``module`` in two groups: weights of its ``nn.Linear`` layers, and the rest with ``rotate`` off.

    An embedding is a matrix as well, but a gradient reaches only the rows that a batch has used. A weight that an embedding and a
    linear layer share counts as the embedding's.

    Args:
        module: a stage, or a whole model.

    Returns:
        Groups for :class:`RotatedAdam`; empty ones are left out.

    Raises:
        ConfigError: no module.

    Example:
        >>> from torch import nn
        >>> groups = linear_weights(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))
        >>> [(len(group["params"]), group.get("rotate", True)) for group in groups]
        [(1, True), (2, False)]
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"linear_weights() was given {module!r}, must be given a torch.nn.Module, for example a stage")
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} - embedded
    inside = [p for p in module.parameters() if id(p) in linear]
    outside = [p for p in module.parameters() if id(p) not in linear]
    groups: list[dict[str, Any]] = [{"params": inside}, {"params": outside, "rotate": False}]
    return [group for group in groups if group["params"]]
