"""Options of the command line that are fields of ``TrainConfig``: their names, types, help, defaults and checks are written there, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from typer import Option

from pipeoptim.config import SETTINGS, TrainConfig, read_ramp
from pipeoptim.errors import ConfigError

F = TypeVar("F", bound=Callable[..., None])

#: Those that commands which train have in common.
OptimizerOption = Annotated[
    str | None,
    Option(
        help="adamw, sgd, ... (any of torch.optim), muon_adamw (Muon for matrices), rotated_adam, module:Class or file.py:Class; one, or "
        "one per stage between commas. Give --lr as well; other options of the recipe's optimizer, such as weight_decay, are kept where "
        "the new one has them."
    ),
]
ModelOption = Annotated[
    str | None,
    Option(
        help="module:function or file.py:function of your own, in this folder or installed, that returns the model, in place of the "
        "recipe's. A model that is no nn.Sequential is cut between its layers."
    ),
]
DataOption = Annotated[
    str | None,
    Option(
        help="module:function or file.py:function that returns the task (batches, loss, metrics), in place of the recipe's. With "
        "--model, no recipe is needed."
    ),
]
ConfigFileOption = Annotated[
    Path | None,
    Option(
        "--config",
        help="TOML file with settings of the run, of a whole run or of what is changed of a recipe, or the config.json of a run; options "
        "given here go before it. The functions that it names are called.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    Option(
        "--set",
        help="Option of the model, the data, the optimizer or the lr_schedule, as data.text=book.txt or model.source.hidden_size=64; may "
        "be given several times. Values are JSON, or else strings.",
    ),
]
LearningRateOption = Annotated[float | None, Option(help="Learning rate.")]
TinyOption = Annotated[bool, Option("--tiny", help="The recipe's tiny form: a minute, and nothing to download.")]

_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def takes_settings(*names: str, after: str, defaults: Mapping[str, Any] | Sequence[str] = (), **helps: str) -> Callable[[F], F]:
    """Decorator of a command ``f(..., **settings)``: it gets an option for each of the fields ``names``, None where it is not given.

    Args:
        names: all that are offered, where none are named.
        after: the command's own option that they follow in its help.
        defaults: what some of them are where they are not given; names alone for what they are in a run.
        helps: what a field means in this command, where that is not what it means in a run.
    """
    offered = names or tuple(name for name, known in SETTINGS.items() if known.offered)
    default = dict(defaults) if isinstance(defaults, Mapping) else {name: SETTINGS[name].default for name in defaults}

    def option(name: str) -> Any:
        help, kind = helps.get(name, SETTINGS[name].help), SETTINGS[name].type_name.partition(" | ")[0]
        if kind == "bool":
            written = name.replace("_", "-")  # --no-: a recipe or a file may have set it
            return Annotated[bool | None, Option(f"--{written}/--no-{written}", help=help)]
        choices = SETTINGS[name].choices
        return Annotated[_TYPES[kind] | None, Option(help=help, autocompletion=_beginning_among(choices) if choices else None)]

    def decorate(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        place = 1 + [p.name for p in own].index(after)
        made = [
            inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default.get(n), annotation=option(n))
            for n in offered
        ]
        shown = [*own[:place], *made, *own[place:]]
        described: Any = command  # typer asks for both
        described.__signature__ = signature.replace(parameters=shown)
        described.__annotations__ = {p.name: p.annotation for p in shown} | {"return": None}
        return command

    return decorate


def _beginning_among(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """What a shell completes to one of ``choices``."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def with_given(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """``config`` with what the command line gives.

    Raises:
        ConfigError: a setting without the one that it says more about, or beside one that leaves it without effect.
    """
    config = replace(config, **given)
    if "microbatches" in given and 0 in read_ramp(config.microbatches_schedule):
        raise ConfigError(
            f"microbatches is {given['microbatches']}, but microbatches_schedule {config.microbatches_schedule!r} says how many there are "
            "from mini-batch 0 on; leave one of them out, or let the schedule begin later"
        )
    for name, value in given.items():
        other, _, wanted = SETTINGS[name].only_with.partition("=")
        if not other or value == SETTINGS[name].default:
            continue
        has = getattr(config, other)
        if has != wanted if wanted else has == SETTINGS[other].default:
            option = f"--{other.replace('_', '-')} {wanted}".strip()
            raise ConfigError(
                f"{name} is {value!r}, which means nothing without {option}; give {option} as well, or leave it out"
            )
    return config


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that were given on the command line, or have a default there.

    Raises:
        ConfigError: a value that its field does not take.
    """
    found = {name: value for name, value in settings.items() if value is not None}
    for name, value in found.items():
        SETTINGS[name].check(name, value)
    return found
