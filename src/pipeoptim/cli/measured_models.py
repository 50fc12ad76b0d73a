"""The model and the mini-batch that a command measures: those of a configuration, or of a function of the user's own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeoptim.errors import ConfigError, first_line

if TYPE_CHECKING:
    from pipeoptim.config import TrainConfig

MeasuredModelOption = Annotated[
    str | None,
    Option(help="module:function of your own, instead of a recipe: returns (model, args[, kwargs]); with --data, the model."),
]


def of_config(config: TrainConfig) -> tuple[Any, tuple[Any, ...], dict[str, Any], int | None, int]:
    """Model, arguments, depth and M of a run."""
    import torch

    from pipeoptim.train.setup import build_model, read_data, seeded
    from pipeoptim.train.stagewise import StagewiseModel

    torch.set_num_threads(config.threads)
    x, _ = read_data(config).train_batch(0, config.batch_size)
    made = build_model(config)
    with seeded(config.seed):
        model = made.whole() if isinstance(made, StagewiseModel) else made  # measured, so it needs its weights
    return model, (x,), {}, config.stages, config.microbatches


def own_model(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], int | None, int]:
    """The same of a function of the user's own, which may lie in the folder where the command runs."""
    from torch import nn

    from pipeoptim.train.targets import call, load

    made = call("model", load("model", target), target)
    parts = tuple(made) if isinstance(made, tuple) else (made,)
    known = len(parts) in (2, 3) and isinstance(parts[0], nn.Module) and isinstance(parts[1], tuple)
    if not known or (len(parts) == 3 and not isinstance(parts[2], dict)):
        got = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(
            f"model {target!r} returned ({got}), must return (model, args) or (model, args, kwargs): an nn.Module, the tuple of its "
            "positional arguments and the dict of its keyword arguments for one mini-batch"
        )
    return parts[0], parts[1], parts[2] if len(parts) == 3 else {}, None, 1


def moved_to(device: str, model: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """All on ``device``."""
    import torch
    from torch.utils._pytree import tree_map_only

    from pipeoptim.engine.marks import MARKS

    try:
        to_device = partial(tree_map_only, torch.Tensor, lambda t: t.to(device))
        marked = tree_map_only(MARKS, lambda mark: replace(mark, value=to_device(mark.value)), (args, kwargs))
        return model.to(device), *to_device(marked)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device is {device!r}, which cannot be used here: {first_line(error)}") from error
