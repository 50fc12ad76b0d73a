"""``pipeoptim export``: the weights of a run as a model that other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def export(
    run: Annotated[Path, Argument(help="Folder of the run.")],
    out: Annotated[
        Path | None, Option(help="Where they go, a folder that does not exist; by default model in the run, which is replaced.")
    ] = None,
) -> None:
    """Write the weights of a run that was trained without --export, from its newest checkpoint.

    They are safetensors under the names of the model, beside config.json and tokenizer where it has them: what from_pretrained loads.
    Of a run with the callback best_checkpoint they are those of the best checkpoint. All stages are in this process meanwhile.

    \b
    Examples:
      pipeoptim export runs/causal_lm-pipeoptim
          Into runs/causal_lm-pipeoptim/model.
      pipeoptim export runs/chars-pipeoptim --out chars-model
          Into a folder of your choice.
    """
    from pipeoptim.train.export import export_run

    folder, step = export_run(run, out)
    print(f"{folder}: the weights after {step} mini-batches")
