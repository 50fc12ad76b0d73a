"""``pipeoptim profile``: what a model costs on this machine, block by block, as a file for ``pipeoptim simulate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeoptim.cli.measured_models import MeasuredModelOption, moved_to, of_config, own_model
from pipeoptim.cli.new_files import check_new_files
from pipeoptim.cli.settings import ConfigFileOption, DataOption, SetOption, TinyOption
from pipeoptim.errors import ConfigError, counted

if TYPE_CHECKING:
    from pipeoptim.bench.measured_model import MeasuredModel
    from pipeoptim.config import TrainConfig
    from pipeoptim.simulate import Profile

REPEATS, MOST_REPEATS = 15, 10_000


def profile(
    out: Annotated[Path, Option(help="Where the JSON goes.")],
    recipe: Annotated[
        str | None, Option(help="Whose model, mini-batch, loss and optimizer, as for train; chars by default.")
    ] = None,
    tiny: TinyOption = False,
    model: MeasuredModelOption = None,
    data: DataOption = None,
    set_options: SetOption = None,
    config_file: ConfigFileOption = None,
    microbatches: Annotated[
        list[int] | None,
        Option(help="Micro-batches M to measure, for their sizes; may be repeated. By default 1, 2, 4 where they divide."),
    ] = None,
    how: Annotated[str, Option(help="How the model is seen as a row of blocks: blocks, layers, trace, or auto.")] = "auto",
    layers: Annotated[list[str] | None, Option(help="Name of a list of layers in the model; found by itself.")] = None,
    device: Annotated[str, Option(help="Where to measure: cpu, cuda, ...")] = "cpu",
    repeats: Annotated[int, Option(help="Mini-batches that a figure is the median of.")] = REPEATS,
    synthetic: Annotated[
        bool,
        Option("--synthetic", help="Measure nothing: write the profile of a transformer by formula, see simulate --sizes."),
    ] = False,
    sizes: Annotated[str | None, Option(help="With --synthetic: as for simulate; with layers=N.")] = None,
) -> None:
    """Measure what a model costs: seconds of F, B, update and prediction, bytes of activations and weights, and messages.

    The engine itself trains the model for some mini-batches, and blocks are timed within one stage, where their caches are as in a run;
    two processes measure messages. The file says units, versions and hardware; nothing else is written.

    \b
    Examples:
      pipeoptim profile --recipe chars --out chars.json
          A recipe's model, for `pipeoptim simulate --profile chars.json --stages 4`.
      pipeoptim profile --model mine:gpt2 --microbatches 1 --microbatches 8 --out gpt2.json
          A model of your own, in micro-batches of a whole and of an eighth of its mini-batch, and sizes between them.
      pipeoptim profile --synthetic --sizes layers=32,width=4096,rows=256 --out big.json
          A transformer by formula, marked as such.
    """
    from pipeoptim.bench.model_profile import measure_profile
    from pipeoptim.kernels.allocation import keep_freed_memory
    from pipeoptim.train.config_file import chosen_run

    check_new_files({"--out": out})
    if not 5 <= repeats <= MOST_REPEATS:
        raise ConfigError(f"repeats is {repeats}, must be at least 5 and at most {MOST_REPEATS:,}")
    chosen = (recipe, tiny, model, data, set_options, config_file, microbatches, layers)
    if synthetic:
        if any(chosen) or how != "auto" or device != "cpu" or repeats != REPEATS:
            raise ConfigError(
                "--synthetic is a transformer by formula, with --sizes; leave the options that name or measure a model out"
            )
        found = _from_formula(sizes or "")
    else:
        if sizes is not None:
            raise ConfigError(f"sizes is {sizes!r}, which belongs to --synthetic; a model has its own; leave it out")
        if model is not None and data is None:
            if recipe is not None or tiny or set_options or config_file:
                raise ConfigError(
                    f"model {model!r} returns model and mini-batch by itself; leave --recipe, --tiny, --set and --config out"
                )
            work = _own_work(model, device, how, layers)
        else:
            work = _work_of(
                chosen_run(recipe, tiny, config_file, model, data, "chars", set_options or ())[0], device, how, layers
            )
        keep_freed_memory()  # as training runs do
        found = measure_profile(work, microbatches or [m for m in (1, 2, 4) if work.rows % m == 0], repeats)
        if (model is None or data is not None) and how == "auto" and not layers:  # as runs cut
            named = _named(recipe, tiny, model, data, set_options, config_file)
            found = replace(found, made={**found.made, "train": named})
    found.write(out)
    seconds = sum(block.forward[-1] + block.backward[-1] for block in found.blocks)
    told = "by formula" if found.synthetic else f"{seconds * 1e3:.4g} ms for F and B of {counted(found.rows[-1], 'row')}"
    print(f"{found.model}: {counted(len(found.blocks), 'block')}, {told}; written to {out}")


def _named(
    recipe: str | None, tiny: bool, model: str | None, data: str | None, options: list[str] | None, config: Path | None
) -> list[str]:
    """The options of pipeoptim train that name the same run."""
    words = [] if recipe is None and (model or config) else ["--recipe", recipe or "chars"]
    for option, value in (("--model", model), ("--data", data), ("--config", config)):
        words += [] if value is None else [option, str(value)]
    words += ["--tiny"] if tiny else []
    return words + [word for one in options or () for word in ("--set", one)]


def _from_formula(text: str) -> Profile:
    from pipeoptim.simulate import read_sizes
    from pipeoptim.simulate import synthetic as profile_of

    sizes = read_sizes(text)
    if not sizes.layers:
        raise ConfigError("sizes say nothing of layers, which a profile needs; give --sizes layers=32 as well")
    return profile_of(sizes, sizes.layers)


def _work_of(config: TrainConfig, device: str, how: str, layers: list[str] | None) -> MeasuredModel:
    """What a run of ``config`` trains."""
    from pipeoptim.bench.measured_model import MeasuredModel
    from pipeoptim.train.optimizers import factory
    from pipeoptim.train.setup import read_data

    task, optimizer = read_data(config), factory(config.optimizer)
    module, args, kwargs, *_ = of_config(config)
    _, target = task.train_batch(0, config.batch_size)
    module, (*args, target), kwargs = moved_to(device, module, (*args, target), kwargs)
    return MeasuredModel(
        config.recipe, module, tuple(args), config.batch_size, lambda p: optimizer(p), task.loss, target, kwargs, how, layers
    )


def _own_work(target: str, device: str, how: str, layers: list[str] | None) -> MeasuredModel:
    import torch
    from torch.utils._pytree import tree_leaves

    from pipeoptim.bench.measured_model import MeasuredModel

    def total(output: Any, _: Any) -> Any:
        return torch.stack(
            [t.float().mean() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
        ).sum()

    module, args, kwargs, *_ = own_model(target)
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError(f"model {target!r} returned a model without weights that are trained; return one that has some")
    module, args, kwargs = moved_to(device, module, args, kwargs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
    if not tensors:
        raise ConfigError(
            f"model {target!r} returned a mini-batch without a tensor; return (model, args) with tensors of one row per sample"
        )
    rows = len(tensors[0])
    return MeasuredModel(
        target, module, args, rows, lambda p: torch.optim.AdamW(p, lr=1e-4), total, torch.zeros(rows), kwargs, how, layers
    )
