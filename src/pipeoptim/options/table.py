"""Every option of a pipeline, once: its name, default, meaning, check, and whether all processes must agree on it.

What needs more than Python to check is named, and imported when the option is given: nothing here imports torch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Unpack

from pipeoptim.errors import ConfigError, unknown_name
from pipeoptim.options.checks import (
    Check,
    count,
    count_from_zero,
    count_or_none,
    every_so_many,
    flag,
    from_zero,
    function,
    imported,
    instance,
    integer_or_none,
    one_of,
    one_of_imported,
    passes,
    positive_or_none,
    read_by,
    scale_or_auto,
    seconds,
    seconds_or_none,
    tied_places,
)
from pipeoptim.options.entry import Need, Option, Setting
from pipeoptim.options.function_types import LossWeight, UpdateHook
from pipeoptim.schedule import ORDERS, Slack, describe_slack

if TYPE_CHECKING:
    import torch
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from pipeoptim.engine.stage.adagc import AdaGC
    from pipeoptim.engine.stage.clip import Clip
    from pipeoptim.engine.stage.tied_weights import TiedWeights
    from pipeoptim.engine.trace import Trace
    from pipeoptim.engine.transport.compression import Compression
    from pipeoptim.methods import Method
    from pipeoptim.options.keywords import ProcessKeywords

RENAMED = {"weigh": "loss_weight"}
"""Former names, which work for one more minor release, with a DeprecationWarning."""

EQUAL = "Equal in all processes."
PREDICTS = Need(lambda method: method.predicts, "predicts no weights")
IS_ASYNCHRONOUS = Need(lambda method: not ORDERS[method.order].flushes, "never trains asynchronously")
PREDICTS_FORWARDS = Need(lambda method: method.forward.predicts, "predicts no weights of a forward")
PREDICTS_BY_RULE = Need(
    lambda method: method.forward.predicts and method.predictor is None, "predicts no forward by the rule of the optimizer"
)
NEVER_FLUSHES = Need(lambda method: not ORDERS[method.order].flushes, "flushes the pipeline after each mini-batch")


def option(default: Any, help: str, check: Check, **known: Any) -> Any:
    """A field of :class:`PipelineOptions`; ``known``: see :class:`~pipeoptim.options.entry.Option`."""
    return field(default=default, metadata={"option": Option(help, check, **known)})


def _clip_of_run(run: Any) -> Any:
    if not run.clip:
        return None
    if run.clip_scope == "adagc":
        return imported("pipeoptim.engine:AdaGC")(lambda_abs=run.clip)
    return imported("pipeoptim.engine:Clip")(run.clip, run.clip_scope)


@dataclass(frozen=True, init=False)
class PipelineOptions:
    """All options of a pipeline, checked, in the form that the engine uses.

    A pipeline makes it from its keyword arguments and shows it as ``pipe.options``; the arguments are those of
    :class:`~pipeoptim.Emulator` and :class:`~pipeoptim.Schedule`.

    Raises:
        ConfigError: an unknown option, or a value that its option does not take.

    Example:
        >>> import pipeoptim as po
        >>> options = po.PipelineOptions("pipeoptim", microbatches=4, clip=1.0)
        >>> options.clip, options.uneven, sorted(options.keywords())
        (Clip(max_norm=1.0, scope='stage'), False, ['clip', 'microbatches'])
    """

    method: str | Method = option(
        "pipeoptim",
        "training method: a name in pipeoptim.METHODS, a Method of your own, or 'auto' for what pipeoptim advise says of this depth, M and "
        "optimizer, with two copies of the weights at most.",
        read_by("pipeoptim.methods:get_method"),
        agreed=EQUAL,
        describe=lambda method: getattr(method, "name", method),
    )
    microbatches: int = option(
        1, "M slices per mini-batch and update; 1 is the default of the asynchronous methods.", count, agreed=EQUAL
    )
    prediction: str = option(
        "refined",
        "kind of weight prediction: refined, paper, decayed, in_progress, displacement or none.",
        one_of_imported("pipeoptim.rules:KINDS"),
        agreed=EQUAL,
        in_runs=True,
        needs=PREDICTS,
        idle=("none",),
    )
    refresh: int | None = option(
        None,
        "with prediction='in_progress': after how many micro-batches a prediction is made anew, by default 1; M: one per mini-batch.",
        count_or_none,
        agreed=EQUAL,
        settings={
            "refresh": Setting(
                0,
                "With --prediction in_progress: micro-batches after which a prediction is made anew; M: once per mini-batch; 0: as 1.",
                least=0,
                only_with="prediction=in_progress",
            )
        },
        of_run=lambda run: run.refresh or None,
        needs=PREDICTS,
    )
    scale: float | str = option(
        1.0,
        "factor on predicted displacements: a number above 0, up to 2; or 'auto', for each stage and parameter group the factor that "
        "would have fitted best lately, measured on a sample every four updates.",
        scale_or_auto,
        agreed=EQUAL,
        settings={
            "scale": Setting(
                "1",
                "Factor on predicted displacements, above 0, up to 2; or auto: on each stage what would have fitted best lately.",
                check_value=scale_or_auto,
            )
        },
        of_run=lambda run: scale_or_auto("scale", run.scale),
        needs=PREDICTS_BY_RULE,
    )
    synchronous_updates: int = option(
        0,
        "how many updates at the start of training run synchronously, with a flush after each, before an asynchronous method begins.",
        count_from_zero,
        agreed=EQUAL,
        settings={
            "synchronous_updates": Setting(
                0, "Updates at the start that run synchronously, with a flush after each; 0: none.", least=0
            )
        },
        of_run=lambda run: run.synchronous_updates,
        needs=IS_ASYNCHRONOUS,
    )
    seed: int | None = option(
        None,
        "of the stages' random numbers (dropout); by default torch's initial seed. Pipelines with the same seed in all "
        "processes draw what the emulator draws.",
        integer_or_none,
    )
    clip: Clip | AdaGC | None = option(
        None,
        "gradient clipping: a pipeoptim.Clip, or the largest norm per stage; or a pipeoptim.AdaGC, or 'adagc': each tensor by a running "
        "mean of its own norms.",
        read_by("pipeoptim.engine.stage.clipping:as_clip"),
        agreed=EQUAL,
        given="Clip | AdaGC | float | str | None",
        settings={
            "clip": Setting(0.0, "Largest norm of the gradients; 0: no clipping.", check_value=from_zero),
            "clip_scope": Setting(
                "global_delayed",
                "Whose norm: stage, global (waits for all stages) or global_delayed (the default); or adagc: each tensor's own, which may "
                "be 1.05 times its running mean, after 100 updates of warm-up by --clip on each stage.",
                choices=("stage", "global", "global_delayed", "adagc"),
                only_with="clip",
            ),
        },
        of_run=_clip_of_run,
    )
    autocast: torch.dtype | None = option(
        None,
        "torch.bfloat16 or torch.float16: forward and loss run under torch.autocast.",
        passes("pipeoptim.engine.stage.autocast:check_autocast"),
        agreed=EQUAL,
        settings={
            "autocast": Setting(
                "",
                "bfloat16: compute forward and loss in it where torch.autocast does.",
                choices=("bfloat16",),
                optional=True,
            )
        },
        of_run=lambda run: imported(f"torch:{run.autocast}") if run.autocast else None,
    )
    scaler: GradScaler | None = option(
        None,
        "loss scaling for float16: a torch.amp.GradScaler for each stage. Where several stages live in one process, a list of them, or a "
        "function that makes one.",
        instance(
            "torch.amp.grad_scaler:GradScaler",
            'a torch.amp.GradScaler; the emulator takes one per stage: scaler=lambda: torch.amp.GradScaler("cuda")',
        ),
        agreed="On all stages or on none.",
        describe=lambda scaler: "on" if scaler is not None and scaler.is_enabled() else "off",
        given="GradScaler | Sequence[GradScaler] | Callable[[], GradScaler] | None",
    )
    on_update: UpdateHook | None = option(
        None,
        "on_update(k, version), called after every update of every stage; averages of weights go here.",
        function("a function of a stage and its version", 2),
    )
    monitor: bool | int = option(
        False,
        "measure the predictions made at every n-th version, see prediction_error(). True: as often as costs less than 1 % of "
        "a step, that is at every version of stages with 60 million weights, at fewer of smaller ones, but at least at every 10th.",
        every_so_many,
        settings={
            "monitor_every": Setting(
                0,
                "Steps between measurements of the prediction error, for metrics.jsonl and the summary; 0: none.",
                least=0,
                computes=False,
            )
        },
        # A factor that adapts is reported with the errors that it adapts to.
        of_run=lambda run: run.monitor_every or run.scale == "auto",
        needs=PREDICTS_FORWARDS,
    )
    uneven: bool = option(
        False,
        "a batch that M does not divide is cut into micro-batches that differ by one row, each of which counts by its share of "
        "the rows; by default such a batch is an error.",
        flag,
        agreed=EQUAL,
        in_runs=True,
    )
    loss_weight: LossWeight | None = option(
        None,
        "loss_weight(target) -> number: the loss of a micro-batch counts by its share of these numbers; used on the last stage. For "
        "losses that are a mean over something other than rows, for instance lambda target: (target != -100).sum().",
        function("a function of the target that returns a number", 1),
    )
    recompute: str = option(
        "backward",
        "on which weights activation checkpoints (torch.utils.checkpoint) run the forward again: 'backward', those of the "
        "backward; or 'forward', those of the first forward, which is the same bit for bit as without checkpointing, and costs "
        "a stash of these weights. Each stage may choose.",
        one_of_imported("pipeoptim.engine.stage.recompute:KINDS"),
        settings={
            "recompute": Setting(
                "",
                "Activation checkpointing: keep the inputs of blocks only, and run blocks again in the backward, on its weights (backward) "
                "or, exactly, on those of the first forward (forward).",
                choices=("backward", "forward"),
                optional=True,
            )
        },
        of_run=lambda run: run.recompute or "backward",
    )
    overlap: bool = option(
        False,
        "average the gradients of replicas during the next forward, after which the update comes; the version gap of that "
        "forward is one more, which is counted and predicted like any other.",
        flag,
        agreed=EQUAL,
        in_runs=True,
    )
    slack: Slack | str = option(
        0.0,
        "more micro-batches in flight, so that late messages hold no stage up: x, or a list of one x for each boundary between two stages; "
        "stage k has (1+x)(D-1-k)+1 in flight, rounded up. Costs activations, and version gap where M < (1+x)(D-1). 'auto': chosen after "
        "the first mini-batches from what messages and stages took, and kept.",
        read_by("pipeoptim.schedule:read_slack_or_auto"),
        agreed=EQUAL,
        describe=describe_slack,
        given="float | Sequence[float] | str",
        settings={
            "slack": Setting(
                "0",
                "More micro-batches in flight, so that late messages hold no stage up: x, or 0,x,0 with one x for each boundary "
                "between two stages; stage k has (1+x)(D-1-k)+1 in flight. auto, with --engine processes: chosen after the first "
                "mini-batches, and kept.",
                check_value=read_by("pipeoptim.schedule:read_slack_or_auto"),
            )
        },
        of_run=lambda run: run.slack,
        needs=NEVER_FLUSHES,
    )
    compress: Compression | None = option(
        None,
        "'bf16', 'int8' or a pipeoptim.Compression: messages between stages take fewer bytes; tensors of fewer than 32 numbers are "
        "sent as they are. An emulator loses the same precision.",
        read_by("pipeoptim.engine.transport.compression:as_compression"),
        agreed=EQUAL,
        given="Compression | str | None",
        settings={
            "compress": Setting(
                "",
                "bf16 or int8: activations and their gradients pass between stages in fewer bytes.",
                choices=("bf16", "int8"),
                optional=True,
            ),
            "error_feedback": Setting(
                "none",
                "With --compress, add what a message lost to the next one: none, gradients, activations or both.",
                choices=("none", "gradients", "activations", "both"),
                only_with="compress",
            ),
        },
        of_run=lambda run: (
            imported("pipeoptim.engine:Compression")(run.compress or None, run.compress or None, run.error_feedback)
            if run.compress or run.error_feedback != "none"
            else None
        ),
    )
    trace: Trace | None = option(
        None,
        "a pipeoptim.Trace that records what every stage does and when; of replicas, the first.",
        instance("pipeoptim.engine.trace:Trace", "a pipeoptim.Trace or None"),
        settings={
            "trace": Setting(
                False,
                "Also record what every stage does and when, to runs/<name>/trace: idle shares, Perfetto, a picture.",
                computes=False,
            ),
            "trace_steps": Setting(
                200, "Record this many mini-batches instead of 200.", least=1, computes=False, only_with="trace"
            ),
        },
        of_run=lambda run: imported("pipeoptim.engine:Trace")(run.trace_steps) if run.trace else None,
    )
    on_bad: str = option(
        "stop",
        "what bad data do, which are NaN, infinity and outliers: stop, where a loss is bad, or a norm for clipping is not finite, training "
        "ends with a DivergedError before the weights take that update; skip, the update is left out, on all stages where it was the loss, "
        "else on that of the gradients; rollback, as stop, and a run of pipeoptim train goes back to its newest checkpoint and leaves the "
        "mini-batch out on all stages.",
        one_of(("stop", "skip", "rollback")),
        agreed=EQUAL,
        in_runs=True,
    )
    outlier: float | None = option(
        None,
        "from how many standard deviations above the median of the last 64 a loss of a micro-batch is bad (see on_bad), for example 10; by "
        "default only NaN and infinity are. Both are estimated by medians; the first 16 are not judged.",
        positive_or_none,
        agreed=EQUAL,
        settings={
            "outlier": Setting(
                0.0,
                "Standard deviations above the median of the last 64 from which on a loss is bad as well (see --on-bad), for example "
                "10; 0: only NaN and infinity are.",
                check_value=from_zero,
            )
        },
        of_run=lambda run: run.outlier or None,
    )
    audit: int | None = option(
        None,
        "updates after which a stage does one again, on copies of its weights, gradients and optimizer state, and compares bit by bit. A "
        "difference, which only a faulty processor or memory makes, ends training with a CorruptionError that names stage, update and "
        "parameter.",
        count_or_none,
        settings={
            "audit": Setting(
                0,
                "Updates after which one is done again on copies and compared bit by bit, to find faulty processors and memory; 0: none.",
                least=0,
                computes=False,
            )
        },
        of_run=lambda run: run.audit or None,
    )
    tied: TiedWeights | None = option(
        None,
        "weights of which several stages have a copy, which are kept equal: for each of them a list of (stage, name of the parameter), "
        '[[(0, "embed.weight"), (1, "head.weight")]]. Stages of po.partition and po.untie carry theirs, so that it can be left out.',
        tied_places,
        agreed=EQUAL,
        describe=lambda tied: f"[{'; '.join(map(str, tied or ()))}]",
    )
    replicas: ProcessGroup | DeviceMesh | None = option(
        None,
        "the processes that hold the same stage and train on other samples, as a process group or a dimension of a DeviceMesh; "
        "gradients become their mean before each update (see docs/layouts.md).",
        passes("pipeoptim.engine.replicas.replica_set:replica_ranks"),
        agreed="As many for every stage.",
        describe=lambda replicas: "1" if replicas is None else str(replicas if isinstance(replicas, int) else replicas.size()),
        between_processes=True,
    )
    transport: str = option(
        "auto",
        "'auto' moves messages between processes of one machine through sockets and shared memory, where the group's backend for CPUs "
        "is gloo and messages are in the host's memory, and all others through the process group; 'group' moves all of them through "
        "the process group. Messages are in the host's memory where stages are on CPUs, and where the group has no backend but gloo for "
        "the stage's device: those of a GPU are then copied to pinned memory and sent from there while it computes. A backend that "
        "takes device memory, as NCCL does, gets it. Norms for clipping take the same way.",
        passes("pipeoptim.engine.transport.unix_channel:check_transport"),
        between_processes=True,
    )
    checksums: bool = option(
        True,
        "messages that leave the machine from host memory carry a CRC-32, which the receiver compares; a difference ends training with a "
        "CorruptionError that names the link.",
        flag,
        between_processes=True,
        settings={
            "checksums": Setting(
                True,
                "Under torchrun on several machines: messages between machines carry a CRC-32, which the receiver compares.",
                computes=False,
            )
        },
    )
    timeout: float = option(
        1800.0, "seconds to wait for a neighbour's message before giving up.", seconds, between_processes=True
    )
    liveness_timeout: float | None = option(
        10.0,
        "seconds without a sign of life from a stage after which the step that waits ends with a StageFailure that names the stage. None "
        "switches this off.",
        seconds_or_none,
        between_processes=True,
    )
    survive: int | None = option(
        None,
        "mini-batches after which each process leaves an image of itself, which takes its place when it dies, while the others wait; on "
        "CPUs, in runs of pipeoptim train (see docs/failures.md).",
        count_or_none,
        agreed=EQUAL,
        between_processes=True,
    )

    def __init__(self, method: str | Method = "pipeoptim", microbatches: int = 1, **options: Unpack[ProcessKeywords]) -> None:
        self._fill("PipelineOptions", PROCESS_OPTIONS, {**options, "method": method, "microbatches": microbatches})

    @classmethod
    def read(
        cls, pipeline: str, names: Sequence[str], method: str | Method, microbatches: int, options: Mapping[str, Any]
    ) -> PipelineOptions:
        """The options that a ``pipeline`` was given, of those called ``names``.

        Raises:
            ConfigError: another option, or a value that its option does not take.
        """
        made = cls.__new__(cls)
        made._fill(pipeline, names, {**options, "method": method, "microbatches": microbatches})
        return made

    def _fill(self, pipeline: str, names: Sequence[str], given: dict[str, Any]) -> None:
        given = renamed(given)
        for name in given:
            if name not in names and name not in ("method", "microbatches"):
                raise _refusal(pipeline, name, names)
        for entry in fields(self):
            value = given.get(entry.name, entry.default)
            if type(value) is not type(entry.default) or value != entry.default:
                value = about(entry).check(entry.name, value)
            object.__setattr__(self, entry.name, value)

    def keywords(self) -> dict[str, Any]:
        """Those that are not the default, as keyword arguments of a pipeline."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def describe(self, **found: Any) -> str:
        """In words, what must be equal in all processes; ``found`` replaces options by what the engine made of them."""
        agreed = [entry for entry in fields(self) if about(entry).agreed]
        return " ".join(f"{f.name}={about(f).describe(found.get(f.name, getattr(self, f.name)))}" for f in agreed)


