"""Where a stage comes from: what ``partition`` notes on the modules that it returns, so that nobody has to pass it on by hand.

The note is a plain attribute of the module: it enters no ``state_dict``, is copied with the module, stays when the module moves to
another device, and is found again inside wrappers (DDP, ``torch.compile``, an ``nn.Sequential`` around the stage).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from pipeoptim.engine.stage.tied import Tied

_NOTE = "_pipeoptim_origin"
_CUT_FROM: WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = WeakKeyDictionary()


@dataclass(frozen=True)
class StageOrigin:
    """What is known of a stage.

    Attributes:
        k, depth: which stage of how many.
        lengths: blocks of every stage; empty where no ``partition`` has counted them.
        names: name in the whole model's ``state_dict`` -> name in the stage's; None where nobody knows.
        tied: all weights of the whole model that several stages use: a process that holds one stage must know its partners.
        files: what describes the whole model beside its weights, name of the file -> text, as ``from_pretrained`` reads it.
    """

    k: int
    depth: int
    lengths: tuple[int, ...] = ()
    names: Mapping[str, str] | None = None
    tied: tuple[Tied, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def note_origins(stages: Sequence[nn.Module], origins: Sequence[StageOrigin]) -> None:
    """Note on each of ``stages`` where it comes from."""
    for stage, origin in zip(stages, origins, strict=True):
        setattr(stage, _NOTE, origin)


def note_cut_model(stages: Sequence[nn.Module], whole: nn.Module) -> None:
    """Remember that ``stages`` hold the weights of ``whole``. A copy of a stage holds its own, so that this does not go with it."""
    for stage in stages:
        _CUT_FROM[stage] = weakref.ref(whole)


def find_cut_model(module: nn.Module) -> nn.Module | None:
    """The model that ``module``, or a stage inside it, was cut from, where that is still there."""
    known = (_CUT_FROM.get(part) for _, part, _ in find_origins(module))
    return next((whole for whole in (ref() for ref in known if ref is not None) if whole is not None), None)


def note_ties(stages: Sequence[nn.Module], tied: Sequence[Tied]) -> None:
    """Note on each of ``stages`` that ``tied`` are copies of one weight; what else is noted there stays."""
    for k, stage in enumerate(stages):
        before = vars(stage).get(_NOTE) or StageOrigin(k, len(stages))
        setattr(stage, _NOTE, replace(before, tied=(*before.tied, *tied)))


def find_origins(module: nn.Module) -> Iterator[tuple[str, nn.Module, StageOrigin]]:
    """Path, module and origin of the stages that ``module`` is or, where they are wrapped, has inside."""
    inside: tuple[str, ...] = ()
    for path, part in module.named_modules():
        # A stage may consist of stages of an earlier cut: what holds is the newest, which is around them.
        if _NOTE in vars(part) and not path.startswith(inside):
            yield path, part, vars(part)[_NOTE]
            if not path:
                return
            inside = (*inside, f"{path}.")
