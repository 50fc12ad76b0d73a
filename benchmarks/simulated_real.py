"""How wrong ``pipeoptim simulate`` is for models that are really computed: a model's predictions first, then its runs one by one.

python benchmarks/simulated_real.py run        of one model after the other, profiles it, writes its predictions to
                                               results/simulated_real_predictions.json, then measures its runs: results/simulated_real.json;
                                               all of that --rounds times
python benchmarks/simulated_real.py memory     peak bytes of each stage, counted and measured; writes results/simulated_memory.json
python benchmarks/simulated_real.py show       the errors

Two stages, each in a process on a core of its own: five methods, four models, one and four micro-batches. A round of ``run`` takes
7 to 11 minutes, on two cores that do nothing else. It may be stopped at any time and goes on where it was; predictions that are there are
never written again. A machine that shares its host may be a tenth faster or slower in the next run, and again some minutes later: each
model's runs follow its profile, and a run's error is the median over the rounds of what was predicted by that round's profile over what
was measured in it. To try it: --folder /tmp/try --divide 16 --repeats 5 --steps 10 --rounds 1.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from predicted_runs import add_predictions, measure, show, undisturbed

from pipeoptim.bench.computed import STEPS, ComputedRun, best_lengths, busy_profile, counted_profile
from pipeoptim.bench.link_profile import measure_link
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.simulate import Profile

RESULTS = Path(__file__).parent / "results"
PREDICTIONS, MEASURED, MEMORY = "simulated_real_predictions.json", "simulated_real.json", "simulated_memory.json"
METHODS = ("gpipe", "1f1b", "naive", "pipedream", "pipeoptim")
MODELS = {"mlp": 1024, "pipeoptim_zoo.speed:gpt": 32, "pipeoptim_zoo.speed:resnet26": 32, "pipeoptim_zoo.speed:gnmt8": 256}
"""And rows of their mini-batch, so that F and B of one take 50 to 150 ms per stage."""
MICROBATCHES = (1, 4)
DEPTH = 2


def predict(model: str, repeats: int, divide: int) -> dict[str, Any]:
    """What the runs of a model are expected to reach."""
    link, beside_link = undisturbed(lambda: measure_link(repeats))
    profile, beside = undisturbed(lambda: busy_profile(model, MODELS[model] // divide, MICROBATCHES, repeats, link))
    found = {"load": os.getloadavg()[0], "link": link._asdict(), "other cores": {"link": beside_link, "profile": beside}}
    return {"rows": _of_model(profile, model), **found}


def _of_model(profile: Profile, model: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for m in MICROBATCHES:
        lengths = best_lengths(profile, DEPTH, m)
        for method in METHODS:
            run = ComputedRun(model, profile.batch_rows, method, m, lengths)
            found = run.predict(profile)
            rows.append({"name": run.name, "run": asdict(run), "predicted": found.throughput.median})
            print(f"{run.name}: {found.throughput.median:.4g} mini-batches/s, cut {lengths}", flush=True)
    return rows


def memory(folder: Path, divide: int) -> None:
    """Peak bytes of every stage, which other work on the machine does not change."""
    settings = {"optimizer": "AdamW", "methods": len(METHODS), "micro-batches": "1 and 4", "looked at": "after every action"}
    record = Record("simulated memory", "bytes", settings, [])
    for model, batch in MODELS.items():
        profile = counted_profile(model, batch // divide, MICROBATCHES)
        cut = even(profile)
        for method, m in product(METHODS, MICROBATCHES):
            run = ComputedRun(model, profile.batch_rows, method, m, cut)
            simulated = [stage.memory for stage in run.predict(profile).stages]
            for k, (own, peak) in enumerate(zip(simulated, run.peaks(), strict=True)):
                record.rows.append(
                    ResultRow(f"{run.name} stage {k}", [float(peak)], {**asdict(run), "stage": k, "simulated": own})
                )
            record.write(folder / MEMORY)
            print(
                f"{run.name}: " + ", ".join(f"{r.settings['simulated'] / r.median - 1:+.2%}" for r in record.rows[-2:]),
                flush=True,
            )


def even(profile: Profile) -> tuple[int, ...]:
    """A cut by the number of blocks, since nothing takes time."""
    half = len(profile.blocks) // 2
    return half, len(profile.blocks) - half


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "memory", "show"))
    parser.add_argument("--repeats", type=int, default=15, help="mini-batches that a figure of a profile is the median of")
    parser.add_argument("--steps", type=int, default=STEPS, help="mini-batches that are timed in a run")
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often every model is profiled, and its runs measured after it"
    )
    parser.add_argument("--divide", type=int, default=1, help="rows of mini-batches are divided by it, to try the script")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where both files are")
    arguments = parser.parse_args()
    predictions, measured = arguments.folder / PREDICTIONS, arguments.folder / MEASURED
    if arguments.what == "run":
        settings = {"mini-batches": arguments.steps, "each stage": "on a core of its own"}

        def run_of(run: dict[str, Any]) -> ComputedRun:
            return replace(ComputedRun(**run), steps=arguments.steps)

        for n, model in product(range(1, arguments.rounds + 1), MODELS):
            add_predictions(predictions, f"{model}, round {n}", partial(predict, model, arguments.repeats, arguments.divide))
            measure(predictions, measured, "simulated real", settings, run_of, alone=True)
    elif arguments.what == "memory":
        memory(arguments.folder, arguments.divide)
    else:
        show(measured)


if __name__ == "__main__":
    main()
