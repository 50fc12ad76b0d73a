"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import pipeoptim.optim
import pipeoptim.rules

MODULES = [
    name
    for room in (pipeoptim.rules, pipeoptim.optim)
    for name in (room.__name__, *(f"{room.__name__}.{module.name}" for module in pkgutil.iter_modules(room.__path__)))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_functions_have_examples() -> None:
    for function in (pipeoptim.rules.predict_weights, pipeoptim.rules.track, pipeoptim.rules.register_rule):
        assert ">>>" in (function.__doc__ or "")
