"""What a run is: one frozen, complete, JSON round-trippable configuration, and the recipes that return one.

Nothing here imports torch, so that the command line answers at once. Checks are in ``pipeoptim.train.checks``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from pipeoptim.errors import ConfigError

__all__ = ["ENGINES", "Component", "Recipe", "TrainConfig", "recipe"]

ENGINES = ("emulator", "processes")

#: What may change between the two halves of a resumed run without changing what it computes.
NOT_IN_FINGERPRINT = (
    "engine",
    "steps",
    "epochs",
    "eval_every",
    "eval_batches",
    "keep_checkpoints",
    "monitor_every",
    "tensorboard",
    "trace",
    "trace_steps",
)

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
class TrainConfig:
    """Everything that determines a training run.

    Args:
        recipe: name of the recipe that it came from; information only.
        model: returns the model, an ``nn.Sequential`` (or another container with slicing).
        data: returns the task: batches, loss and metrics. It gets ``seed`` if it has such an argument.
        optimizer: short name (``"adamw"``) or ``"module:Class"``; one is made per stage.
        lr_schedule: ``constant``, ``cosine``, ``milestones``, ``step`` or ``"module:function"``; advances once per update.
        method: a name in ``pipeoptim.METHODS``.
        prediction: kind of weight prediction, for methods that predict.
        stages: depth D. microbatches: M per mini-batch. batch_size: samples per mini-batch, of all replicas together; a multiple of M
            times ``replicas``.
        chunks: stages per process, of stages that are not neighbours: stage k lives on process k mod (stages / chunks).
        replicas: copies of the pipeline, each for its part of every mini-batch; only with ``engine="processes"``.
        overlap: average the gradients of replicas while the next forward runs, at a version gap of one more.
        uneven: batch_size need not be a multiple of M; micro-batches differ by one sample, and each counts by its share.
        recompute: activation checkpointing of every block: it runs again in the backward, on the weights of the ``"backward"`` or of
            the first ``"forward"``; ``""``: none.
        steps: mini-batches to train on in all; 0 for as many as ``epochs`` passes over the training examples have, which is
            known when the data is read (the run's ``config.json`` has the number).
        epochs: counts only where ``steps`` is 0.
        seed: of the initial weights, the data order and dropout.
        engine: ``"emulator"`` (all stages in this process) or ``"processes"`` (one process per stage).
        eval_every: steps between validations, 0 for one at the end only. eval_batches: how many batches each,
            spread over the validation set.
        checkpoint_every: steps between checkpoints, 0 for one at the end only. The pipeline drains at each.
        keep_checkpoints: how many of the newest are kept.
        threads: CPU threads of each process.
        clip: largest norm of the gradients, 0 for no clipping. clip_scope: whose norm, see :class:`pipeoptim.Clip`.
        compress: ``"bf16"`` or ``"int8"``: activations and their gradients pass between stages in fewer bytes; ``""``: as they are.
        error_feedback: ``"gradients"``, ``"activations"`` or ``"both"``: what a compressed message lost is added to the next; see
            :class:`pipeoptim.Compression`.
        autocast: ``"bfloat16"``: forward and loss under ``torch.autocast``; ``""``: in the types of model and data.
        monitor_every: steps between measurements of the prediction error, 0 for none.
        tensorboard: also write the figures for TensorBoard, into the run's ``tensorboard`` folder.
        trace: also record what every stage does and when, in the run's ``trace`` folder; of the first ``trace_steps``
            mini-batches of the session.

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
    method: str = "pipeoptim"
    prediction: str = "refined"
    stages: int = 4
    microbatches: int = 1
    chunks: int = 1
    replicas: int = 1
    overlap: bool = False
    uneven: bool = False
    recompute: str = ""
    batch_size: int = 32
    steps: int = 300
    epochs: int = 0
    seed: int = 0
    engine: str = "emulator"
    eval_every: int = 50
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    threads: int = 1
    clip: float = 0.0
    clip_scope: str = "global_delayed"
    autocast: str = ""
    compress: str = ""
    error_feedback: str = "none"
    monitor_every: int = 0
    tensorboard: bool = False
    trace: bool = False
    trace_steps: int = 200

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
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not JSON ({error}); restore it, or start a new run") from error
        if not isinstance(data, dict):
            raise ConfigError(f"the configuration is {type(data).__name__}, must be a JSON object with the fields of a run")
        return _from_dict(data)

    def fingerprint(self) -> str:
        """SHA-256 of all that determines the weights: equal where one run may continue the other."""
        data = {name: value for name, value in asdict(self).items() if name not in NOT_IN_FINGERPRINT}
        for f in fields(self):  # so that a later version, with more fields, can still continue this run
            if f.name in data and getattr(self, f.name) == f.default:
                del data[f.name]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


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
