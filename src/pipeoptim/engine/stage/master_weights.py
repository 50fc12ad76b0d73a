"""Modules in low precision with float32 latest weights: the optimizer moves masters, the module holds their rounded copy.

An update in bfloat16 is mostly lost to rounding (8 bits of mantissa), so the optimizer gets float32 copies. The module's own
weights, every prediction and every stash stay in the module's type: half the bytes, and no cast in F or B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.errors import ConfigError
from pipeoptim.weights.store import WeightPredictor

_MASTER_OF = "pipeoptim_master_of"


def master_weights(module: nn.Module) -> list[nn.Parameter]:
    """float32 copies of a module's trainable parameters, to build its optimizer from.

    The engine recognises them: it copies gradients over, steps, and writes the result back into the module, rounded to the
    module's type. Parameters that are float32 or wider already are returned as they are.

    Args:
        module: in its compute type, for instance after ``module.to(torch.bfloat16)``; its type must not change afterwards.

    Returns:
        One parameter per trainable parameter, in the order of ``module.parameters()``.

    Raises:
        ConfigError: no module.

    Example:
        >>> import torch, pipeoptim as po
        >>> stage = torch.nn.Linear(2, 2).to(torch.bfloat16)
        >>> optimizer = torch.optim.AdamW(po.master_weights(stage))
        >>> pipe = po.Emulator([stage], [optimizer], torch.nn.functional.mse_loss)
        >>> _ = pipe.step(torch.ones(1, 2, dtype=torch.bfloat16), target=torch.zeros(1, 2, dtype=torch.bfloat16))
        >>> stage.weight.dtype, optimizer.param_groups[0]["params"][0].dtype
        (torch.bfloat16, torch.float32)
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"master_weights() was given {module!r}, must be given a torch.nn.Module, the module of a stage")
    return [_make_master(p) for p in module.parameters() if p.requires_grad]


def _make_master(p: nn.Parameter) -> nn.Parameter:
    if not p.is_floating_point() or p.element_size() >= 4:
        return p
    master = nn.Parameter(p.detach().to(torch.float32, copy=True))
    # On the tensor itself, since users build the optimizer in between: nothing else connects it with the module.
    setattr(master, _MASTER_OF, p)
    return master


def module_parameter(p: Tensor) -> Tensor:
    """The parameter of the module that the optimizer's ``p`` stands for: ``p`` itself, or what it is a master of."""
    found: Tensor = getattr(p, _MASTER_OF, p)
    if found.shape != p.shape:
        raise ConfigError(
            f"a master of shape {tuple(p.shape)} belongs to a parameter of shape {tuple(found.shape)}; "
            "call master_weights() after the module has its final form"
        )
    return found


class MasterWeights:
    """The masters of one stage and the module's parameters that follow them.

    Args:
        parameters: what the optimizer holds, in its order.
        module_parameters: the module's parameter for each.
    """

    def __init__(self, parameters: Sequence[Tensor], module_parameters: Sequence[Tensor]) -> None:
        self.pairs = [(m, p) for m, p in zip(parameters, module_parameters, strict=True) if m is not p]

    def collect(self) -> None:
        """After each B: add the module's gradients to the masters', in float32, and clear them."""
        for master, p in self.pairs:
            if p.grad is not None:
                # After each micro-batch, since summing in the low precision would lose what small gradients add.
                gradient = p.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                # Its memory is free at once, and the next backward writes a gradient instead of adding to one.
                p.grad = None

    def write_back(self) -> None:
        """After the optimizer's step: round the masters into the module."""
        if not self.pairs:
            return
        with torch.no_grad():
            for master, p in self.pairs:
                p.copy_(master)

    def nbytes(self) -> int:
        """Bytes of the masters."""
        return sum(m.untyped_storage().nbytes() for m, _ in self.pairs)

    def state_dict(self) -> list[Tensor]:
        """The masters' values, in the order of the optimizer."""
        return [m.detach() for m, _ in self.pairs]

    def load_state_dict(self, state: Sequence[Tensor] | None) -> None:
        """Take over :meth:`state_dict`; None: the module's own weights, as from a checkpoint of the module alone."""
        values = [p for _, p in self.pairs] if state is None else state
        with torch.no_grad():
            for (master, _), value in zip(self.pairs, values, strict=True):
                master.copy_(value)


class MasterWeightPredictor:
    """Between a predictor of float32 masters and buffers in the module's type.

    A rule writes into any type. The last displacement ``W_t - W_{t-1}`` is smaller than the rounding of a low-precision copy,
    so where a predictor needs the previous weights it gets a float32 buffer of its own.
    """

    needs_previous = False  # of the engine's buffers

    def __init__(self, inner: WeightPredictor, parameters: Sequence[Tensor]) -> None:
        self.inner = inner
        self.previous = [torch.empty_like(p.detach()) for p in parameters] if inner.needs_previous else None

    def before_step(self, spare: Sequence[Tensor] | None) -> None:
        """As :class:`pipeoptim.rules.Predictor`."""
        # `spare` has the module's type; what a predictor keeps of the previous weights must be exact.
        self.inner.before_step(self.previous)

    def after_step(self) -> None:
        """As :class:`pipeoptim.rules.Predictor`."""
        self.inner.after_step()

    def predict_into(self, out: Sequence[Tensor], steps: int) -> None:
        """Write the prediction into ``out``, rounded to its type."""
        if self.previous is None:
            self.inner.predict_into(out, steps)
            return
        # In place: the predictor may overwrite the previous weights with the prediction, since they are kept anew before each step.
        self.inner.predict_into(self.previous, steps)
        for low, exact in zip(out, self.previous, strict=True):
            low.copy_(exact)

    def nbytes(self) -> int:
        """Bytes of the float32 buffer."""
        return sum(t.untyped_storage().nbytes() for t in self.previous or ())

    def state_dict(self) -> dict[str, Any]:
        """That of the predictor."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :class:`pipeoptim.rules.Predictor`."""
        self.inner.load_state_dict(state)
