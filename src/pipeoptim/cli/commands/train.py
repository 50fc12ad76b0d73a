"""``pipeoptim train``: a recipe, changed by options, in a run directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.train.rundir import RunDir

DEFAULT_RECIPE = "chars"

#: What may be changed when a run is taken up again; the first in a run directory of its own.
RECUT = ("stages", "chunks", "replicas")
ON_RESUME = ("engine", "steps", "eval_every", "monitor_every", "tensorboard", "trace", "trace_steps")


def train(
    recipe: Annotated[
        str | None,
        Option(help="What to train: chars (default), digits, vgg16-cifar100, ..., or module:function of your own."),
    ] = None,
    tiny: Annotated[bool, Option("--tiny", help="The recipe's tiny form: a minute, and nothing to download.")] = False,
    method: Annotated[str | None, Option(help="Training method, for example pipeoptim, pipedream, gpipe, 1f1b, naive.")] = None,
    stages: Annotated[int | None, Option(help="Depth: pieces that the model is cut into.")] = None,
    microbatches: Annotated[int | None, Option(help="Micro-batches per mini-batch; must divide the batch size.")] = None,
    batch_size: Annotated[int | None, Option(help="Samples per mini-batch, that is, per update.")] = None,
    chunks: Annotated[
        int | None,
        Option(
            help="Stages per process, in an interleaved order; for layers that cost unevenly. Processes: stages / chunks x replicas."
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        Option(
            help="Copies of the pipeline, each for its part of every mini-batch (data parallel); with --engine processes, whose number "
            "is then stages / chunks x replicas."
        ),
    ] = None,
    overlap: Annotated[
        bool | None,
        Option("--overlap", help="Average the gradients of replicas during the next forward, at a version gap of one more."),
    ] = None,
    uneven: Annotated[
        bool | None, Option("--uneven", help="Micro-batches may differ by one sample: they need not divide the batch size.")
    ] = None,
    recompute: Annotated[
        str | None,
        Option(
            help="Activation checkpointing: keep the inputs of blocks only, and run blocks again in the backward, on its weights "
            "(backward) or, exactly, on those of the first forward (forward)."
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        Option(
            help="adamw, sgd, ... (any of torch.optim), muon_adamw (Muon for matrices), or module:Class; one, or one per stage "
            "between commas. Give --lr as well."
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        Option(
            help="Parameter group with options of its own, as ndim=2,prediction=displacement,lr=0.01 (ndim: dimensions of the "
            "weights that it takes); may be given several times."
        ),
    ] = None,
    lr: Annotated[float | None, Option(help="Learning rate.")] = None,
    steps: Annotated[
        int | None,
        Option(
            help="Mini-batches to train on; the recipe's warm-up takes a quarter of them at most. With --resume: train a finished run "
            "further."
        ),
    ] = None,
    seed: Annotated[int | None, Option(help="Of the initial weights, the data order and dropout.")] = None,
    prediction: Annotated[str | None, Option(help="Weight prediction: refined, paper, decayed or displacement.")] = None,
    engine: Annotated[
        str | None, Option(help="emulator: all stages in this process. processes: one process per stage (but see --chunks).")
    ] = None,
    eval_every: Annotated[int | None, Option(help="Steps between validations; 0: only at the end.")] = None,
    checkpoint_every: Annotated[int | None, Option(help="Steps between checkpoints; 0: only at the end.")] = None,
    threads: Annotated[int | None, Option(help="CPU threads of each process.")] = None,
    clip: Annotated[float | None, Option(help="Largest norm of the gradients; 0: no clipping.")] = None,
    clip_scope: Annotated[
        str | None, Option(help="Whose norm: stage, global (waits for all stages) or global_delayed (default).")
    ] = None,
    autocast: Annotated[str | None, Option(help="bfloat16: compute forward and loss in it where torch.autocast does.")] = None,
    compress: Annotated[
        str | None, Option(help="bf16 or int8: activations and their gradients pass between stages in fewer bytes.")
    ] = None,
    error_feedback: Annotated[
        str | None,
        Option(help="With --compress, add what a message lost to the next one: none, gradients, activations or both."),
    ] = None,
    monitor_every: Annotated[
        int | None, Option(help="Steps between measurements of the prediction error, for metrics.jsonl and the summary.")
    ] = None,
    tensorboard: Annotated[
        bool | None, Option("--tensorboard", help="Also write the figures to runs/<name>/tensorboard.")
    ] = None,
    trace: Annotated[
        bool | None,
        Option(
            "--trace",
            help="Also record what every stage does and when, to runs/<name>/trace: idle shares, Perfetto, a picture.",
        ),
    ] = None,
    trace_steps: Annotated[int | None, Option(help="Record this many mini-batches instead of 200.")] = None,
    name: Annotated[str | None, Option(help="Name of the run; by default <recipe>-<method>.")] = None,
    out: Annotated[Path, Option(help="Folder of the runs.")] = Path("runs"),
    resume: Annotated[bool, Option("--resume", help="Continue the run of that name from its newest checkpoint.")] = False,
    quiet: Annotated[bool, Option("--quiet", help="No progress and no summary.")] = False,
) -> None:
    """Train a model through a pipeline.

    Without options: a character-level GPT learns Python from the source of Python's own standard library, on 4
    stages emulated in this process. Nothing is downloaded. Everything ends up in runs/<name>/.

    \b
    Examples:
      pipeoptim train
          The default recipe.
      pipeoptim train --engine processes
          The same with one process per stage: same weights, faster.
      pipeoptim train --method gpipe
          The synchronous baseline, in runs/chars-gpipe.
      pipeoptim train --microbatches 1 --lr 0.001 --name hard
          Mini-batches are not split: the weights of stage 0 are 3 updates old.
      pipeoptim train --recipe digits --stages 3 --optimizer sgd --lr 0.05
          A convolutional net on handwritten digits.
      pipeoptim train --optimizer muon_adamw,adamw,adamw,sgd --lr 0.003 --name mixed
          Another optimizer on every stage.
      pipeoptim train --group ndim=2,prediction=displacement --group prediction=none --name groups
          Matrices are predicted by their last displacement, biases and norms not at all.
      pipeoptim train --recipe vgg16-cifar100 --tiny
          A setting of the paper, small enough for a minute on two cores. Without --tiny it needs CIFAR-100 in data/.
      pipeoptim train --engine processes --stages 2 --replicas 2
          Two pipelines on four processes, each for one half of every mini-batch.
      pipeoptim train --resume --name chars-pipeoptim
          Continue after Ctrl-C or a crash, bit for bit.
      pipeoptim train --resume --name chars-pipeoptim --stages 2
          Continue with another number of stages, in runs/chars-pipeoptim-2-stages: weights and optimizer state move.

    Ctrl-C saves and says how to continue; a second Ctrl-C aborts. Under torchrun (one process per stage, or as --chunks and
    --replicas say), add --engine processes.
    """
    from pipeoptim.kernels.allocation import keep_freed_memory
    from pipeoptim.train import recut, run
    from pipeoptim.train.recipes import full_name, get_recipe
    from pipeoptim.train.rundir import RunDir
    from pipeoptim.train.shorten import shortened, warmup_note

    keep_freed_memory()
    options = {
        "method": method,
        "stages": stages,
        "microbatches": microbatches,
        "chunks": chunks,
        "replicas": replicas,
        "overlap": overlap,
        "uneven": uneven,
        "recompute": recompute,
        "batch_size": batch_size,
        "steps": steps,
        "seed": seed,
        "prediction": prediction,
        "engine": engine,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
        "threads": threads,
        "clip": clip,
        "clip_scope": clip_scope,
        "autocast": autocast,
        "compress": compress,
        "error_feedback": error_feedback,
        "monitor_every": monitor_every,
        "tensorboard": tensorboard,
        "trace": trace if trace_steps is None else True,
        "trace_steps": trace_steps,
    }
    given = {key: value for key, value in options.items() if value is not None}
    wanted = DEFAULT_RECIPE if recipe is None else recipe
    note = ""
    if resume:
        if group:
            raise ConfigError("--group belongs to a new run, and --resume takes the run's own groups; leave --group out")
        default = f"{full_name(wanted, tiny)}-{method or 'pipeoptim'}"
        directory = RunDir(out / _checked(default if name is None else name))
        config = _resumed(directory, given, full_name(recipe, tiny) if recipe else None, optimizer, lr)
        if any(getattr(config, key) != getattr(directory.read_config(), key) for key in RECUT):
            directory = recut(directory, config)
    else:
        config = _new(get_recipe(wanted, tiny), given, optimizer, lr, group)
        if steps is not None:
            config, note = shortened(config), warmup_note(config)
        directory = RunDir(out / _checked(f"{config.recipe}-{config.method}" if name is None else name))
    result = run(config, directory.path, resume=resume, progress=not quiet)
    _report(result, config, directory, quiet, note)


def _new(
    config: TrainConfig, given: dict[str, Any], optimizer: str | None, lr: float | None, groups: list[str] | None = None
) -> TrainConfig:
    """The recipe's configuration with what was given on the command line."""
    config = replace(config, **given)
    if optimizer is not None:
        from pipeoptim.train.optimizers import switch

        config = replace(config, optimizer=switch(config.optimizer, optimizer))
    if lr is not None:
        config = replace(config, optimizer=config.optimizer.with_options(lr=lr))
    if groups:
        from pipeoptim.train.optimizers import read_group

        config = replace(config, optimizer=config.optimizer.with_options(groups=[read_group(text) for text in groups]))
    return config


