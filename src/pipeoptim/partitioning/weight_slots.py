"""Copies of a model's structure that share its tensors, and the slots of its modules that hold tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.absent_tensor import AbsentTensor


@dataclass
class WeightSlot:
    """One place for a parameter or buffer. Tied weights are one tensor in several slots.

    Attributes:
        module: that holds it.
        attribute: under which name.
        names: in the whole model; several where the module itself is reached by several paths.
        buffer: not a parameter.
    """

    module: nn.Module
    attribute: str
    names: list[str] = field(default_factory=list)
    buffer: bool = False

    @property
    def tensor(self) -> Tensor:
        """The tensor in this slot."""
        held: Tensor = getattr(self.module, self.attribute)
        return held

    @property
    def persistent(self) -> bool:
        """Whether it is in the ``state_dict``."""
        return self.attribute not in self.module._non_persistent_buffers_set

    def put(self, tensor: Tensor) -> None:
        """Another parameter or buffer of the same kind."""
        kind = self.module._buffers if self.buffer else self.module._parameters
        kind[self.attribute] = tensor  # type: ignore[assignment]
        if isinstance(self.module, nn.RNNBase):  # it has a second list of its weights
            setattr(self.module, self.attribute, tensor)

    def clear(self) -> None:
        """Only the form is left, as a plain attribute, which is no parameter and in no ``state_dict``."""
        form = AbsentTensor.like(self.tensor)
        (self.module._buffers if self.buffer else self.module._parameters).pop(self.attribute)
        setattr(self.module, self.attribute, form)


def weight_slots(model: nn.Module) -> list[WeightSlot]:
    """All slots of ``model`` in its own order."""
    found: dict[tuple[int, str], WeightSlot] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, buffer in _held(module):
            slot = found.setdefault((id(module), attribute), WeightSlot(module, attribute, buffer=buffer))
            slot.names.append(f"{path}.{attribute}" if path else attribute)
    return list(found.values())


def shadow_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules of ``model`` that holds the same parameters and buffers, not copies of them.

    Raises:
        ConfigError: the model holds something that cannot be copied.
    """
    tensors = [*model.parameters(), *model.buffers()]
    try:
        # A memo that maps every tensor to itself: deepcopy then copies modules around shared tensors.
        return copy.deepcopy(model, {id(t): t for t in tensors})
    except Exception as error:
        raise ConfigError(
            f"the {type(model).__name__} cannot be copied with copy.deepcopy ({type(error).__name__}: {error}), which its stages "
            "need; remove what it holds beside modules and tensors, or pass the list of its blocks"
        ) from error


def _held(module: nn.Module) -> Iterator[tuple[str, bool]]:
    yield from ((name, False) for name, p in module._parameters.items() if p is not None)
    yield from ((name, True) for name, b in module._buffers.items() if b is not None)


def is_meta(model: nn.Module) -> bool:
    """Whether some weights of ``model`` have no values yet."""
    return any(p.device == torch.device("meta") for p in model.parameters())
