"""Auxiliary classifiers in a flat sequence: their logits travel to the end beside the features.

So the loss sees all of them on the last stage, and every block before stays an ordinary block.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Auxiliary", "Classifier"]


class Auxiliary(nn.Module):
    """Appends ``head(x)`` to the tensors that travel: ``(x, *logits)`` to ``(x, *logits, head(x))``.

    It does so in evaluation as well, where :class:`Classifier` drops them: the tensors between two stages
    are then the same in both modes, as a pipeline with buffers of fixed shape needs.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
        return (x, *logits, self.head(x))


class Classifier(nn.Module):
    """The last block: ``(net(x), *auxiliary logits)`` in training, ``net(x)`` in evaluation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *logits: Tensor) -> Tensor | tuple[Tensor, ...]:
        out: Tensor = self.net(x)
        return (out, *logits) if self.training and logits else out
