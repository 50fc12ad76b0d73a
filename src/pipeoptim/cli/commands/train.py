"""``pipeoptim train``: a recipe, changed by options, in a run directory."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeoptim.cli.settings import (
    ConfigFileOption,
    DataOption,
    LearningRateOption,
    ModelOption,
    OptimizerOption,
    SetOption,
    TinyOption,
    given,
    takes_settings,
    with_given,
)
from pipeoptim.config import NOT_COMPUTED, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.schedule import AUTO

if TYPE_CHECKING:
    from pipeoptim.train.node import Node
    from pipeoptim.train.rundir import RunDir

DEFAULT_RECIPE = "chars"

#: What may be changed when a run is resumed; the first makes a run directory of its own.
RECUT = ("stages", "cut", "chunks", "replicas")
ON_RESUME = NOT_COMPUTED


@takes_settings(after="tiny")
def train(
    recipe: Annotated[
        str | None,
        Option(
            help="What to train: chars (default), digits, vgg16-cifar100, ..., or module:function or file.py:function of your own."
        ),
    ] = None,
    tiny: TinyOption = False,
    model: ModelOption = None,
    data: DataOption = None,
    set_options: SetOption = None,
    optimizer: OptimizerOption = None,
    group: Annotated[
        list[str] | None,
        Option(
            help="Parameter group with options of its own, as ndim=2,prediction=displacement,lr=0.01 or layer=Embedding,rotate=false "
            "(ndim: dimensions of the weights that it takes; layer: class of the modules); may be given several times."
        ),
    ] = None,
    lr: LearningRateOption = None,
    name: Annotated[str | None, Option(help="Name of the run; by default <recipe>-<method>.")] = None,
    out: Annotated[Path, Option(help="Folder of the runs.")] = Path("runs"),
    new: Annotated[
        bool, Option("--new", help="If there is a run of that name already, start another one: <name>-2, ...")
    ] = False,
    resume: Annotated[
        bool,
        Option(
            "--resume",
            help="Continue the run of that name from its newest checkpoint, with its own settings. (The same command again, without "
            "--resume, does so as well, and begins the run if there is none.)",
        ),
    ] = False,
    config_file: ConfigFileOption = None,
    print_config: Annotated[
        bool, Option("--print-config", help="Print the run's settings as such a file, and what each means, and train nothing.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", help="No progress and no summary.")] = False,
    nnodes: Annotated[
        int | None,
        Option(
            help="With --survive on several machines: how many there are. Give the same command on each of them, with its own --node-rank; "
            "they share the folder of the runs. Without --survive, several machines are torchrun's."
        ),
    ] = None,
    node_rank: Annotated[
        int | None, Option(help="Which of them this one is: 0 for the first, which the others call, and which has stage 0.")
    ] = None,
    master_addr: Annotated[str | None, Option(help="IP address or name of node 0 in their network.")] = None,
    master_port: Annotated[int | None, Option(help="Port at which node 0 listens; 29500 unless given.")] = None,
    **settings: Any,
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
      pipeoptim train --model mine:net --data mine:task --optimizer mine:Opt --lr 0.01
          What you have: mine.py in this folder has net(), task() and a class Opt. Runs go to runs/mine-pipeoptim.
      pipeoptim train --recipe causal_lm --set model.source=my-gpt2 --set data.text=books
          Fine-tune a model of Hugging Face Transformers (a folder) on the text files in books. The trained model goes to
          runs/causal_lm-pipeoptim/model, for from_pretrained.
      pipeoptim train --optimizer muon_adamw,adamw,adamw,sgd --lr 0.003 --name mixed
          Another optimizer on every stage.
      pipeoptim train --group ndim=2,prediction=displacement --group prediction=none --name groups
          Matrices are predicted by their last displacement, biases and norms not at all.
      pipeoptim train --recipe vgg16-cifar100 --tiny
          A setting of the paper, small enough for a minute on two cores. Without --tiny it needs CIFAR-100 in data/.
      pipeoptim train --engine processes --stages 2 --replicas 2
          Two pipelines on four processes, each for one half of every mini-batch.
      pipeoptim train --recipe digits --lr 0.05 --print-config > run.toml; pipeoptim train --config run.toml
          All settings in a file, to be changed there.
      pipeoptim train --engine processes --survive 16 --nnodes 2 --node-rank 0 --master-addr 10.0.0.1
          Stages 0 and 1 here, 2 and 3 on the machine where the same is given with --node-rank 1. A process that dies is replaced.
      pipeoptim train --resume --name chars-pipeoptim
          Continue after Ctrl-C or a crash, bit for bit.
      pipeoptim train --resume --name chars-pipeoptim --stages 2
          Continue with another number of stages, in runs/chars-pipeoptim-2-stages: weights and optimizer state move.

    Ctrl-C and SIGTERM save and say how to continue (see --grace); a second Ctrl-C aborts. Under torchrun (one process per stage, or
    as --chunks and --replicas say), add --engine processes.
    """
    from pipeoptim.kernels.allocation import keep_freed_memory
    from pipeoptim.train import recut, run
    from pipeoptim.train.config_file import chosen_run, to_toml
    from pipeoptim.train.optimizers import kept_note
    from pipeoptim.train.recipes import chosen_config, full_name
    from pipeoptim.train.rundir import FinishedError, RunDir
    from pipeoptim.train.shorten import shortened, warmup_note
    from pipeoptim.train.trust import check_trusted, named_targets
    from pipeoptim.train.worker import reports

    keep_freed_memory()
    node = _node(nnodes, node_rank, master_addr, master_port)
    changed = given(settings)
    if "trace_steps" in changed:
        changed["trace"] = True
    wanted = DEFAULT_RECIPE if recipe is None else recipe
    notes: list[str] = []
    if resume:
        if group or new or config_file or set_options:
            option = "--group" if group else "--new" if new else "--config" if config_file else "--set"
            raise ConfigError(f"{option} belongs to a new run, and --resume continues one as it was begun; leave {option} out")
        own = full_name(wanted, tiny)
        if ":" in wanted or (model and data):
            own = chosen_config(recipe, tiny, model, data, DEFAULT_RECIPE).recipe
        if name is None and changed.get("method") == AUTO:
            raise ConfigError(
                "method auto is settled when a run begins, and its directory is called by what came out; give its --name"
            )
        directory = RunDir(out / _checked(f"{own}-{changed.get('method', 'pipeoptim')}" if name is None else name))
        config = _resumed(
            directory, changed, own if recipe is not None else None, lr, optimizer=optimizer, model=model, data=data
        )
        # What the run's own file names; what is changed is named by this command line.
        check_trusted(directory.path, directory.read_config(), named_targets(recipe, tiny, optimizer, changed, model, data))
        if print_config:
            print(to_toml(config))
            return
        if any(getattr(config, key) != getattr(directory.read_config(), key) for key in RECUT):
            if node is not None:
                raise ConfigError(
                    f"nnodes is {node.count}, and a run is cut anew on one machine only; leave --nnodes and what belongs to it out, press "
                    "Ctrl-C when it has begun, then resume it under its new name on all of them"
                )
            directory = recut(directory, config)
    else:
        chosen, in_file = chosen_run(recipe, tiny, config_file, model, data, DEFAULT_RECIPE, set_options or ())
        config = _new(chosen, changed, optimizer, lr, group)
        if optimizer is not None:
            notes.append(kept_note(chosen.optimizer, config.optimizer))
        if config.method == AUTO:
            exists = None if name is None or new else RunDir(out / _checked(name))
            config = _settled(config, exists, {**in_file, **changed})
        if "steps" in changed or ("steps" in in_file and "lr_schedule" not in in_file):
            notes.append(warmup_note(config))
            config = shortened(config)
        if print_config:
            print(to_toml(config))
            return
        directory = RunDir(out / _checked(f"{config.recipe}-{config.method}" if name is None else name))
        if new:
            directory = directory.beside()
        elif directory.path.exists():
            config = _same_run(directory, config)
    try:
        result = run(config, directory.path, resume=resume or None, progress=not quiet, node=node)
    except FinishedError as finished:  # the result exists already: repeating a command is no error, and says so
        if reports(config):
            print(finished, file=sys.stderr)
        return
    _report(result, config, directory, quiet, notes)


