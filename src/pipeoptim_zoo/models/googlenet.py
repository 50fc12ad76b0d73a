"""GoogLeNet with BatchNorm: Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015).

Deviations from the paper, which the usual parameter count of 13,004,888 includes: BatchNorm after every
convolution (instead of local response normalisation), 3x3 in place of 5x5 in the third branch of an inception
block, and auxiliary heads on an adaptive 4x4 pooling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeoptim_zoo.models.auxiliary import Auxiliary, Classifier
from pipeoptim_zoo.models.chain import Carry, Chain
from pipeoptim_zoo.models.image import check_input_size, conv_norm, initialise, scaled

__all__ = ["Inception", "googlenet"]

# Outputs of one block: 1x1; 3x3 after its reduction; "5x5" after its reduction; 1x1 after the pooling.
_ROWS: dict[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class Inception(nn.Module):
    """Four branches side by side, joined along the channels."""

    def __init__(self, inputs: int, row: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = row
        self.branches = nn.ModuleList(
            [
                conv_norm(inputs, one, 1),
                nn.Sequential(conv_norm(inputs, reduce3, 1), conv_norm(reduce3, three, 3, padding=1)),
                nn.Sequential(conv_norm(inputs, reduce5, 1), conv_norm(reduce5, five, 3, padding=1)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_norm(inputs, pooled, 1)),
            ]
        )
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _stem(input_size: int, width: float) -> tuple[list[nn.Module], int]:
    c1, c2 = scaled(64, width), scaled(192, width)

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)

    first = conv_norm(3, c1, 3, padding=1) if input_size < 224 else conv_norm(3, c1, 7, 2, padding=3)
    if input_size >= 224:
        first.append(pool())
    last = conv_norm(c1, c2, 3, padding=1)
    if input_size > 32:
        last.append(pool())
    return [first, conv_norm(c1, c1, 1), last], c2


def _auxiliary_head(inputs: int, classes: int, width: float, dropout: float) -> nn.Module:
    middle, hidden = scaled(128, width), scaled(1024, width)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4),
        conv_norm(inputs, middle, 1),
        nn.Flatten(),
        nn.Linear(16 * middle, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


def googlenet(
    input_size: int = 224,
    classes: int = 1000,
    width: float = 1.0,
    auxiliary: bool = True,
    dropout: float = 0.2,
    auxiliary_dropout: float = 0.7,
) -> Chain:
    """Nine inception blocks, ``[B, 3, input_size, input_size]`` to logits ``[B, classes]``.

    13,004,888 parameters at 1000 classes with the auxiliary heads (6,624,904 without). With them the output
    is a tuple (logits, auxiliary after 4a, auxiliary after 4d) in training and logits in evaluation; see
    ``pipeoptim_zoo.data.losses.auxiliary_cross_entropy``.
    Deviations for 32 and 64: the first convolution is 3x3 with stride 1 (7x7 with stride 2), the pooling
    after it is left out, at 32 the second pooling as well: block 3a sees 32x32 positions (28x28 in the
    published net).
    Raises ConfigError for another size.
    """
    blocks, channels = _stem(check_input_size(input_size), width)
    for name, row in _ROWS.items():
        if name == "4a":
            blocks.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
        if name == "5a":
            blocks.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
        block = Inception(channels, tuple(scaled(c, width) for c in row))
        blocks.append(block)
        channels = block.outputs
        if auxiliary and name in ("4a", "4d"):
            blocks.append(Auxiliary(_auxiliary_head(channels, classes, width, auxiliary_dropout)))
    blocks.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)))
    head = Classifier(nn.Linear(channels, classes))
    return initialise(Chain(*(b if isinstance(b, Auxiliary) else Carry(b) for b in blocks), head))