PROCESS_OPTIONS = tuple(f.name for f in fields(PipelineOptions) if f.name not in ("method", "microbatches"))
"""Options of ``Schedule`` and ``InterleavedSchedule``."""


def about(entry: Field[Any]) -> Option:
    """What is known of the option in a field of :class:`PipelineOptions`."""
    return entry.metadata["option"]  # type: ignore[no-any-return]


OPTIONS = tuple(f.name for f in fields(PipelineOptions) if f.name in PROCESS_OPTIONS and not about(f).between_processes)
"""Those of ``Emulator``."""


def option_named(name: str) -> tuple[Any, Option]:
    """Default of an option, and what is known of it."""
    entry = next(f for f in fields(PipelineOptions) if f.name == name)
    return entry.default, about(entry)


def read_option(name: str, options: Mapping[str, Any]) -> Any:
    """One option of those given, checked: for what must be known before the others can be read."""
    default, option = option_named(name)
    return option.check(name, options.get(name, default))


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` under their present names.

    Raises:
        ConfigError: one is given under both its names.
    """
    found = dict(options)
    for old, new in RENAMED.items():
        if old in found:
            if new in found:
                raise ConfigError(f"{old} is the former name of {new}, and both were given; leave {old} out")
            told = f"{old}= is called {new}= now; the old name goes with the next minor release"
            warnings.warn(told, DeprecationWarning, stacklevel=_levels_to_user())
            found[new] = found.pop(old)
    return found


def _levels_to_user() -> int:
    """The ``stacklevel`` of a warning about what was called from outside the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "pipeoptim":
        frame, level = frame.f_back, level + 1
    return level


def _refusal(pipeline: str, name: str, names: Sequence[str]) -> ConfigError:
    if name in PROCESS_OPTIONS:
        return ConfigError(f"{name} is an option of pipelines in several processes, not of {pipeline}; leave it out")
    beside = ("method", "microbatches", "scheduler" if pipeline == "Schedule" else "schedulers")
    return unknown_name(f"{pipeline} option", name, (*names, *beside))


DEFAULTS = PipelineOptions()
"""No option given."""
