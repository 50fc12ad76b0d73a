"""An ordinary model with layers somewhere inside it, as blocks that can be cut apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeoptim.engine.transport.pytree import as_args
from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.arguments import bind_arguments, microbatch, parameters, tensor_names, whole
from pipeoptim.partitioning.block_costs import BlockCost
from pipeoptim.partitioning.changing_forward import check_same_layers
from pipeoptim.partitioning.find_layers import find_layers
from pipeoptim.partitioning.layer_stage import LayerStage
from pipeoptim.partitioning.operation_log import cut_facts, record_operations
from pipeoptim.partitioning.phase_costs import measure
from pipeoptim.partitioning.shared_weights import BlockWeights
from pipeoptim.partitioning.weight_slots import is_meta, shadow_copy, weight_slots


class LayerSplitter:
    """Blocks 0 .. n-1 are the layers, the first one with what comes before it; block n is what comes after the last layer.

    Args:
        model: any model whose layers run one after the other.
        args, kwargs: one mini-batch.
        layers: names, see :func:`~pipeoptim.partitioning.find_layers.find_layers`.
        microbatches: what runs when costs are measured.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layers: str | Sequence[str] | None,
        microbatches: int = 1,
    ) -> None:
        given = bind_arguments(parameters(model), args, kwargs)
        self.model, self.m, self.inputs = model, microbatches, whole(given)
        self._microbatch = microbatch(given, microbatches)
        self.measurable = not is_meta(model)
        log = record_operations(model, tuple(self.inputs[0]), self.inputs[1])
        self.layers = find_layers(model, log, layers)
        check_same_layers(model, self.inputs, log, self.layers)
        self.cuts = cut_facts(log, self.layers)
        numbered = tensor_names(self.inputs)
        self.by_value = [{numbered[j] for j in needed} for needed in self.cuts.needed]
        self.names = [*self.layers, f"after {self.layers[-1]}"]
        self._uses = self._phases_by_slot()

    def _phases_by_slot(self) -> dict[str, set[int]]:
        """Slot -> phases that use it; what nothing uses goes with its other slots, or with what is before it in the model."""
        uses: dict[str, set[int]] = {}
        elsewhere: dict[int, set[int]] = {}
        before = {0}
        for slot in weight_slots(self.model):
            for name in slot.names:
                if name in self.cuts.uses:
                    elsewhere[id(slot.tensor)] = self.cuts.uses[name]
        for slot in weight_slots(self.model):
            found = next((self.cuts.uses[name] for name in slot.names if name in self.cuts.uses), None)
            found = found or elsewhere.get(id(slot.tensor))
            before = {max(found)} if found else before
            uses |= dict.fromkeys(slot.names, found or before)
        return uses

    def may_cut(self, c: int) -> bool:
        """Whether a stage may end with block ``c``."""
        return not self.cuts.live[c]

    def costs(self) -> list[BlockCost]:
        """Measured on the model's device.

        Raises:
            ConfigError: the model has no values.
        """
        if not self.measurable:
            raise ConfigError(
                "the model is on the meta device, where nothing can be measured; pass costs, or all cuts as pins "
                "(one less than stages)"
            )
        weights = [sum(own.values()) for own in self.weights()]
        found = measure(self.model, self.layers, self._microbatch, self.m)
        return [
            BlockCost(name, forward, backward, output, saved, size)
            for name, (forward, backward, output, saved), size in zip(self.names, found, weights, strict=True)
        ]

    def weights(self) -> list[BlockWeights]:
        """Those that each block uses."""
        found: list[BlockWeights] = [{} for _ in self.names]
        for slot in weight_slots(self.model):
            for phase in () if slot.buffer else self._uses[slot.names[0]]:
                found[phase][id(slot.tensor)] = slot.tensor.nbytes
        return found

    def stages(self, ranges: Sequence[tuple[int, int]]) -> list[nn.Module]:
        """One stage per range of blocks; they hold the model's own tensors."""
        return [self._stage(start, end) for start, end in ranges]

    def _stage(self, start: int, end: int) -> LayerStage:
        n = len(self.layers)
        last = end == n + 1
        form_only = set() if last else set(tensor_names(self.inputs)) - self.by_value[end - 1]
        stage = LayerStage(shadow_copy(self.model), self.layers, start, min(end, n), last, form_only)
        phases = set(range(start, end))
        absent = [s for s in weight_slots(stage.model) if not s.buffer and not self._uses[s.names[0]] & phases]
        elsewhere = {id(slot.module) for slot in absent}
        for slot in weight_slots(stage.model):
            used = self._uses[slot.names[0]]
            if slot.buffer and not used & phases and (id(slot.module) in elsewhere or 0 not in used):
                absent.append(slot)
        stage.keep_forms_only(absent)
        return stage

    @torch.no_grad()
    def check(self, stages: Sequence[nn.Module]) -> None:
        """Run the stages once, in evaluation mode, and compare with the model.

        Raises:
            ConfigError: they compute something else.
        """
        if not self.measurable:
            return
        # Evaluation mode: dropout would make any two runs differ. Modes are restored one by one.
        modes = [(m, m.training) for whole in (self.model, *stages) for m in whole.modules()]
        try:
            expected = self.model.eval()(*self.inputs[0], **self.inputs[1])
            value: Any = None
            for k, stage in enumerate(stages):
                value = stage.eval()(*self.inputs[0], **self.inputs[1]) if k == 0 else stage.eval()(*as_args(value))
        finally:
            for module, mode in modes:
                module.training = mode
        pairs = zip(tree_leaves(expected), tree_leaves(value), strict=True)
        for a, b in pairs:
            if isinstance(a, Tensor) and not torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ConfigError(
                    f"the stages of the {type(self.model).__name__} compute something else than the model (difference "
                    f'{float((a - b).abs().max()):.3g}); name other layers, or partition with how="trace"'
                )
