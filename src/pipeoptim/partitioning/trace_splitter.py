"""A model that ``torch.export`` can trace, cut by ``torch.distributed.pipelining.pipeline``, as blocks.

Tracing sees every operation, so it also cuts where more than a layer's output lives on: what later blocks need is handed on. The
price: shapes and the training mode (dropout, BatchNorm) are those of the trace for ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pipeoptim.engine.transport.pytree import as_args
from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.arguments import Inputs, Parameters, bind_arguments, microbatch, parameters
from pipeoptim.partitioning.block_costs import BlockCost, profile
from pipeoptim.partitioning.block_splitter import BlockRun
from pipeoptim.partitioning.changing_forward import check_same_layers
from pipeoptim.partitioning.find_layers import find_layers
from pipeoptim.partitioning.operation_log import record_operations
from pipeoptim.partitioning.shared_weights import BlockWeights, weights_of
from pipeoptim.partitioning.weight_slots import is_meta, weight_slots


class TracedBlock(nn.Module):
    """One piece of the traced model. Takes the values that live before it, returns those that live behind it.

    Args:
        part: what computes.
        calls: what it is called with: names of values, or constants.
        before, behind: names of the values.
        made: names of what it returns.
    """

    def __init__(self, part: nn.Module, calls: list[Any], before: list[str], behind: list[str], made: list[str]) -> None:
        super().__init__()
        self.part = part
        self.calls, self.before, self.behind, self.made = calls, before, behind, made

    def forward(self, *live: Any) -> Any:
        values = dict(zip(self.before, live, strict=True))
        result = self.part(*[values[c.name] if isinstance(c, _ValueName) else c for c in self.calls])
        values.update(zip(self.made, result if isinstance(result, (tuple, list)) else [result], strict=False))
        return tuple(values[name] for name in self.behind)


class _ValueName:
    def __init__(self, name: str) -> None:
        self.name = name


class FirstTracedBlock(nn.Module):
    """Takes the model's arguments as the model does, and checks that they have the form of the trace."""

    def __init__(self, block: TracedBlock, signature: Parameters, inputs: Inputs) -> None:
        super().__init__()
        self.block, self.signature = block, signature
        self.forms = [_form(leaf) for leaf in tree_leaves(inputs)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves(bind_arguments(self.signature, args, kwargs))
        forms = [_form(leaf) for leaf in leaves]
        if forms != self.forms:
            raise ConfigError(
                f"the arguments are {_words(forms)}, but the model was traced with {_words(self.forms)}, and a trace keeps its "
                'shapes; partition with sample_args of this form, or with how="layers"'
            )
        return self.block(*leaves)


class LastTracedBlock(nn.Module):
    """Restores the structure of the model's output."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.block = block
        leaves, self.spec = tree_flatten(output)
        self.fixed = [None if isinstance(leaf, Tensor) else [leaf] for leaf in leaves]

    def forward(self, *live: Any, **kwargs: Any) -> Any:
        made = iter(as_args(self.block(*live, **kwargs)))
        return tree_unflatten([next(made) if fixed is None else fixed[0] for fixed in self.fixed], self.spec)


class TraceSplitter:
    """Blocks 0 .. n-1 end where the layers end; block n is what comes after the last.

    Args:
        model: what ``torch.export`` can trace.
        args, kwargs: one mini-batch.
        layers: names, see :func:`~pipeoptim.partitioning.find_layers.find_layers`.
        microbatches: the trace is made with a micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layers: str | Sequence[str] | None,
        microbatches: int = 1,
    ) -> None:
        if is_meta(model):
            raise ConfigError('the model is on the meta device, where it cannot be traced; partition with how="layers"')
        self.model, self.m, signature = model, microbatches, parameters(model)
        self.inputs: Inputs = microbatch(bind_arguments(signature, args, kwargs), microbatches)
        log = record_operations(model, tuple(self.inputs[0]), self.inputs[1])
        found = find_layers(model, log, layers)
        check_same_layers(model, self.inputs, log, found)
        self.names, self.measurable = [*found, f"after {found[-1]}"], True
        self.blocks: list[nn.Module] = list(_traced_blocks(self._trace(found)))
        for block in self.blocks:
            _use_model_weights(block.part, model)  # type: ignore[arg-type]
        self.names = self.names[: len(self.blocks)]
        self.blocks[0] = FirstTracedBlock(self.blocks[0], signature, self.inputs)  # type: ignore[arg-type]
        self.blocks[-1] = LastTracedBlock(self.blocks[-1], log.output)
        self._fixed_mode = any(isinstance(m, _TWO_MODES) for m in model.modules())
        if self._fixed_mode:
            warnings.warn(
                f"the {type(model).__name__} has dropout or BatchNorm, which in a traced model behave the same in training and "
                'evaluation; how="layers" does not have this limit',
                stacklevel=4,
            )

    def _trace(self, found: list[str]) -> fx.GraphModule:
        ends = dict.fromkeys(found, SplitPoint.END)
        # pipeline() leaves methods of its own in the layers, which no second trace survives; and what a forward notes while it is traced
        # (a cache, a counter) holds tensors without values.
        before = {module: dict(vars(module)) for module in self.model.modules()}
        try:
            return pipeline(self.model, tuple(self.inputs[0]), self.inputs[1], split_spec=ends).split_gm
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"torch.export cannot trace the {type(self.model).__name__} ({type(error).__name__}: {reason}); partition with "
                'how="layers", or pass the list of its blocks'
            ) from None  # torch's own traceback is a hundred lines, of which the first is the reason
        finally:
            for module, attributes in before.items():
                vars(module).clear()
                vars(module).update(attributes)

    def may_cut(self, c: int) -> bool:
        """Between any two."""
        return True

    def costs(self) -> list[BlockCost]:
        """Measured on the model's device."""
        return profile(self.blocks, tuple(self.inputs[0]), self.names, sample_kwargs=self.inputs[1], microbatches=self.m)

    def weights(self) -> list[BlockWeights]:
        """Those of each block."""
        return [weights_of(block) for block in self.blocks]

    def stages(self, ranges: Sequence[tuple[int, int]]) -> list[nn.Module]:
        """One stage per range of blocks; they hold the model's own tensors."""
        return [BlockRun({str(i): self.blocks[i] for i in range(start, end)}) for start, end in ranges]

    def check(self, stages: Sequence[nn.Module]) -> None:
        """``pipeline`` has run what it traced."""


