"""What users write as ``name``, ``name(option=value, ...)`` or ``module:Class(option=value)``, and several of these between commas."""

from __future__ import annotations

import ast
import re
from typing import Any, NamedTuple

from pipeoptim.errors import ConfigError


class NamedCall(NamedTuple):
    """A name, and the options that it is called with."""

    name: str
    options: dict[str, Any]


def read_call(what: str, text: str) -> NamedCall:
    """One of them.

    Raises:
        ConfigError: another form, or options that are no literals.

    Example:
        >>> read_call("callback", "early_stopping(patience=3)")
        NamedCall(name='early_stopping', options={'patience': 3})
    """
    name, bracket, rest = text.strip().partition("(")
    try:
        # Literals only, never eval: the text may come from a configuration that somebody else wrote.
        call = ast.parse(f"f({rest}" if bracket else "f()", mode="eval").body
        assert name.strip() and isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        return NamedCall(name.strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, ValueError, AssertionError):
        raise ConfigError(f"{what} {text!r} cannot be read; write it as name(option=value, ...)") from None


def read_calls(what: str, text: str) -> list[NamedCall]:
    """All of them; none for ``""``.

    Raises:
        ConfigError: as :func:`read_call`.

    Example:
        >>> [name for name, _ in read_calls("logger", "wandb(project='a,b'), mlflow")]
        ['wandb', 'mlflow']
    """
    parts = re.split(r",(?![^(]*\))", text)  # a comma between brackets separates options
    return [read_call(what, part) for part in parts] if text.strip() else []
