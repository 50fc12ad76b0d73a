"""The configuration of a run, one frozen, complete value that survives a JSON round trip, and the recipes that return one.

Nothing here imports torch, so that the command line answers at once. Checks are in ``pipeoptim.train.checks``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from pipeoptim.errors import ConfigError, did_you_mean
from pipeoptim.named_calls import read_calls
from pipeoptim.options import RUN_SETTINGS, RunOptions, Setting, document, setting
from pipeoptim.options.checks import is_finite_number

__all__ = ["ENGINES", "Component", "Recipe", "TrainConfig", "recipe"]

ENGINES = ("emulator", "processes")

#: Called with nothing; with ``tiny=True`` where it has such an argument.
Recipe = Callable[..., "TrainConfig"]
_R = TypeVar("_R", bound=Recipe)


@dataclass(frozen=True)
class Component:
    """A part of a run by name, so that it fits into JSON: ``target`` called with ``options``.

    Args:
        target: ``"module:function"``, or a short name where there is a registry (optimizers, schedules).
        options: keyword arguments; numbers, strings, booleans, lists and None only.

    Example:
        >>> Component("torch.nn:Linear", {"in_features": 2, "out_features": 3}).target
        'torch.nn:Linear'
    """

    target: str
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Component:
        """The same component with some options replaced or added."""
        return replace(self, options={**self.options, **options})


def read_cut(text: str) -> tuple[int, ...]:
    """``"3,2,2,1"``: how many blocks each stage has; ``()`` for ``""``.

    Raises:
        ConfigError: another form.

    Example:
        >>> read_cut("3,2")
        (3, 2)
    """
    try:
        found = tuple(map(int, text.split(","))) if text else ()
    except (AttributeError, ValueError):
        found = (0,)
    if any(length < 1 for length in found):
        raise ConfigError(f"cut is {text!r}, must be how many blocks each stage has, each at least one: 3,2,2,1")
    return found


def read_ramp(text: str, name: str = "the schedule") -> dict[int, int]:
    """``"0:1,2000:8"``: from which mini-batch on which number holds; ``{}`` for ``""``.

    Raises:
        ConfigError: another form, or mini-batches that do not rise.

    Example:
        >>> read_ramp("0:1,2000:8")
        {0: 1, 2000: 8}
    """
    try:
        pairs = [tuple(map(int, part.split(":"))) for part in text.split(",")] if text else []
        found = {pair[0]: pair[1] for pair in pairs}
    except (AttributeError, ValueError, IndexError):
        pairs, found = [(1,)], {}
    known = all(len(pair) == 2 and pair[0] >= 0 and pair[1] >= 1 for pair in pairs)
    if not known or [pair[0] for pair in pairs] != sorted(found):
        raise ConfigError(
            f"{name} is {text!r}, must be mini-batches and numbers, MINI_BATCH:NUMBER, the mini-batches rising: 0:1,2000:8"
        )
    return found


def read_signals(text: str) -> tuple[int, ...]:
    """``"TERM,USR1"``: the numbers of these signals; ``()`` for ``""``.

    Raises:
        ConfigError: a name that is no signal, or a signal that no process can catch, or Ctrl-C's, which stops a run anyway.

    Example:
        >>> read_signals("TERM")
        (15,)
    """
    import signal

    names = [name.strip().upper().removeprefix("SIG") for name in text.split(",")] if text else []
    found = [getattr(signal, f"SIG{name}", None) for name in names]
    known = all(isinstance(number, signal.Signals) for number in found)
    if not known or {"KILL", "STOP", "CONT", "CHLD", "INT"} & set(names):
        raise ConfigError(
            f"stop_signals is {text!r}, must be names of signals that a process can catch, such as TERM,USR1; INT (Ctrl-C) always is one"
        )
    return tuple(dict.fromkeys(int(number) for number in found if number is not None))


def check_power(name: str, value: Any) -> None:
    """Raises ConfigError unless ``value`` is a number of 0 to 4."""
    if not is_finite_number(value) or not 0 <= value <= 4:
        raise ConfigError(f"{name} is {value!r}, must be a number of 0 to 4")


def own_setting(default: Any, help: str, **known: Any) -> Any:
    """A setting of a run that is no option of pipelines; ``known``: see :class:`~pipeoptim.options.Setting`."""
    return setting(Setting(default, help, **known))


@dataclass(frozen=True)
class TrainConfig(RunOptions):
    """Everything that determines a training run. Each field is described once, here or, where it is an option of pipelines, in
    ``pipeoptim.options``; the command line derives its options from it.

    Args:
        recipe: name of the recipe that it came from; information only.
        model: returns the model, an ``nn.Sequential`` (or another container with slicing).
        data: returns the task: batches, loss and metrics. It gets ``seed`` if it has such an argument.
        optimizer: short name (``"adamw"``) or ``"module:Class"``; one is made per stage.
        lr_schedule: ``constant``, ``cosine``, ``milestones``, ``step`` or ``"module:function"``; advances once per update.
        options: all other fields, see below.

    Example:
        >>> config = TrainConfig("mine", model=Component("m:f"), data=Component("d:f"), optimizer=Component("sgd"))
        >>> TrainConfig.from_json(config.to_json()) == config
        True
    """

    recipe: str
    model: Component
    data: Component
    optimizer: Component
    lr_schedule: Component = Component("constant")
    method: str = own_setting(
        "pipeoptim", "Training method, for example pipeoptim, pipedream, gpipe, 1f1b, naive; or auto, see pipeoptim advise."
    )
    stages: int = own_setting(4, "Depth: pieces that the model is cut into.", least=1)
    cut: str = own_setting(
        "",
        "Blocks of each stage, as 3,2,2,1; by default even numbers of parameters. With --resume: cut anew, in a run of its own.",
        check_value=lambda _, value: read_cut(value),
    )
    microbatches: int = own_setting(1, "Micro-batches per mini-batch; must divide the batch size.", least=1)
    batch_size: int = own_setting(
        32,
        "Samples per mini-batch, that is, per update, of all replicas together: a multiple of micro-batches x replicas.",
        least=1,
    )
    microbatches_schedule: str = own_setting(
        "",
        "Micro-batches that change in mid-run, as 0:1,2000:8: 1 up to mini-batch 1999, 8 from there on (before the first, --microbatches "
        "holds). The pipeline drains there, and version gaps follow; learning rates do not.",
        check_value=lambda name, value: read_ramp(value, name),
    )
    batch_size_schedule: str = own_setting(
        "",
        "Batch sizes that change in mid-run, as 0:32,1000:64; validations keep --batch-size.",
        check_value=lambda name, value: read_ramp(value, name),
    )
    rate_by_gap: float = own_setting(
        0.0,
        "p of a lower learning rate where gradients are older: that of a stage with version gap s is divided by (1+s)^p. 0: one for all "
        "stages. For M = 1, where 0.75 was the best of three tried; the rate itself may then be higher.",
        check_value=check_power,
    )
    chunks: int = own_setting(
        1,
        "Stages per process, in an interleaved order; for layers that cost unevenly. Processes: stages / chunks x replicas.",
        least=1,
    )
    replicas: int = own_setting(
        1,
        "Copies of the pipeline, each for its part of every mini-batch (data parallel); with --engine processes, whose number is "
        "then stages / chunks x replicas.",
        least=1,
    )
    steps: int = own_setting(
        300,
        "Mini-batches to train on; the recipe's warm-up takes a quarter of them at most. With --resume: train a finished run "
        "further.",
        least=0,
        computes=False,
    )
    epochs: int = own_setting(
        0,
        "Where steps is 0: passes over the training examples, which are counted in steps when the data is read (config.json of the run "
        "has the number).",
        least=0,
        offered=False,
        computes=False,
    )
    seed: int = own_setting(0, "Of the initial weights, the data order and dropout.", least=0, most=2**32 - 1)
    engine: str = own_setting(
        "emulator",
        "emulator: all stages in this process. processes: one process per stage (but see --chunks).",
        choices=ENGINES,
        computes=False,
    )
    eval_every: int = own_setting(50, "Steps between validations; 0: only at the end.", least=0, computes=False)
    eval_batches: int = own_setting(
        8, "Batches of each validation, spread over the validation set.", least=1, offered=False, computes=False
    )
    checkpoint_every: int = own_setting(
        100, "Steps between checkpoints, at each of which the pipeline drains; 0: only at the end.", least=0
    )
    saving: str = own_setting(
        "background",
        "background: checkpoints are copied to host memory and written while training goes on. wait: training waits, and needs no memory "
        "for the copy; with --survive it always does.",
        choices=("background", "wait"),
        computes=False,
    )
    keep_checkpoints: int = own_setting(
        2, "How many of the newest checkpoints are kept.", least=1, offered=False, computes=False
    )
    threads: int = own_setting(1, "CPU threads of each process.", least=1, most=1024)
    survive: int = own_setting(
        0,
        "With --engine processes: a process that dies is replaced while the others wait, by the image of itself that it left every so many "
        "mini-batches; 0: the run ends. The weights are those of an undisturbed run, bit for bit.",
        least=0,
        computes=False,
    )
    max_restarts: int = own_setting(
        0,
        "How often a run whose processes fail starts them again by itself, from the newest checkpoint, bit for bit. An emulated run gets a "
        "process of its own for it.",
        least=0,
        computes=False,
    )
    stop_signals: str = own_setting(
        "TERM,USR1",
        "Signals after which a run saves and ends, with exit code 128 + their number; sent to any of its processes or to all. The same "
        "command again goes on.",
        computes=False,
        check_value=lambda _, value: read_signals(value),
    )
    grace: int = own_setting(
        30,
        "Seconds that a run has after such a signal. It stops at the next checkpoint if that comes in time, else after the next "
        "mini-batch.",
        least=0,
        computes=False,
    )
    export: bool = own_setting(
        False,
        "When training ends, write the weights to runs/<name>/model as safetensors. For a model of Transformers that is a folder for "
        "from_pretrained.",
        computes=False,
    )
    callbacks: str = own_setting(
        "",
        "What is called at the run's events: early_stopping(patience=5), best_checkpoint, or module:Class of your own; several between "
        "commas.",
        computes=False,
        check_value=lambda _, value: read_calls("callback", value),
    )
    loggers: str = own_setting(
        "",
        "Where the figures go besides metrics.jsonl: tensorboard, wandb(project='mine'), mlflow, trackio, or module:Class of your own; "
        "several between commas.",
        computes=False,
        check_value=lambda _, value: read_calls("logger", value),
    )
    tensorboard: bool = own_setting(
        False, "Also write the figures to runs/<name>/tensorboard, as --loggers tensorboard does.", computes=False
    )

    def to_json(self) -> str:
        """Indented JSON, keys in the order of the fields.

        Raises:
            ConfigError: an option is not a JSON value.
        """
        values = asdict(self)
        try:
            return json.dumps({f.name: values[f.name] for f in FIELDS}, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the configuration does not fit into JSON ({error}); "
                "use finite numbers, strings, booleans, lists and None in the options of components"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The configuration that ``to_json`` wrote.

        Raises:
            ConfigError: not JSON, or fields that are missing, unknown or of another type.
        """
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise ConfigError("the configuration is nested too deeply; restore it, or start a new run") from error
        except ValueError as error:
            raise ConfigError(f"the configuration is not JSON ({error}); restore it, or start a new run") from error
        if not isinstance(data, dict):
            raise ConfigError(f"the configuration is {type(data).__name__}, must be a JSON object with the fields of a run")
        return _from_dict(data)

    def fingerprint(self) -> str:
        """SHA-256 of all that determines the weights: equal where one run may continue the other."""
        data = {name: value for name, value in asdict(self).items() if name not in NOT_COMPUTED}
        for f in fields(self):  # so that a later version, with more fields, can still continue this run
            if f.name in data and getattr(self, f.name) == f.default:
                del data[f.name]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


