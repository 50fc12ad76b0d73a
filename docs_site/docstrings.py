"""Docstrings for the API reference as ``help()`` shows them, which static analysis does not see, with links in place of Sphinx's roles."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe

import pipeoptim

ROLE = re.compile(r":[a-z]+:`(~?)(?:([^`<]+) <)?([\w.]+)>?`")  # :class:`~path`, :class:`title <path>`
CODE = re.compile(r"``([^`]+)``")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Runs once the whole package was read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for name in pipeoptim.__all__:
            if inspect.isclass(getattr(pipeoptim, name)):
                _as_help_shows_it(pkg[name].final_target if pkg[name].is_alias else pkg[name], getattr(pipeoptim, name))
        _replace_roles(pkg)


def _as_help_shows_it(found: Any, thing: Any) -> None:
    """Classes that take options have a docstring and a signature that are made when they are imported."""
    if found.docstring is not None:
        found.docstring.value = inspect.getdoc(thing) or ""
    if "__signature__" not in vars(vars(thing).get("__init__", object)):
        return
    init = found.members["__init__"]
    kinds = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
        inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    }
    init.parameters = griffe.Parameters(
        *(
            griffe.Parameter(
                one.name,
                annotation=None if one.annotation is one.empty else str(one.annotation),
                kind=kinds[one.kind],
                default=None if one.default is one.empty else repr(one.default),
            )
            for one in inspect.signature(thing.__init__).parameters.values()
        )
    )


def _replace_roles(found: Any) -> None:
    if found.docstring is not None:
        found.docstring.value = _for_griffe(found.docstring.value)
    for member in found.members.values():
        if not member.is_alias:
            _replace_roles(member)


def without_roles(text: str) -> str:
    """Links where a role names something public, else code.

    >>> without_roles("see :class:`~pipeoptim.Clip` and :func:`len`, not ``x``")
    'see [`Clip`][pipeoptim.Clip] and `len`, not `x`'
    >>> without_roles(":meth:`eval_step <pipeoptim.Emulator.eval_step>`")
    '[`eval_step`][pipeoptim.Emulator.eval_step]'
    """
    return CODE.sub(r"`\1`", ROLE.sub(_link, text))


def _for_griffe(text: str) -> str:
    """As griffe reads it: it knows a section of this name in the plural only."""
    return EXAMPLE.sub(r"\1Examples:", without_roles(text))


def _link(found: re.Match[str]) -> str:
    short, title, path = found.groups()
    shown = title or (path.rsplit(".", 1)[-1] if short else path)
    return f"[`{shown}`][{path}]" if _is_public(path) else f"`{shown}`"


def _is_public(path: str) -> bool:
    first, *rest = path.split(".")
    if first != "pipeoptim" or not rest or rest[0] not in pipeoptim.__all__:
        return False
    thing: Any = importlib.import_module(first)
    for name in rest:
        thing = getattr(thing, name, None)
    return thing is not None and not inspect.ismodule(thing) and rest[0] != "METHODS"
