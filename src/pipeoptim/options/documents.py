"""Signatures and docstrings that show options where the code says ``**options``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, ForwardRef, TypeVar

from pipeoptim.options.keywords import OptionKeywords, ProcessKeywords
from pipeoptim.options.table import PipelineOptions, about

C = TypeVar("C", bound=type)


def takes_options(names: Sequence[str]) -> Callable[[C], C]:
    """Class decorator of a pipeline: its signature and docstring show the options called ``names`` after its own arguments."""

    def decorate(cls: C) -> C:
        entries = [f for f in fields(PipelineOptions) if f.name in names]
        types = {**OptionKeywords.__annotations__, **ProcessKeywords.__annotations__}
        show_keywords(cls.__dict__["__init__"], [(f.name, f.default, types[f.name]) for f in entries])
        several = "replicas" in names  # processes, which must agree
        return document(cls, [(f.name, f"{about(f).help} {about(f).agreed if several else ''}") for f in entries])

    return decorate


def show_keywords(function: Any, keywords: Iterable[tuple[str, Any, Any]]) -> None:
    """Give ``function`` a signature with ``keywords`` (name, default, type) in place of its ``**``."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shown = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=_text(t)) for n, d, t in keywords]
    function.__signature__ = signature.replace(parameters=[*own, *shown])


def _text(annotation: Any) -> Any:
    """As the code says it, as all others are in a module with postponed annotations."""
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation


def document(cls: C, helps: Iterable[tuple[str, str]]) -> C:
    """Put ``helps`` (name, meaning) in place of the line of the class's docstring that begins with ``options:``."""
    lines = [line for name, text in helps for line in _wrapped(f"{name}: {text}")]
    if cls.__doc__:  # there is none under python -OO
        before, after = _PLACE.split(cls.__doc__, maxsplit=1)
        cls.__doc__ = before + "\n".join(lines) + after
    return cls


_PLACE = re.compile(r"^        options: .*$", re.MULTILINE)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_long_words=False)
