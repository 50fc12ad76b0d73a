"""Calling a stage's module, which may change its inputs in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


class ModuleCall:
    """Calls modules of one stage. One that changes its inputs in place, which the first forward shows, gets copies of them.

    A leaf may not be changed in place, and micro-batches are views of one tensor: changing one would invalidate the others.
    """

    def __init__(self) -> None:
        self._copies_inputs: bool | None = None  # None: not known yet

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._copies_inputs is False:
            return module(*args, **kwargs)
        # clone() under autograd, so that gradients still reach the leaves.
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        copies = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [copy._version for copy in copies]
        output = module(*args, **kwargs)
        # Only a training forward decides: in evaluation the module may take another path.
        if self._copies_inputs is None and torch.is_grad_enabled():
            self._copies_inputs = versions != [copy._version for copy in copies]
        return output
