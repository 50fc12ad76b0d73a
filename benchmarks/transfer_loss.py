"""What compressed transfer does to the validation loss: the default recipe's tiny form, several seeds, on the emulator.

``python benchmarks/transfer_loss.py`` trains it with every way of sending activations and gradients, evaluates with everything
sent as it is (the loss of the weights that are saved), and writes ``benchmarks/results/transfer_loss.json``. How much of a
difference is chance is shown by a run that differs from the plain one in nothing but the last digits of its learning rate: much
at the recipe's own rate, where rounding grows into another run, and very little at a third of it. About twelve minutes.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

from pipeoptim.bench.record import Record, ResultRow, merged
from pipeoptim.train import run
from pipeoptim.train.recipes import get_recipe

CONTROL = "as it is, lr times 1.000001"
RATES = (1e-3, 3e-3)
WAYS = [("as it is", "none"), (CONTROL, "none"), ("bf16", "none"), ("bf16", "both")]
WAYS += [("int8", "none"), ("int8", "gradients"), ("int8", "both")]
CASES = list(itertools.product(RATES, WAYS))


def loss(rate: float, sent: str, feedback: str, seed: int) -> float:
    """Validation loss at the end of a run."""
    config = replace(get_recipe("chars", True), error_feedback=feedback, seed=seed, eval_every=0, eval_batches=32)
    own = rate * 1.000001 if sent == CONTROL else rate
    config = replace(config, optimizer=config.optimizer.with_options(lr=own))
    if sent in ("bf16", "int8"):
        config = replace(config, compress=sent)
    with tempfile.TemporaryDirectory() as folder:
        found = run(config, Path(folder) / "run", progress=False).val_loss
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", type=int, choices=range(len(CASES)), help="one case; the file keeps its other rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/transfer_loss.json"))
    options = parser.parse_args()
    rows = []
    for rate, (sent, feedback) in CASES if options.only is None else [CASES[options.only]]:
        samples = [loss(rate, sent, feedback, seed) for seed in range(options.seeds)]
        name = f"lr {rate:g}, {sent}, error feedback {feedback}"
        rows.append(ResultRow(name, samples, {"lr": rate, "sent": sent, "error_feedback": feedback}))
        print(f"{name:60} {' '.join(f'{s:.4f}' for s in samples)}", flush=True)
    config = get_recipe("chars", True)
    settings = {"recipe": config.recipe, "stages": config.stages, "microbatches": config.microbatches, "steps": config.steps}
    record = Record("transfer loss", "validation loss", {**settings, "seeds": options.seeds}, rows)
    if options.only is not None and options.out.is_file():
        record = merged(Record.read(options.out), record)
    print(f"written to {record.write(options.out)}")


if __name__ == "__main__":
    main()
