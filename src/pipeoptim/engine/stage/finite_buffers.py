"""Running averages in buffers, as those of BatchNorm: a mini-batch that is left out must not leave NaN in them for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


class FiniteBuffers:
    """The floating-point buffers of ``module`` that it saves and that are finite now.

    A forward writes into them before anybody knows whether its mini-batch is bad, and later ones have written, too, when it is known.
    So entry by entry, what is not finite after a forward takes the value that it had before.
    """

    def __init__(self, module: nn.Module) -> None:
        saved = module.state_dict(keep_vars=True).values()
        held = {id(tensor) for tensor in saved if isinstance(tensor, Tensor)}
        found = [b for b in module.buffers() if id(b) in held and b.is_floating_point()]
        self._buffers = [(b, b.clone()) for b in found if bool(b.isfinite().all())]
        self._written = tuple(b for b, _ in self._buffers)

    @torch.no_grad()
    def mend(self) -> None:
        """After a forward."""
        # Autograd may have saved a buffer; its values are the same wherever the backward counts.
        with _unsafe_preserve_version_counter(self._written):
            for buffer, before in self._buffers:
                # Without asking whether there is anything to mend, for which a device would have to be waited for.
                torch.where(buffer.isfinite(), buffer, before, out=before)
                buffer.copy_(before)
