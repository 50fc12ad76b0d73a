"""Nested plain data and tensors that must be equal in every bit."""

from __future__ import annotations

from typing import Any

import torch


def assert_equal(one: Any, other: Any, where: str) -> None:
    """Equal in structure, in the types, and in every bit of every tensor; ``where`` says of what."""
    if isinstance(one, torch.Tensor):  # the loss of a step is saved and loaded as a plain one
        assert isinstance(other, torch.Tensor), where
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where} differs"
        return
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    else:
        assert one == other, where
