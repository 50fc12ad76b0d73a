"""A configuration as a file that people write: what ``--config`` reads and ``--print-config`` prints.

TOML, or, where its name ends in ``.json``, the form of the ``config.json`` of a run. It may be a whole configuration, or say only what
is changed of a recipe. The functions that it names are called: it is trusted as a script is.
"""

from __future__ import annotations

import json
import re
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeoptim.config import FIELDS, SETTINGS, Component, TrainConfig, read_fields
from pipeoptim.errors import ConfigError
from pipeoptim.files import cause_of, read_text
from pipeoptim.train.change_method import with_method
from pipeoptim.train.recipes import chosen_config, get_recipe
from pipeoptim.train.set_options import with_set
from pipeoptim.train.trust import COMPONENTS

WHOLE = ("model", "data", "optimizer")
"""A file that has all of these needs no recipe."""


def read_config_file(path: Path, recipe: str | None, tiny: bool, default: str) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration that a file means, and what it says itself.

    Args:
        recipe: what the file changes, where the command line names it; by default what the file names, and else ``default``.
        tiny: the recipe's tiny form.

    Raises:
        ConfigError: the file cannot be read, is not of this form, or has a field that is unknown or of another type.
    """
    given, options = _fields_in(path)
    if all(name in given for name in WHOLE):
        if recipe is not None or tiny:
            raise ConfigError(
                f"{path} has model, data and optimizer of its own, so there is no recipe to change; leave "
                f"{'--recipe' if recipe is not None else '--tiny'} out"
            )
        base = TrainConfig(path.stem, given["model"], given["data"], given["optimizer"])
    else:
        base = get_recipe(given.get("recipe", default) if recipe is None else recipe, tiny)
        given.pop("recipe", None)
    if "method" in given:
        base = with_method(base, given["method"])
    merged = {name: getattr(base, name).with_options(**own) for name, own in options.items()}
    return replace(base, **merged, **given), given


def chosen_run(
    recipe: str | None,
    tiny: bool,
    config_file: Path | None,
    model: str | None,
    data: str | None,
    default: str,
    settings: Sequence[str] = (),
) -> tuple[TrainConfig, dict[str, Any]]:
    """What a command starts from, and what its configuration file says itself.

    Args:
        recipe, tiny, model, data, default: as for :func:`~pipeoptim.train.recipes.chosen_config`.
        config_file: what changes the recipe, or is a run of its own.
        settings: of ``--set``, which go before the file.

    Raises:
        ConfigError: as the functions that read these.
    """
    in_file: dict[str, Any] = {}
    if config_file is None:
        config = chosen_config(recipe, tiny, model, data, default)
    else:
        config, in_file = read_config_file(config_file, recipe, tiny, default)
        named = (("model", model), ("data", data))
        parts: dict[str, Any] = {what: Component(target) for what, target in named if target is not None}
        config = replace(config, **parts)
    return with_set(config, settings), in_file


def _fields_in(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The fields in a file; and apart, of components of which it has no target, the options."""
    try:
        text = read_text(path)
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({cause_of(error)}); check --config") from error
    except (ValueError, RecursionError) as error:
        form = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path} is not {form} ({error}); correct it, or print one with --print-config") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is a {type(data).__name__}, must have the fields of a run; print them with --print-config")
    alone = {name for name, value in data.items() if name in COMPONENTS and isinstance(value, dict) and [*value] == ["options"]}
    options = {name: data.pop(name)["options"] for name in alone}
    try:
        given = read_fields(data)
        named = [value.options for value in given.values() if isinstance(value, Component)]
        json.dumps([*named, *options.values()], allow_nan=False)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} has an option that does not fit into JSON ({error}); use numbers, strings and lists"
        ) from error
    if wrong := next((name for name, value in options.items() if not isinstance(value, dict)), None):
        raise ConfigError(f"{path}: options of {wrong} is {options[wrong]!r}, must be a table, for example {{ lr = 0.1 }}")
    return given, options


def to_toml(config: TrainConfig) -> str:
    """``config`` as TOML, each setting below what it means.

    Raises:
        ConfigError: an option is None, which TOML does not have.

    Example:
        >>> config = TrainConfig("mine", model=Component("m:f"), data=Component("d:f"), optimizer=Component("sgd", {"lr": 0.1}))
        >>> to_toml(config).splitlines()[-7:-4]
        ['[optimizer]', 'target = "sgd"', 'options = { lr = 0.1 }']
    """
    values = {f.name: getattr(config, f.name) for f in FIELDS}
    lines = []
    for name, value in values.items():
        if not isinstance(value, Component) and value is not None:
            lines += (
                textwrap.wrap(SETTINGS[name].help, 100, initial_indent="# ", subsequent_indent="# ") if name in SETTINGS else []
            )
            lines += [f"{name} = {_value(name, value)}", ""]
    for name, value in values.items():  # tables come last, or they would take the other fields in
        if isinstance(value, Component):
            target, options = _value(name, value.target), _value(f"options of {name}", value.options)
            lines += [f"[{name}]", f"target = {target}", f"options = {options}", ""]
    return "\n".join(lines)


def _value(name: str, value: Any) -> str:
    """One value, on one line. JSON writes strings, numbers and booleans as TOML does, but for one character."""
    if value is None:
        raise ConfigError(f"{name} has None, which TOML cannot say; leave that option out")
    if isinstance(value, Mapping):
        pairs = [f"{_key(str(key))} = {_value(name, one)}" for key, one in value.items()]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(name, one) for one in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name, name)