def _node(nnodes: int | None, node_rank: int | None, master_addr: str | None, master_port: int | None) -> Node | None:
    """This machine, where there are several."""
    from pipeoptim.train import Node

    given = {"--nnodes": nnodes, "--node-rank": node_rank, "--master-addr": master_addr, "--master-port": master_port}
    if set(given.values()) == {None}:
        return None
    for option in ("--nnodes", "--node-rank", "--master-addr"):
        if given[option] is None:
            other = next(name for name, value in given.items() if value is not None)
            raise ConfigError(
                f"{other} is {given[other]}, and {option} is missing; several machines need --nnodes, --node-rank and --master-addr"
            )
    assert nnodes is not None and node_rank is not None and master_addr is not None
    return Node(node_rank, nnodes, master_addr, 29500 if master_port is None else master_port)


def _new(
    config: TrainConfig, changed: dict[str, Any], optimizer: str | None, lr: float | None, groups: list[str] | None = None
) -> TrainConfig:
    """The recipe's configuration with what was given on the command line."""
    if changed.get("method", AUTO) != AUTO:
        from pipeoptim.train.change_method import with_method

        config = with_method(config, changed["method"])
    config = with_given(config, changed)
    if optimizer is not None:
        from pipeoptim.train.optimizers import switch

        config = replace(config, optimizer=switch(config.optimizer, optimizer))
    if lr is not None:
        config = replace(config, optimizer=config.optimizer.with_options(lr=lr))
    if groups:
        from pipeoptim.train.parameter_groups import read_group

        config = replace(config, optimizer=config.optimizer.with_options(groups=[read_group(text) for text in groups]))
    return config


