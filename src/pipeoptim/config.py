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
from pipeoptim.options import Option, document, option_named
from pipeoptim.options.checks import one_of

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


@dataclass(frozen=True)
class Setting:
    """What is known of a field of :class:`TrainConfig` besides its name, type and default.

    Args:
        help: its meaning, in plain words.
        least, most: bounds of a whole number.
        choices: of a name.
        optional: whether an empty name stands for none.
        offered: whether ``pipeoptim train`` has an option for it.
        computes: whether it changes what a run computes. What does not may differ in the two halves of a resumed run.
        option: the option of pipelines that it is.
    """

    help: str
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    offered: bool = True
    computes: bool = True
    option: Option | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError for a value out of bounds, that is none of the choices, or that the pipeline's option does not take."""
        if self.least is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < self.least:
                raise ConfigError(f"{name} is {value!r}, must be an integer of at least {self.least}")
            if self.most is not None and value > self.most:
                raise ConfigError(f"{name} is {value}, must be at most {self.most}")
        if self.optional and value not in ("", *self.choices):
            wanted = " or ".join(map(repr, self.choices))
            raise ConfigError(f"{name} is {value!r}, must be {wanted}, or '' for none{did_you_mean(value, self.choices)}")
        if self.choices and not self.optional:
            one_of(self.choices)(name, value)
        if self.option is not None:
            self.option.check(name, value)


def setting(default: Any, help: str, **known: Any) -> Any:
    """A field of :class:`TrainConfig`; ``known``: see :class:`Setting`."""
    return field(default=default, metadata={"setting": Setting(help, **known)})


def pipeline_option(name: str) -> Any:
    """A field that is an option of every pipeline under the same name: default, meaning and check are those of the option."""
    default, option = option_named(name)
    return setting(default, option.help[0].upper() + option.help[1:], option=option)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run. Each field is described once, here; the command line derives its options from it.

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
    method: str = setting("pipeoptim", "Training method, for example pipeoptim, pipedream, gpipe, 1f1b, naive.")
    prediction: str = pipeline_option("prediction")
    stages: int = setting(4, "Depth: pieces that the model is cut into.", least=1)
    microbatches: int = setting(1, "Micro-batches per mini-batch; must divide the batch size.", least=1)
    batch_size: int = setting(
        32,
        "Samples per mini-batch, that is, per update, of all replicas together: a multiple of micro-batches x replicas.",
        least=1,
    )
    chunks: int = setting(
        1,
        "Stages per process, in an interleaved order; for layers that cost unevenly. Processes: stages / chunks x replicas.",
        least=1,
    )
    replicas: int = setting(
        1,
        "Copies of the pipeline, each for its part of every mini-batch (data parallel); with --engine processes, whose number is "
        "then stages / chunks x replicas.",
        least=1,
    )
    overlap: bool = pipeline_option("overlap")
    uneven: bool = pipeline_option("uneven")
    recompute: str = setting(
        "",
        "Activation checkpointing: keep the inputs of blocks only, and run blocks again in the backward, on its weights (backward) "
        "or, exactly, on those of the first forward (forward).",
        choices=("backward", "forward"),
        optional=True,
    )
    steps: int = setting(
        300,
        "Mini-batches to train on; the recipe's warm-up takes a quarter of them at most. With --resume: train a finished run "
        "further.",
        least=0,
        computes=False,
    )
    epochs: int = setting(
        0,
        "Where steps is 0: passes over the training examples, which are counted in steps when the data is read (config.json of the run "
        "has the number).",
        least=0,
        offered=False,
        computes=False,
    )
    seed: int = setting(0, "Of the initial weights, the data order and dropout.", least=0, most=2**32 - 1)
    engine: str = setting(
        "emulator",
        "emulator: all stages in this process. processes: one process per stage (but see --chunks).",
        choices=ENGINES,
        computes=False,
    )
    eval_every: int = setting(50, "Steps between validations; 0: only at the end.", least=0, computes=False)
    eval_batches: int = setting(
        8, "Batches of each validation, spread over the validation set.", least=1, offered=False, computes=False
    )
    checkpoint_every: int = setting(
        100, "Steps between checkpoints, at each of which the pipeline drains; 0: only at the end.", least=0
    )
    keep_checkpoints: int = setting(2, "How many of the newest checkpoints are kept.", least=1, offered=False, computes=False)
    threads: int = setting(1, "CPU threads of each process.", least=1, most=1024)
    clip: float = setting(0.0, "Largest norm of the gradients; 0: no clipping.")
    clip_scope: str = setting(
        "global_delayed",
        "Whose norm: stage, global (waits for all stages) or global_delayed (the default).",
        choices=("stage", "global", "global_delayed"),
    )
    autocast: str = setting(
        "",
        "bfloat16: compute forward and loss in it where torch.autocast does.",
        choices=("bfloat16",),
        optional=True,
    )
    compress: str = setting(
        "",
        "bf16 or int8: activations and their gradients pass between stages in fewer bytes.",
        choices=("bf16", "int8"),
        optional=True,
    )
    error_feedback: str = setting(
        "none",
        "With --compress, add what a message lost to the next one: none, gradients, activations or both.",
        choices=("none", "gradients", "activations", "both"),
    )
    monitor_every: int = setting(
        0,
        "Steps between measurements of the prediction error, for metrics.jsonl and the summary; 0: none.",
        least=0,
        computes=False,
    )
    tensorboard: bool = setting(False, "Also write the figures to runs/<name>/tensorboard.", computes=False)
    trace: bool = setting(
        False,
        "Also record what every stage does and when, to runs/<name>/trace: idle shares, Perfetto, a picture.",
        computes=False,
    )
    trace_steps: int = setting(200, "Record this many mini-batches instead of 200.", least=1, computes=False)

    def to_json(self) -> str:
        """Indented JSON, keys in the order of the fields.

        Raises:
            ConfigError: an option is not a JSON value.
        """
        try:
            return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
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


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(TrainConfig) if "setting" in f.metadata}
"""By name of the field."""

document(TrainConfig, [(name, known.help) for name, known in SETTINGS.items()])

NOT_COMPUTED = tuple(name for name, known in SETTINGS.items() if not known.computes)
"""What may change between the two halves of a resumed run without changing what it computes."""


def _from_dict(data: dict[str, Any]) -> TrainConfig:
    known = {f.name: f for f in fields(TrainConfig)}
    unknown = sorted(set(data) - set(known))
    missing = sorted(name for name in ("recipe", "model", "data", "optimizer") if name not in data)
    for what, names in (("unknown", unknown), ("missing", missing)):
        if names:
            raise ConfigError(f"the configuration has {what} fields: {', '.join(names)}; known: {', '.join(known)}")
    return TrainConfig(**{name: _value(name, str(known[name].type), value) for name, value in data.items()})


def _value(name: str, kind: str, value: Any) -> Any:
    if kind == "Component":
        if isinstance(value, dict) and set(value) <= {"target", "options"} and isinstance(value.get("target"), str):
            return Component(value["target"], dict(value.get("options") or {}))
        raise ConfigError(f'{name} is {value!r} in the configuration, must be {{"target": ..., "options": {{...}}}}')
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