FIELDS = tuple(sorted(fields(TrainConfig), key=lambda f: f.name in RUN_SETTINGS))
"""In the order of files and of the command line's help: those of a run, then the options of its pipeline."""

SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in FIELDS if "setting" in f.metadata}
"""By name of the field."""

document(TrainConfig, [(name, known.help) for name, known in SETTINGS.items()])

NOT_COMPUTED = tuple(name for name, known in SETTINGS.items() if not known.computes)
"""What may change between the two halves of a resumed run without changing what it computes."""


def _from_dict(data: dict[str, Any]) -> TrainConfig:
    found = read_fields(data)
    missing = sorted(name for name in ("recipe", "model", "data", "optimizer") if name not in data)
    if missing:
        raise ConfigError(f"the configuration has missing fields: {', '.join(missing)}; add them, or start a new run")
    return TrainConfig(**found)


def read_fields(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration, perhaps not all of them, from plain data.

    Raises:
        ConfigError: fields that are unknown or of another type.
    """
    known = {f.name: f for f in FIELDS}
    unknown = sorted(set(data) - set(known))
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise ConfigError(f"the configuration has unknown fields: {', '.join(unknown)}{hint or ';'} known: {', '.join(known)}")
    return {name: _value(name, str(known[name].type), value) for name, value in data.items()}


def _value(name: str, kind: str, value: Any) -> Any:
    if kind == "Component":
        if isinstance(value, dict) and set(value) <= {"target", "options"} and isinstance(value.get("target"), str):
            return Component(value["target"], dict(value.get("options") or {}))
        raise ConfigError(f'{name} is {value!r} in the configuration, must be {{"target": ..., "options": {{...}}}}')
    kind, _, empty = kind.partition(" | ")
    if empty and value is None:
        return None
    wanted = {"str": str, "int": int, "float": float, "bool": bool}[kind]
    if kind == "float" and type(value) is int:
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{name} is {value!r} in the configuration, must be of type {kind}")
    return value


def recipe(function: _R) -> _R:
    """Mark a function as a recipe: it returns a complete :class:`TrainConfig`, and its name is what users type.

    It needs no argument. One that has an argument ``tiny: bool = False`` has a tiny form as well: the same kind of model,
    optimizer and schedule, small enough for a minute on two cores and with data that need no download.

    The first line of its docstring is shown in lists. Recipes are found in every module of the packages named by the
    entry-point group ``pipeoptim.recipes``.

    Raises:
        ConfigError: it has no docstring.
    """
    if not (function.__doc__ or "").strip():
        raise ConfigError(f"recipe {function.__name__} has no docstring; its first line is what lists of recipes show")
    function.__dict__["__pipeoptim_recipe__"] = True
    return function
