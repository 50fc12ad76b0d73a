"""``pipeoptim simulate``: how fast a run would be, why it is not faster, and what memory it takes, before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeoptim.cli.new_files import check_new_files
from pipeoptim.cli.settings import given, takes_settings
from pipeoptim.cli.simulations import chosen_profile, show_simulation
from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.methods import Method
    from pipeoptim.simulate import Conditions, Failures, Profile, Scenario


@takes_settings(
    "stages",
    "microbatches",
    "method",
    "slack",
    "overlap",
    "chunks",
    "replicas",
    "prediction",
    "refresh",
    "recompute",
    after="mini_batches",
    defaults=("stages", "microbatches", "method", "slack", "prediction", "chunks", "replicas"),
    stages="Depth D.",
    microbatches="Micro-batches M per mini-batch.",
    method="Training method, for example pipeoptim, pipedream, gpipe, 1f1b, naive; see pipeoptim methods.",
    prediction="in_progress, made anew as --refresh says; refined stands for all other kinds, each of which is a pass over the weights.",
    slack="More micro-batches in flight, as for train: x, or 0,x,0 with one x for each boundary between stages.",
    replicas="Copies of the pipeline, each for its part of every mini-batch.",
)
def simulate(
    profile: Annotated[Path | None, Option(help="A file of pipeoptim profile.")] = None,
    synthetic: Annotated[
        bool, Option("--synthetic", help="Instead of a profile: a transformer on devices and links by formula, see --sizes.")
    ] = False,
    sizes: Annotated[
        str | None,
        Option(
            help="With --synthetic: layers, width, sequence, rows (of a mini-batch), bytes (per number), flops, efficiency, "
            "memory_bandwidth, latency, bandwidth; as width=1024,rows=8. By default one block of width 4096 per stage."
        ),
    ] = None,
    mini_batches: Annotated[int, Option(help="Mini-batches that are fed before the pipeline drains.")] = 100,
    cut: Annotated[str | None, Option(help="Blocks of each stage, as 3,2,2,1; by default the fastest.")] = None,
    delay: Annotated[
        str | None, Option(help="Milliseconds that a message is on its way; one number, or one per boundary between commas.")
    ] = None,
    bandwidth: Annotated[
        str | None, Option(help="GB per second of a link in each direction; one number, or one per boundary between commas.")
    ] = None,
    jitter: Annotated[float | None, Option(help="Sigma of a log-normal factor on every F and B.")] = None,
    straggler: Annotated[list[str] | None, Option(help="17:1.5: stage 17 takes 1.5 times as long; may be repeated.")] = None,
    mtbf: Annotated[float | None, Option(help="Hours between two failures of a device; with --recovery.")] = None,
    recovery: Annotated[float | None, Option(help="Seconds from a failure until training goes on.")] = None,
    checkpoint_every: Annotated[
        float | None, Option(help="With --mtbf: seconds of work between two checkpoints; 600 by default.")
    ] = None,
    checkpoint_seconds: Annotated[
        float | None, Option(help="With --mtbf: seconds that a checkpoint takes; none by default.")
    ] = None,
    draws: Annotated[int | None, Option(help="Runs with different jitter; 20 by default.")] = None,
    seed: Annotated[int | None, Option(help="Of the first of them; 0 by default.")] = None,
    trace: Annotated[Path | None, Option(help="Also write a trace for https://ui.perfetto.dev into this file.")] = None,
    picture: Annotated[Path | None, Option(help="Also draw some mini-batches into this SVG file.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
    **settings: Any,
) -> None:
    """Simulate a run: the engines' own action program with the times of a profile, message by message.

    Nothing is trained. The result is the throughput, with an interval where there is jitter, what every stage's time goes to, its memory
    and version gap, and what the critical path consists of.

    \b
    Examples:
      pipeoptim profile --recipe chars --out chars.json && pipeoptim simulate --profile chars.json --stages 4
          A recipe as measured on this machine, on as many devices.
      pipeoptim simulate --synthetic --stages 64 --microbatches 64 --straggler 17:1.5
          A transformer on 64 devices, of which one is slower than the others.
      pipeoptim simulate --profile chars.json --stages 4 --delay 3 --slack 1
          The same with slow links, and micro-batches enough in flight.
      pipeoptim simulate --synthetic --stages 8 --microbatches 8 --method 1f1b --picture 1f1b.svg
          A method that flushes, as a picture.
      pipeoptim simulate --synthetic --stages 16 --microbatches 16 --mtbf 20000 --recovery 120
          With failures.
    """
    from pipeoptim.simulate.simulate import summary
    from pipeoptim.simulate.timed_events import timed_events
    from pipeoptim.simulate.trace import check_traceable, chrome_trace, drawing, stage_traces

    check_new_files({"--trace": trace, "--picture": picture}, drawn=["--picture"])
    wanted = given(settings)
    conditions = _conditions(delay, bandwidth, jitter, straggler, draws, seed)
    failures = _failures(mtbf, recovery, checkpoint_every, checkpoint_seconds)
    scenario = _scenario(chosen_profile(profile, synthetic, sizes, wanted["stages"]), wanted, mini_batches, cut, conditions)
    if not scenario.jitter and (draws is not None or seed is not None):
        raise ConfigError("--draws and --seed are of jitter, and there is none; give --jitter as well, or leave them out")
    if trace is not None or picture is not None:
        check_traceable(scenario)
    timed = timed_events(scenario)
    found = summary(timed, failures)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show_simulation(found, scenario)
    if trace is not None or picture is not None:
        stages = stage_traces(timed)
        if trace is not None:
            trace.write_text(json.dumps(chrome_trace(stages), separators=(",", ":")), encoding="utf-8")
        if picture is not None:
            picture.write_text(drawing(stages), encoding="utf-8")


def _conditions(
    delay: str | None,
    bandwidth: str | None,
    jitter: float | None,
    straggler: list[str] | None,
    draws: int | None,
    seed: int | None,
) -> Conditions:
    from pipeoptim.simulate import Conditions

    return Conditions(
        delay=_per_boundary("delay", delay, 1e-3),
        bandwidth=_per_boundary("bandwidth", bandwidth, 1e9),
        jitter=jitter,
        stragglers=dict(map(_straggler, straggler or ())),
        draws=20 if draws is None else draws,
        seed=seed or 0,
    )


def _per_boundary(name: str, text: str | None, unit: float) -> float | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(unit * float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, must be a number, or one per boundary between stages: 3 or 0.1,3,0.1") from None
    return found[0] if len(found) == 1 else found


def _straggler(text: str) -> tuple[int, float]:
    stage, _, factor = text.partition(":")
    try:
        return int(stage), float(factor)
    except ValueError:
        raise ConfigError(f"straggler is {text!r}, must be a stage and how many times as long it takes: 17:1.5") from None


def _failures(mtbf: float | None, recovery: float | None, every: float | None, seconds: float | None) -> Failures | None:
    from pipeoptim.simulate import Failures

    if all(given is None for given in (mtbf, recovery, every, seconds)):
        return None
    if mtbf is None or recovery is None:
        raise ConfigError("failures need both --mtbf, hours between two failures of a device, and --recovery, seconds")
    if not mtbf > 0:
        raise ConfigError(f"mtbf is {mtbf:g} hours, must be above 0")
    return Failures(mtbf * 3600, recovery, 600.0 if every is None else every, seconds or 0.0)


def _check_prediction(method: Method, kind: str) -> None:
    """Raises ConfigError where a kind of prediction makes no difference to a simulation."""
    from pipeoptim.config import SETTINGS

    if kind == SETTINGS["prediction"].default:
        return
    if kind != "in_progress":
        raise ConfigError(
            f"prediction is {kind!r}, which a simulation does not tell from others (each is a pass over the weights); leave it out, or "
            "simulate 'in_progress', or a method without predictions"
        )
    if not method.predicts_by_rule:
        raise ConfigError(f"prediction is {kind!r}, but {method.name} makes no such predictions; leave it out")


def _scenario(profile: Profile, wanted: dict[str, Any], minibatches: int, cut: str | None, conditions: Conditions) -> Scenario:
    from pipeoptim.config import read_cut
    from pipeoptim.methods import get_method, refresh_every
    from pipeoptim.schedule import read_slack
    from pipeoptim.simulate import Scenario, even_cut

    method, depth, m = get_method(wanted["method"]), wanted["stages"], wanted["microbatches"]
    if depth % wanted["chunks"]:
        raise ConfigError(f"chunks is {wanted['chunks']}, must divide the {depth} stages")
    program = method.program(depth, m, depth // wanted["chunks"], bool(wanted.get("overlap")), read_slack(wanted["slack"]))
    _check_prediction(method, wanted["prediction"])
    rows = profile.batch_rows / (m * wanted["replicas"])
    speeds = [1 / conditions.stragglers.get(k, 1.0) for k in range(depth)]
    return Scenario(
        profile,
        tuple(read_cut(cut)) if cut else even_cut(profile, depth, rows, speeds),
        method,
        program,
        minibatches,
        wanted["replicas"],
        refresh_every(wanted["prediction"], wanted.get("refresh") or None),
        wanted.get("recompute", ""),
        conditions=conditions,
    )
