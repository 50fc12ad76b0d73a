"""Models of the zoo as work for ``pipeoptim bench throughput --model pipeoptim_zoo.speed:NAME``, small enough for two cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.bench.models import Workload
from pipeoptim_zoo.models.chain import Chain
from pipeoptim_zoo.models.gnmt import gnmt8 as translator
from pipeoptim_zoo.models.gpt import gpt as language_model
from pipeoptim_zoo.models.resnet import resnet
from pipeoptim_zoo.models.resnet import resnet101 as classifier

__all__ = ["gnmt8", "gpt", "resnet101", "resnet26"]

VOCABULARY = 1000


class _InOrder(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)  # and no view: ScheduleZBVZeroBubble detaches it in place

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


class Tidy(Chain):
    """A stage as torch's schedules can run it; all contenders get it.

    They send contiguous tensors and gradients only, and find out shapes by running each stage on memory that nobody has written
    to, where a token may be any number and a bool any byte.
    """

    def forward(self, *xs: Any) -> Any:
        """The blocks one after the other."""
        out = super().forward(*map(_tidy, xs))
        return tuple(map(_tidy, out)) if isinstance(out, tuple) else _tidy(out)


def _tidy(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return _InOrder.apply(x)  # type: ignore[no-any-return,no-untyped-call]
    return x.view(torch.uint8) != 0 if x.dtype == torch.bool else x % VOCABULARY


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, mean over all tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def gpt(batch: int, width: int = 128, layers: int = 6, context: int = 64, vocabulary: int = VOCABULARY) -> Workload:
    """A GPT of 1.4 million weights."""
    model = language_model(vocabulary, context, width, layers, heads=4)
    x, y = (torch.randint(vocabulary, (batch, context)) for _ in range(2))
    return Workload(list(model), x, y, token_loss)


def resnet101(batch: int, width: float = 0.25, classes: int = 100) -> Workload:
    """ResNet-101 with a quarter of the channels, for images of 32 x 32."""
    model = classifier(32, classes, width)
    return Workload(
        list(model), torch.randn(batch, 3, 32, 32), torch.randint(classes, (batch,)), nn.functional.cross_entropy, Chain
    )


def resnet26(batch: int, width: float = 0.25, classes: int = 100) -> Workload:
    """Eight bottleneck blocks with a quarter of the channels, for images of 32 x 32."""
    model = resnet((2, 2, 2, 2), 32, classes, width)
    return Workload(
        list(model), torch.randn(batch, 3, 32, 32), torch.randint(classes, (batch,)), nn.functional.cross_entropy, Chain
    )


def gnmt8(batch: int, width: int = 64, length: int = 12, vocabulary: int = VOCABULARY) -> Workload:
    """GNMT-8 with 64 units per layer and sentences of 12 tokens."""
    model = translator(vocabulary, length, width, dropout=0.0)
    x = torch.randint(1, vocabulary, (batch, 2 * length))
    return Workload(list(model), x, torch.randint(1, vocabulary, (batch, length)), token_loss, Tidy)
