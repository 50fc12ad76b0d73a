"""An update that is done again and compared bit by bit: processors and memory that compute wrongly now and then say nothing of it.

::

    weights, gradients, optimizer state  --copied-->  the same
                 | step                                   | step, in other memory
                 v                                        v
         weights, state            ==, bit for bit    weights, state

The second step is that of the optimizer's class, or the kernel's where the first was: these two round differently. What was wrong before
the copy, such as a gradient, is wrong in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from pipeoptim.errors import ConfigError, CorruptionError, counted
from pipeoptim.rules import Predictor
from pipeoptim.rules.combined import members
from pipeoptim.rules.entries import optimizer_parameters
from pipeoptim.rules.fallback import copy_optimizer
from pipeoptim.rules.fused.step import unpatched
from pipeoptim.rules.scratch import unhooked_step


class UpdateAudit:
    """Does every n-th update of stage ``k`` again.

    Args:
        every: n.
        optimizer: steps the stage.
        names: of what it moves, in its order.
        kernel_step: whether the stage steps by a kernel where it predicts nothing along.

    Raises:
        ConfigError: the optimizer cannot be copied, or does something in its step that a copy would not do.
    """

    def __init__(self, every: int, optimizer: Optimizer, names: Sequence[str], kernel_step: bool, k: int) -> None:
        self.every, self.k = every, k
        self._optimizer, self._names, self._kernel_step = optimizer, names, kernel_step
        self._twin: Optimizer | None = None
        self._random: list[Tensor] = []
        self._devices = sorted({p.device for p in optimizer_parameters(optimizer) if p.device.type == "cuda"}, key=str)
        try:
            self._copy()  # and forgotten: it would be another copy of the weights until the first audit
        except Exception as reason:  # third-party code may raise anything
            raise ConfigError(
                f"audit is {every}, but the {type(optimizer).__name__} of stage {k} cannot be copied ({reason!r}); leave audit out, or use "
                "an optimizer whose attributes can be deep-copied"
            ) from reason

    def begin(self, version: int) -> bool:
        """Before the update that makes ``version``: whether it is one to do again; all that it starts from is copied then.

        Raises:
            ConfigError: the optimizer's step has hooks, or was replaced: a copy steps as its class does.
        """
        if version % self.every:
            return False
        if not all(map(unpatched, {self._optimizer, *members(self._optimizer)})):
            raise ConfigError(
                f"audit is {self.every}, but the step of the {type(self._optimizer).__name__} of stage {self.k} has hooks or was replaced, "
                "so that it cannot be done again; leave audit out, or the hooks"
            )
        self._twin = self._copy()
        return True

    def _copy(self) -> Optimizer:
        # The step of some optimizers draws random numbers.
        self._random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]
        twin, _ = copy_optimizer(self._optimizer)
        for member in {twin, *members(twin)}:
            vars(member).pop("step", None)  # a scheduler's wrapper, which is bound to the original
        return twin  # type: ignore[no-any-return]

    def compare(self, version: int, fused: bool, plain: bool) -> None:
        """After the update that made ``version``: do it again, and compare.

        Args:
            fused: whether a kernel made the step and a prediction in one pass.
            plain: whether the step was the optimizer's own, whatever the stage uses else.

        Raises:
            CorruptionError: a weight or a tensor of the state has other bits.
        """
        twin, self._twin = self._twin, None
        assert twin is not None
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            if fused or (self._kernel_step and not plain):
                Predictor(twin, kind="none").step()
            else:
                for member in members(twin):
                    unhooked_step(type(member))(member)
        for (what, ours), (_, again) in zip(self._values(self._optimizer), self._values(twin), strict=True):
            if bits := different_bits(ours, again):
                raise CorruptionError(
                    f"update {version} of stage {self.k} was done twice from the same weights, gradients and optimizer state, and {what} "
                    f"differs in {counted(bits, 'bit')}: a processor or memory is faulty here; go on from the newest checkpoint elsewhere"
                )

    def _values(self, optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
        """What a step writes, with its name."""
        names = dict(zip(optimizer_parameters(optimizer), self._names, strict=True))
        for p, name in names.items():
            yield f"parameter {name!r}", p.detach()
        for member in members(optimizer):
            for p in (p for group in member.param_groups for p in group["params"]):
                for key, value in sorted(member.state.get(p, {}).items(), key=lambda pair: str(pair[0])):
                    for leaf in tree_flatten(value)[0]:
                        yield f"the optimizer's {key!r} of parameter {names[p]!r}", leaf


def different_bits(one: Any, other: Any) -> int:
    """How many bits differ between two tensors or numbers; 0 for what is neither.

    >>> different_bits(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])), different_bits(3, 3.5)
    (1, 1)
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        a, b = (value.detach().reshape(-1).view(torch.uint8) for value in (one, other))
        if a.shape != b.shape:
            return 8 * max(a.numel(), b.numel())
        if torch.equal(a, b):
            return 0
        bytes_ = (a ^ b)[a != b]
        return int(((bytes_.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bytes_.device)) & 1).sum())
    if isinstance(one, int | float) and isinstance(other, int | float):
        return int(one != other and not (one != one and other != other))  # NaN is what NaN was
    return 0


__all__ = ["UpdateAudit", "different_bits"]