def _same_run(directory: RunDir, config: TrainConfig) -> TrainConfig:
    """``config``, where it is that of the run in ``directory``; what is wrong with it in itself is told before that it is another one."""
    from pipeoptim.train.api import check_possible
    from pipeoptim.train.rundir import same_run

    try:
        return same_run(directory, config)
    except ConfigError:
        check_possible(config)
        raise


def _settled(config: TrainConfig, directory: RunDir | None, given: dict[str, Any]) -> TrainConfig:
    """What ``auto`` stands for; in a run that exists, what it stood for when that was begun."""
    from pipeoptim.train.automatic import kept, settled

    if directory is not None and directory.config.exists():
        return kept(config, directory.read_config())
    return settled(config, given)


def _resumed(
    directory: RunDir, changed: dict[str, Any], recipe: str | None, lr: float | None, **targets: str | None
) -> TrainConfig:
    """The run's own configuration. What was given must agree with it, but for what may change."""
    config = directory.read_config()
    changed = {key: value for key, value in changed.items() if (key, value) != ("method", AUTO)}  # which the run keeps
    fixed = {key: value for key, value in changed.items() if key not in (*ON_RESUME, *RECUT)}
    fixed |= {"recipe": recipe} if recipe is not None else {}
    pairs = [(key, value, getattr(config, key)) for key, value in fixed.items()]
    pairs += [(what, target, getattr(config, what).target) for what, target in targets.items() if target is not None]
    pairs += [("lr", lr, config.optimizer.options.get("lr"))] if lr is not None else []
    for key, value, own in pairs:
        if value != own:
            option = "--" + key.replace("_", "-")
            raise ConfigError(
                f"{option} is {value}, but run {directory.path} was begun with {own}; leave {option} out when resuming"
            )
    if "stages" in changed and "cut" not in changed:
        changed = {**changed, "cut": ""}  # that of the run before has another number of stages
    return replace(config, **{key: value for key, value in changed.items() if key in (*ON_RESUME, *RECUT)})


def _checked(name: str) -> str:
    name = name.replace(":", ".")
    unprintable = not name.isprintable() or name != name.strip() or len(name.encode()) > 200
    if not name or name in (".", "..") or "/" in name or "\\" in name or unprintable:
        raise ConfigError(f"name is {name!r}, must be the name of one folder; choose where it goes with --out")
    return name


def _report(result: Any, config: TrainConfig, directory: RunDir, quiet: bool, notes: list[str]) -> None:
    import typer

    from pipeoptim.telemetry.summary import print_summary
    from pipeoptim.train.layout import layout_of
    from pipeoptim.train.signals import exit_code
    from pipeoptim.train.worker import reports

    if not quiet and reports(config):
        how = f"{config.method}, {layout_of(config).describe()}, engine {config.engine}"
        print_summary(result, directory.read_config().steps, how)
        for note in filter(None, [result.reason, *notes]):
            print(note)
    if result.status == "stopped":
        if reports(config):
            print(f"stopped at step {result.step}; resume with: {directory.resume_command()}")
        raise typer.Exit(exit_code(signal.Signals[result.stopped_by]))