def _resumed(
    directory: RunDir, given: dict[str, Any], recipe: str | None, optimizer: str | None, lr: float | None
) -> TrainConfig:
    """The run's own configuration. What was given must agree with it, but for what may change."""
    config = directory.read_config()
    fixed = {key: value for key, value in given.items() if key not in (*ON_RESUME, *RECUT)}
    fixed |= {"recipe": recipe} if recipe is not None else {}
    pairs = [(key, value, getattr(config, key)) for key, value in fixed.items()]
    pairs += [("optimizer", optimizer, config.optimizer.target)] if optimizer is not None else []
    pairs += [("lr", lr, config.optimizer.options.get("lr"))] if lr is not None else []
    for key, value, own in pairs:
        if value != own:
            option = "--" + key.replace("_", "-")
            raise ConfigError(
                f"{option} is {value}, but run {directory.path} was begun with {own}; leave {option} out when resuming"
            )
    return replace(config, **{key: value for key, value in given.items() if key in (*ON_RESUME, *RECUT)})


def _checked(name: str) -> str:
    name = name.replace(":", ".")
    unprintable = not name.isprintable() or name != name.strip() or len(name.encode()) > 200
    if not name or name in (".", "..") or "/" in name or "\\" in name or unprintable:
        raise ConfigError(f"name is {name!r}, must be the name of one folder; choose where it goes with --out")
    return name


def _report(result: Any, config: TrainConfig, directory: RunDir, quiet: bool, note: str) -> None:
    import typer

    from pipeoptim.telemetry.summary import print_summary
    from pipeoptim.train.layout import layout_of
    from pipeoptim.train.worker import reports

    if not quiet and reports(config):
        how = f"{config.method}, {layout_of(config).describe()}, engine {config.engine}"
        print_summary(result, directory.read_config().steps, how)
        if note:
            print(note)
    if result.status == "stopped":
        if reports(config):
            print(f"stopped at step {result.step}; resume with: {directory.resume_command()}")
        raise typer.Exit(130)