_TWO_MODES = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def _traced_blocks(gm: fx.GraphModule) -> list[TracedBlock]:
    """The called pieces of ``gm`` in order, each with the values that live before and behind it."""
    calls = [node for node in gm.graph.nodes if node.op == "call_module"]
    made: dict[fx.Node, list[str]] = {call: [call.name] for call in calls}
    for node in gm.graph.nodes:
        if node.op == "call_function":  # getitem: one of several values that a piece returns
            piece, index = node.args
            made[piece] = _with_name_at(made[piece] if piece.name not in made[piece] else [], index, node.name)
    last = next(node for node in gm.graph.nodes if node.op == "output")
    uses = [{n.name for n in call.all_input_nodes} for call in calls] + [{n.name for n in last.all_input_nodes}]
    live = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    blocks = []
    for i, call in enumerate(calls):
        later = set().union(*uses[i + 1 :])
        before, known = live, [*live, *made[call]]
        live = [name for name in dict.fromkeys(known) if name in later]
        if i == len(calls) - 1:
            live = [node.name for node in tree_leaves(last.args) if isinstance(node, fx.Node)]
        arguments = [_ValueName(a.name) if isinstance(a, fx.Node) else a for a in call.args]
        part = gm.get_submodule(call.target)
        if i == 0 and isinstance(part, fx.GraphModule):
            # It would take the model's arguments in their structure, but is given their leaves, as the graph names them.
            part.graph.set_codegen(fx.graph.CodeGen())
            part.recompile()
        blocks.append(TracedBlock(part, arguments, before, live, made[call]))
    return blocks


def _use_model_weights(part: nn.Module, model: nn.Module) -> None:
    """Replace the copies that tracing made of tied weights by the model's own; remove what the graph of ``part`` does not use."""
    _drop_unused(part)
    own = dict(model.named_parameters(remove_duplicate=False))
    for slot in weight_slots(part):
        original = own.get(slot.names[0])
        if original is not None and not slot.buffer and original.shape == slot.tensor.shape:
            slot.put(original)


def _drop_unused(module: nn.Module, called: Sequence[str] = ()) -> None:
    """Take away what neither the graph of ``module`` nor its caller, who uses ``called`` of it, refers to."""
    graph = getattr(module, "graph", None)
    if graph is not None:
        called = [*called, *(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))]
    elif not called:
        return
    for name, child in list(module.named_children()):
        inside = [target.removeprefix(f"{name}.") for target in called if target.startswith(f"{name}.")]
        if name in called or inside:
            _drop_unused(child, inside)
        else:
            delattr(module, name)


def _with_name_at(names: list[str], index: int, name: str) -> list[str]:
    names = names + [""] * (index + 1 - len(names))
    names[index] = name
    return names


def _form(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _words(forms: list[Any]) -> str:
    return ", ".join(f"{list(f[0])} {str(f[1]).removeprefix('torch.')}" if isinstance(f, tuple) else repr(f) for f in forms)
