"""Command lines drawn from the application itself: its commands, their parameters and types, and the words of their help."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer

from pipeoptim.cli.app import build
from pipeoptim.methods import METHODS

NUMBERS = ["1", "2", "3", "4"]
ODD_NUMBERS = ["0", "-1", "1e3", "2.5", "nan", "inf", "1000000", str(2**31), str(2**63), str(10**30), "", "½", "٣", "many"]
FRACTIONS = ["0.1", "0.5", "1", "2"]
ODD_FRACTIONS = ["0", "-1", "-0.0", "nan", "inf", "-inf", "1e300", "1e-320", str(10**400), "", "fast"]
ODD_WORDS = [
    *(
        "",
        " ",
        "x",
        "1",
        "-1",
        "nan",
        ",",
        "a,b",
        ",,x",
        "(",
        "pipemare(x=1)",
        "pipemare(",
        "pipemare(synchronous_updates='a')",
    ),
    *(
        ":",
        "a:",
        ":b",
        "os:system",
        "os:path",
        "small_recipe:model",
        "small_recipe:Task",
        "file.py:X",
        "garbage.json:x",
        "=",
        "a=1",
    ),
    *(
        "ü∆\u202e",
        "\n",
        "a" * 3000,
        "../..",
        "/",
        "--help",
        "None",
        "{}",
        "lr=nan",
        "ndim=2,lr=0.1",
        "mlp=4",
        "0,1",
        "%s",
        "[red]",
    ),
]


class CommandLines:
    """Draws arguments of ``pipeoptim``.

    Args:
        rng: where chance comes from.
        paths: files and folders of all sorts, and names of what is not there.
        runs: names of run directories.
    """

    def __init__(self, rng: random.Random, paths: list[str], runs: list[str]) -> None:
        self.rng, self.paths, self.runs = rng, paths, runs
        self.commands = list(_leaves(typer.main.get_command(build()), ()))

    def draw(self) -> list[str]:
        """A command with up to five of its parameters."""
        rng = self.rng
        path, command = rng.choice(self.commands)
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        chosen = rng.sample(options, min(len(options), rng.choice((0, 1, 1, 2, 3, 5))))
        recipe = next((p for p in options if p.name == "recipe"), None)
        if recipe is not None and recipe not in chosen and not any(p.name == "model" for p in chosen):
            chosen.append(recipe)  # the default one takes minutes
        words = [word for p in chosen for word in self._option(p)]
        words += [self._value(p) for p in command.params if p.param_type_name == "argument" and rng.random() < 0.9]
        if rng.random() < 0.03:
            words.insert(rng.randrange(len(words) + 1), rng.choice(ODD_WORDS))
        return [*path, *words]

    def _option(self, parameter: Any) -> Iterator[str]:
        name = parameter.opts[0]
        if parameter.is_flag:
            yield self.rng.choice([name, *parameter.secondary_opts])
            return
        for _ in range(self.rng.choice((1, 1, 2)) if parameter.multiple else 1):
            value = self._value(parameter)
            if self.rng.random() < 0.2 or value.startswith("-"):
                yield f"{name}={value}"
            else:
                yield from (name, value)

    def _value(self, parameter: Any) -> str:
        rng, kind = self.rng, _type(parameter)
        odd = rng.random() < 0.35
        if kind is int:
            return rng.choice(ODD_NUMBERS if odd else NUMBERS)
        if kind is float:
            return rng.choice(ODD_FRACTIONS if odd else FRACTIONS)
        if kind is Path:
            return rng.choice([*self.paths, *ODD_WORDS] if odd else self.paths)
        if parameter.name == "recipe":
            return rng.choice(ODD_WORDS) if rng.random() < 0.1 else "small_recipe:recipe"
        if odd:
            return rng.choice(ODD_WORDS)
        named = rng.choice(("method", "run", "help"))
        if named == "method" and "method" in (parameter.name, parameter.name + "s", "name"):
            return rng.choice(list(METHODS))
        if named == "run" and parameter.name == "name":
            return rng.choice(self.runs)
        return rng.choice(re.findall(r"[\w:.=,]*\w", parameter.help or "") or ODD_WORDS)


def _type(parameter: Any) -> Any:
    """Python's type of one value; typer keeps it in one of two places, depending on its release."""
    if hasattr(parameter, "type_descriptor"):
        annotation = parameter.type_descriptor.annotation
        return next(iter(get_args(annotation)), annotation)
    return {"integer": int, "float": float, "path": Path}.get(parameter.type.name, str)


def _leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command, also those of groups."""
    if not hasattr(command, "commands"):
        yield path, command
    else:
        for name, inner in command.commands.items():
            yield from _leaves(inner, (*path, name))
