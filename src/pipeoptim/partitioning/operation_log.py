"""A record of one run of a model: which modules ran in which order, which weights each operation used, and what is live across each cut.

The run is on a copy in which every place for a weight has a tensor object of its own, so that tied weights are told apart, and
under ``no_grad``. Of a model on the ``meta`` device only forms are computed; inputs are real, so masks come out as they should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.absent_tensor import AbsentTensor
from pipeoptim.partitioning.weight_slots import is_meta, shadow_copy, weight_slots

FROM_WEIGHTS = -1
"""The label of everything that was computed from weights; the labels from 0 on are the model's input tensors."""


@dataclass(frozen=True)
class Operation:
    """One operation: keys of its inputs and outputs, the slots it used, and whether it gave Python a value or drew random numbers."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    slots: tuple[str, ...]
    reads_value: bool
    random: bool = False


@dataclass(frozen=True)
class ModuleExit:
    """A module returned: the keys of the tensors it returned."""

    name: str
    outputs: tuple[int, ...]


@dataclass
class OperationLog:
    """What a run did.

    Attributes:
        events: in order.
        inputs: key of each tensor among the model's arguments.
        calls: how often each module ran.
        buffers: slots that hold buffers.
        output: of the model.
    """

    events: list[Operation | ModuleExit] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    output: Any = None


def record_operations(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool | None = None,
    uniform: float | None = None,
) -> OperationLog:
    """Run ``model`` once and say what it did. The model, its buffers and the random state are as before afterwards.

    ``training``: in this mode instead of its own. ``uniform``: this number takes the place of all that ``torch.rand`` draws.

    Raises:
        ConfigError: the model does not run on these arguments.
    """
    return record_run(shadow_copy(model), args, kwargs, training, uniform)


def record_run(
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool | None = None,
    uniform: float | None = None,
) -> OperationLog:
    """As :func:`record_operations`, of a copy of the model: what it notes of this run (a counter, its own random numbers) stays in it."""
    log, recorder = OperationLog(), _OperationRecorder(uniform)
    meta = is_meta(twin)
    device = next((t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), torch.device("cpu"))
    for slot in weight_slots(twin):
        own = _own(slot.tensor, slot.buffer, meta, device)
        slot.put(own)
        recorder.slots[id(own)] = slot.names[0]
        log.buffers |= {slot.names[0]} if slot.buffer else set()
    if training is not None:
        twin.train(training)
    handles = _note_exits(twin, log, recorder)
    log.inputs = [recorder.key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    recorder.log = log
    # Dropout may draw while the model is watched; training must not notice.
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), recorder:
            log.output = twin(*args, **kwargs)
        log.events.append(
            Operation(tuple(recorder.key(t) for t in tree_leaves(log.output) if isinstance(t, Tensor)), (), (), False)
        )
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the {type(twin).__name__} does not run on sample_args ({type(error).__name__}: {error}); "
            "pass one mini-batch as the model takes it, on the model's device"
        ) from error
    finally:
        torch.set_rng_state(state)
        for handle in handles:
            handle.remove()
    return log


def _own(tensor: Tensor, buffer: bool, meta: bool, device: torch.device) -> Tensor:
    """A tensor object for one slot; of a buffer a copy, since running may change it."""
    if meta and tensor.device.type == "meta":
        return AbsentTensor(tensor.detach(), device)
    return tensor.detach().clone() if buffer else nn.Parameter(tensor.detach(), requires_grad=False)


def _note_exits(twin: nn.Module, log: OperationLog, recorder: _OperationRecorder) -> list[Any]:
    def note(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            log.calls[name] = log.calls.get(name, 0) + 1
            log.events.append(ModuleExit(name, tuple(recorder.key(t) for t in tree_leaves(output) if isinstance(t, Tensor))))

        return hook

    return [module.register_forward_hook(note(name)) for name, module in twin.named_modules()]


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd."""

    def __init__(self, uniform: float | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uniform = uniform
        self.slots: dict[int, str] = {}
        self.log = OperationLog()
        self._kept: list[Any] = []

    def key(self, tensor: Tensor) -> int:
        """Equal for tensors on the same memory."""
        self._kept.append(tensor)  # an id is unique only as long as its object lives
        return id(tensor) if isinstance(tensor, AbsentTensor) else tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.uniform is not None and func.overloadpacket.__name__ in ("rand", "uniform_"):
            result.fill_(self.uniform)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if func is torch.ops.aten._pack_padded_sequence.default:  # how many rows each step has follows from the lengths alone
            self.log.events.append(Operation((self.key(tensors[1]),), (self.key(made.pop()),), (), False))
        used = tuple(self.slots[id(t)] for t in tensors if id(t) in self.slots)
        inputs = tuple(self.key(t) for t in tensors if id(t) not in self.slots)
        outputs = tuple(map(self.key, made))
        reads_value = func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "is_nonzero")
        random = torch.Tag.nondeterministic_seeded in func.tags
        self.log.events.append(Operation(inputs, outputs, used, reads_value, random))
        return result


@dataclass
class CutFacts:
    """What a log says about cutting behind each of ``layers``.

    Phase i ends when layer i returns; the last phase is what comes after all layers. A cut behind layer c separates the phases
    up to c from the others.

    Attributes:
        uses: slot -> phases that use it.
        live: per cut, whether more than the layer's own output lives across it.
        needed: per cut, the numbers of the inputs whose values the phases behind it need.
    """

    uses: dict[str, set[int]]
    live: list[bool]
    needed: list[set[int]]


def cut_facts(log: OperationLog, layers: list[str]) -> CutFacts:
    """Follow everything that was computed from weights or inputs through the run."""
    number = {name: i for i, name in enumerate(layers)}
    found = CutFacts({}, [False] * len(layers), [set() for _ in layers])
    labels: dict[int, frozenset[int]] = {key: frozenset([j]) for j, key in enumerate(log.inputs)}
    born = dict.fromkeys(log.inputs, 0)
    returned: list[set[int]] = []
    for event in log.events:
        phase = len(returned)
        if isinstance(event, ModuleExit):
            if event.name in number:
                returned.append(set(event.outputs))
            continue
        for slot in event.slots:
            found.uses.setdefault(slot, set()).add(phase)
        mine: frozenset[int] = frozenset([FROM_WEIGHTS] if set(event.slots) - log.buffers else [])
        for key in event.inputs:
            what = labels.get(key, frozenset())
            mine |= what
            crossed = {c for c in range(born.get(key, phase), phase) if key not in returned[c]}
            if event.reads_value:
                # What Python reads may decide what runs, and every later stage runs this code again.
                crossed |= set(range(phase, len(layers)))
            for c in crossed if what else ():
                if FROM_WEIGHTS in what:
                    found.live[c] = True
                else:
                    found.needed[c] |= what
        for key in event.outputs:
            labels[key] = labels.get(key, frozenset()) | mine
            born[key] = phase
    return found
