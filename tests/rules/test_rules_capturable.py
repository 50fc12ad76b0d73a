"""``capturable=True``: torch wants an accelerator for it, so here its own check of the device is told that this one is.

Then the state is all tensors, learning rates and step counts included, and on a real accelerator rules must not read them.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.rules import RULES, Predictor, predict_weights
from rules_cases import CASES, Case, half_seen, set_random_grads, values_of

CAPTURABLE = [cls for cls in RULES if "capturable" in inspect.signature(cls).parameters]
"""Of all rules, those of a later torch as well."""

UNREAD = [cls for cls in CAPTURABLE if cls is not torch.optim.RAdam]
"""RAdam's formula depends on its step count, so its rule reads it."""


def cases_of(cls: type[Optimizer]) -> list[Case]:
    return [case for case in CASES if case.cls is cls and not case.settings.get("fused")]


def make(case: Case, updates: int = 4, **options: Any) -> Optimizer:
    capturable = Case(case.name, case.cls, {**copy.deepcopy(case.settings), **options})
    optimizer = capturable.make()
    for update in range(updates):
        set_random_grads(optimizer, update)
        optimizer.step()
    return optimizer


@pytest.fixture
def as_if_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.optim.") and hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])


@pytest.mark.parametrize("cls", CAPTURABLE, ids=lambda cls: cls.__name__)
def test_torch_itself_refuses_it_on_a_cpu(cls: type[Optimizer]) -> None:
    """So nothing of it has to be said here: the step says it, with or without a prediction."""
    for foreach in (False, True):
        with pytest.raises((AssertionError, RuntimeError), match="capturable"):
            make(cases_of(cls)[0], updates=1, capturable=True, foreach=foreach)
    optimizer = make(cases_of(cls)[0], updates=0, capturable=True)
    set_random_grads(optimizer, 0)
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        Predictor(optimizer).step()


@pytest.mark.usefixtures("as_if_on_an_accelerator")
@pytest.mark.parametrize("cls", CAPTURABLE, ids=lambda cls: cls.__name__)
def test_it_is_predicted_as_without(cls: type[Optimizer]) -> None:
    for case in cases_of(cls):
        plain = make(case)
        for foreach in (False, True):
            if isinstance(case.settings.get("lr"), Tensor) and foreach:
                continue
            optimizer = make(case, capturable=True, foreach=foreach)
            close(values_of(optimizer), values_of(plain))
            for kind in RULES[cls].kinds:
                close(
                    predict_weights(optimizer, 3, kind=kind, **half_seen(optimizer, kind)),
                    predict_weights(plain, 3, kind=kind, **half_seen(plain, kind)),
                )


@pytest.mark.usefixtures("as_if_on_an_accelerator")
@pytest.mark.parametrize("cls", UNREAD, ids=lambda cls: cls.__name__)
def test_no_tensor_is_read_on_an_accelerator(cls: type[Optimizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the state stay tensors there: reading one would wait for all that the device has still to do."""

    def kept(value: Any) -> Any:
        return value.detach().reshape(()) if isinstance(value, Tensor) else float(value)

    def read(self: Tensor) -> Any:
        raise AssertionError("a tensor was read")

    readers = [m for name, m in sys.modules.items() if name.startswith("pipeoptim.rules.") and hasattr(m, "scalar")]
    for case in cases_of(cls):
        plain, optimizer = make(case), make(case, capturable=True, foreach=False)
        if not isinstance(case.settings["lr"], Tensor):
            optimizer.param_groups[0]["lr"] = torch.tensor(case.settings["lr"], dtype=torch.float64)
        for kind in RULES[cls].kinds:
            expected = predict_weights(plain, 3, kind=kind, **half_seen(plain, kind))
            with monkeypatch.context() as patched:
                for module in readers:
                    patched.setattr(module, "scalar", kept)
                for name in ("item", "__float__", "__int__", "__bool__", "tolist"):
                    patched.setattr(Tensor, name, read)
                got = predict_weights(optimizer, 3, kind=kind, **half_seen(optimizer, kind))
            close(got, expected)


def close(first: list[Tensor], second: list[Tensor]) -> None:
    """Capturable steps count in float32 and compute their bias corrections in it."""
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
