"""The examples in the documentation strings of models and data run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import pipeoptim_zoo.data
import pipeoptim_zoo.models

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (pipeoptim_zoo.models, pipeoptim_zoo.data)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
    assert module.__doc__
    assert len(module.__doc__) > 40
