"""What the image models share: input sizes, channel scaling, the basic convolution, weight initialisation."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from pipeoptim.errors import ConfigError

__all__ = ["INPUT_SIZES", "check_input_size", "conv_norm", "initialise", "scaled"]

#: Sides of the square inputs that every image model accepts. 224 and 299 use the published net.
INPUT_SIZES = (32, 64, 224, 299)

Net = TypeVar("Net", bound=nn.Module)


def check_input_size(size: int) -> int:
    """``size`` if it is one of INPUT_SIZES; ConfigError otherwise."""
    if size not in INPUT_SIZES:
        raise ConfigError(f"input_size={size} has no variant of this model; choose one of {INPUT_SIZES}")
    return size


def scaled(channels: int, width: float) -> int:
    """``channels * width``, rounded, at least 1; ``width=1`` is the published net."""
    return max(1, round(channels * width))


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    eps: float = 1e-3,
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU. ``eps`` is the Inception family's."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(outputs, eps=eps),
        nn.ReLU(),
    )


def initialise(model: Net) -> Net:
    """He et al. (2015) normal weights for convolutions and linear layers, zero biases; returns ``model``.

    The variance is 2 / fan_out for convolutions (it keeps the gradients' size) and 2 / fan_in for linear
    layers; the last linear layer, the classifier, starts at standard deviation 0.01, so that the first loss
    is log(classes).
    """
    last = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            last = module
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if last is not None:
        nn.init.normal_(last.weight, std=0.01)
    return model
