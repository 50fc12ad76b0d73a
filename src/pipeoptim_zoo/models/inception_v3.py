"""Inception-v3: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeoptim_zoo.models.auxiliary import Auxiliary, Classifier
from pipeoptim_zoo.models.chain import Carry, Chain
from pipeoptim_zoo.models.image import check_input_size, conv_norm, initialise, scaled

__all__ = ["Branches", "inception_v3"]

#: kernel, outputs[, stride]: the same-padded convolutions of a branch, in order; stride 2 is unpadded.
Step = tuple[int | tuple[int, int], int] | tuple[int | tuple[int, int], int, int]


class Branches(nn.Module):
    """Branches side by side, joined along the channels: an inception block, or the fork at a branch's end."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class _Builder:
    """Writes blocks at one ``width``; knows how many channels the block so far ends with."""

    def __init__(self, width: float) -> None:
        self.width, self.channels = width, 3

    def convs(self, *steps: Step, inputs: int | None = None) -> nn.Sequential:
        inputs = inputs or self.channels
        layers = []
        for kernel, base, *rest in steps:
            outputs, stride = scaled(base, self.width), rest[0] if rest else 1
            high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
            padding = (0, 0) if stride > 1 else (high // 2, wide // 2)
            layers.append(conv_norm(inputs, outputs, (high, wide), stride, padding))
            inputs = outputs
        return nn.Sequential(*layers)

    def pooled(self, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), self.convs((1, outputs)))

    def forked(self, *steps: Step) -> nn.Sequential:
        """Steps, then 1x3 and 3x1 side by side."""
        trunk = self.convs(*steps)
        inputs, outputs = scaled(steps[-1][1], self.width), 384
        fork = Branches(self.convs((shape, outputs), inputs=inputs) for shape in ((1, 3), (3, 1)))
        return nn.Sequential(trunk, fork)

    def block(self, branches: Iterable[nn.Module], kept: int, *outputs: int) -> nn.Module:
        """Joins branches of ``outputs`` published channels, and ``kept`` channels of a pooled input."""
        built = Branches(branches)
        self.channels = kept + sum(scaled(c, self.width) for c in outputs)
        return built

    def a(self, pooled: int) -> nn.Module:
        """35x35 positions: 1x1, 5x5, double 3x3, pooling."""
        branches = (
            self.convs((1, 64)),
            self.convs((1, 48), (5, 64)),
            self.convs((1, 64), (3, 96), (3, 96)),
            self.pooled(pooled),
        )
        return self.block(branches, 0, 64, 64, 96, pooled)

    def b(self) -> nn.Module:
        """From 35x35 to 17x17."""
        branches = (self.convs((3, 384, 2)), self.convs((1, 64), (3, 96), (3, 96, 2)), nn.MaxPool2d(3, 2))
        return self.block(branches, self.channels, 384, 96)

    def c(self, middle: int) -> nn.Module:
        """17x17 positions: 7x7 convolutions taken apart into 1x7 and 7x1."""
        across, down = (1, 7), (7, 1)
        branches = (
            self.convs((1, 192)),
            self.convs((1, middle), (across, middle), (down, 192)),
            self.convs((1, middle), (down, middle), (across, middle), (down, middle), (across, 192)),
            self.pooled(192),
        )
        return self.block(branches, 0, 192, 192, 192, 192)

    def d(self) -> nn.Module:
        """From 17x17 to 8x8."""
        branches = (
            self.convs((1, 192), (3, 320, 2)),
            self.convs((1, 192), ((1, 7), 192), ((7, 1), 192), (3, 192, 2)),
            nn.MaxPool2d(3, 2),
        )
        return self.block(branches, self.channels, 320, 192)

    def e(self) -> nn.Module:
        """8x8 positions: the widest blocks."""
        branches = (
            self.convs((1, 320)),
            self.forked((1, 384)),
            self.forked((1, 448), (3, 384)),
            self.pooled(192),
        )
        return self.block(branches, 0, 320, 384, 384, 384, 384, 192)

    def auxiliary(self, input_size: int, classes: int) -> Auxiliary:
        middle, hidden = scaled(128, self.width), scaled(768, self.width)
        pool = nn.AvgPool2d(5, stride=3) if input_size == 299 else nn.AdaptiveAvgPool2d(5)
        squeeze = conv_norm(self.channels, middle, 1)
        join = conv_norm(middle, hidden, 5)
        return Auxiliary(nn.Sequential(pool, squeeze, join, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, classes)))


def _stem(build: _Builder, input_size: int) -> list[nn.Module]:
    w = build.width
    c1, c2, c3, c4 = (scaled(c, w) for c in (32, 64, 80, 192))
    build.channels = c4
    small = input_size < 224
    pad = 1 if small else 0
    blocks = [
        conv_norm(3, c1, 3, 1 if input_size == 32 else 2, padding=pad),
        conv_norm(c1, c1, 3, padding=pad),
        conv_norm(c1, c2, 3, padding=1),
        conv_norm(c2, c3, 1),
        conv_norm(c3, c4, 3, padding=pad),
    ]
    if not small:
        blocks[2].append(nn.MaxPool2d(3, 2))
        blocks[4].append(nn.MaxPool2d(3, 2))
    return list(blocks)


def inception_v3(
    input_size: int = 299,
    classes: int = 1000,
    width: float = 1.0,
    auxiliary: bool = True,
    dropout: float = 0.5,
) -> Chain:
    """Eleven inception blocks, ``[B, 3, input_size, input_size]`` to logits ``[B, classes]``.

    27,161,264 parameters at 1000 classes with the auxiliary head (23,834,568 without). With it the output is
    a tuple (logits, auxiliary logits) in training and logits in evaluation; see
    ``pipeoptim_zoo.data.losses.auxiliary_cross_entropy``.
    Deviations: at 32 and 64 the stem is padded and has no pooling, and at 32 no stride: the first inception
    block sees 32x32 positions (35x35 in the published net); at every size but 299 the auxiliary head's
    pooling is adaptive. Raises ConfigError for another size.
    """
    build = _Builder(width)
    blocks = _stem(build, check_input_size(input_size))
    blocks += [build.a(32), build.a(64), build.a(64), build.b()]
    blocks += [build.c(128), build.c(160), build.c(160), build.c(192)]
    if auxiliary:
        blocks.append(build.auxiliary(input_size, classes))
    blocks += [build.d(), build.e(), build.e()]
    blocks.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)))
    head = Classifier(nn.Linear(build.channels, classes))
    return initialise(Chain(*(b if isinstance(b, Auxiliary) else Carry(b) for b in blocks), head))
