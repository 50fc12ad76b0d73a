"""Handwritten digits that come inside scikit-learn: 1,797 real images of 8x8 pixels, nothing to download."""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.losses import accuracy, auxiliary_cross_entropy
from pipeoptim_zoo.data.task import IndexedTask, TensorSource, shuffled

__all__ = ["digits"]

_SPLIT_SEED = 20231  # of the split, not of the run: runs with different seeds share their validation set


def digits(seed: int = 0, input_size: int = 8, channels: int = 1) -> IndexedTask:
    """Images ``[B, channels, S, S]`` float32 in 0..1 and labels ``[B]``; 1,437 for training, 360 for validation.

    S = ``input_size``, enlarged by bilinear interpolation where it is not 8; all ``channels`` are alike. With 32 and 3 the
    models for photographs can be tried on them.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), test part.
    ``seed`` orders the training examples; the split is fixed. Raises ConfigError without scikit-learn.

    >>> x, y = digits().train_batch(step=0, batch_size=4)
    >>> tuple(x.shape), tuple(y.shape)
    ((4, 1, 8, 8), (4,))
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ConfigError("the digits data set needs scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    if input_size != 8:
        x = functional.interpolate(x, size=input_size, mode="bilinear")
    x = x.expand(-1, channels, -1, -1)
    y = torch.as_tensor(labels, dtype=torch.int64)
    order = shuffled(len(x), _SPLIT_SEED, 0)
    held_out, rest = order[: len(x) // 5 + 1], order[len(x) // 5 + 1 :]
    return IndexedTask(
        name="digits",
        train=TensorSource(x[rest], y[rest]),
        validation=TensorSource(x[held_out], y[held_out]),
        loss=auxiliary_cross_entropy,
        metrics=accuracy,
        origin="scikit-learn's load_digits (UCI optical recognition of handwritten digits)",
        seed=seed,
        classes=10,
    )
