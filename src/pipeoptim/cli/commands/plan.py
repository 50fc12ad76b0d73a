"""``pipeoptim plan``: where to cut a model and what each method will cost, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeoptim.cli.measured_models import MeasuredModelOption, moved_to, of_config, own_model
from pipeoptim.cli.new_files import check_new_files
from pipeoptim.cli.plan_options import SearchOptions, search_plan
from pipeoptim.cli.settings import ConfigFileOption, DataOption, SetOption, TinyOption, given, takes_settings
from pipeoptim.errors import ConfigError, counted

if TYPE_CHECKING:
    from pipeoptim.partitioning import Partition
    from pipeoptim.schedule import Slack


@takes_settings(
    "stages",
    "microbatches",
    "method",
    "slack",
    "prediction",
    "refresh",
    after="data",
    defaults=("method", "slack", "prediction"),
    stages="Depth; by default the recipe's, or with --devices the fastest.",
    microbatches="Micro-batches per mini-batch; by default the recipe's, or 1.",
    method="The method whose memory counts for the cut.",
    slack="More micro-batches in flight, as for train: x, or 0,x,0 with one x for each boundary between stages.",
)
def plan(
    recipe: Annotated[str | None, Option(help="Whose model and mini-batch, as for train; chars by default.")] = None,
    tiny: TinyOption = False,
    model: MeasuredModelOption = None,
    data: DataOption = None,
    set_options: SetOption = None,
    config_file: ConfigFileOption = None,
    from_run: Annotated[
        Path | None,
        Option(
            help="Folder of a run, instead of a recipe: cut its model anew by how long its stages took, for --resume --cut."
        ),
    ] = None,
    how: Annotated[str, Option(help="blocks, layers, trace, or auto.")] = "auto",
    layers: Annotated[list[str] | None, Option(help="Name of a list of layers in the model; found by itself.")] = None,
    speed: Annotated[list[float] | None, Option(help="Relative speed of each stage's device; once per stage.")] = None,
    memory: Annotated[
        list[float] | None, Option(help="GiB of each stage's device; once per stage, with --devices just once.")
    ] = None,
    devices: Annotated[
        int | None,
        Option(
            help="Equal devices to use. With --objective all stages have equally many replicas, as runs have; without it, and with "
            "--bandwidth, stages may have different numbers, which a run cannot have."
        ),
    ] = None,
    bandwidth: Annotated[float | None, Option(help="GB per second between devices; unlimited by default.")] = None,
    pin: Annotated[
        list[str] | None, Option(help="A block, by number or name, with which a stage must begin; may be repeated.")
    ] = None,
    device: Annotated[str, Option(help="Where to measure: cpu, cuda, ...")] = "cpu",
    blocks: Annotated[bool, Option("--blocks", help="Also list what each block costs: seconds and bytes.")] = False,
    picture: Annotated[Path | None, Option(help="Also draw the stages into this SVG file.")] = None,
    svg: Annotated[Path | None, Option(help="Also draw the schedule of the method into this SVG file.")] = None,
    objective: Annotated[
        str | None,
        Option(
            help="Search depth, replicas, M, slack, recomputation and cut on --devices by simulation, for the least time, cost "
            "(devices x time) or memory of a device. Give --profile or --synthetic."
        ),
    ] = None,
    profile: Annotated[Path | None, Option(help="With --objective: a file of pipeoptim profile.")] = None,
    synthetic: Annotated[bool, Option("--synthetic", help="With --objective: a transformer by formula.")] = False,
    sizes: Annotated[str | None, Option(help="With --synthetic: as for simulate; with layers=N.")] = None,
    nodes: Annotated[
        str, Option(help="With --objective: devices of a node, nodes of a site, ...: 8,4; the outermost level takes the rest.")
    ] = "",
    links: Annotated[
        str | None,
        Option(help="With --objective: links of each level, from the inside, as GB/s:milliseconds: 100:0.01,25:0.05,1:20."),
    ] = None,
    also: Annotated[list[str] | None, Option(help="With --objective: another method to choose from; may be repeated.")] = None,
    seconds: Annotated[
        float | None, Option(help="With --objective: end the search after that time, with the best so far.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="With --objective: also write the plan and its alternatives into this JSON file.")
    ] = None,
    **settings: Any,
) -> None:
    """Measure a model's blocks on this machine, cut it, and say what every method will cost.

    The cut is the best contiguous one for the slowest stage, under the memory limits and pins that are given. Nothing is
    trained and nothing is written, unless --picture, --svg or --out ask for it.

    \b
    Examples:
      pipeoptim plan --stages 2
          The default recipe on two stages.
      pipeoptim plan --recipe resnet101-tinyimagenet --tiny --stages 4 --speed 1 --speed 1 --speed 2 --speed 2
          The last two devices are twice as fast.
      pipeoptim plan --stages 4 --pin 3 --memory 1 --memory 1 --memory 1 --memory 2
          A stage begins with block 3, and the devices have 1, 1, 1 and 2 GiB.
      pipeoptim plan --devices 4 --bandwidth 10
          As many stages on 4 devices as are fastest, some perhaps replicated.
      pipeoptim plan --model mine:gpt2 --stages 4 --pin transformer.h.3 --picture stages.svg
          A model of your own: mine.py in this folder has a function gpt2 that returns the model and a mini-batch.
      pipeoptim plan --from-run runs/chars-pipeoptim
          Stages of that run were slower than others: blocks move to those that are faster.
      pipeoptim plan --objective time --profile gpt2.json --devices 16 --memory 40 --nodes 8 --links 100:0.01,10:0.05
          How to train on 16 devices of 40 GiB in two nodes, what comes next to it, and the command line for it.
      pipeoptim plan --model mine:gpt2 --stages 2 --blocks
          Also what each layer costs: milliseconds of its forward and backward, bytes of activations and weights.
    """
    search = SearchOptions(objective, profile, synthetic, sizes, nodes, links, also, seconds, out)
    wanted = given(settings)
    if objective is not None:
        measuring = (
            recipe,
            tiny,
            model,
            data,
            set_options,
            config_file,
            from_run,
            layers,
            pin,
            blocks,
            picture,
            svg,
        )
        if any(measuring) or bandwidth is not None or how != "auto" or device != "cpu":
            raise ConfigError("--objective plans from a profile; leave the options that name, measure or draw a model out")
        search_plan(search, devices, memory, speed, wanted)
        return
    search.check_absent()
    from pipeoptim.kernels.allocation import keep_freed_memory
    from pipeoptim.methods import get_method, refresh_every
    from pipeoptim.partitioning import partition
    from pipeoptim.partitioning.block_splitter import sliceable
    from pipeoptim.schedule import read_slack
    from pipeoptim.train.config_file import chosen_run
    from pipeoptim.train.measured_run import read_measured_run

    keep_freed_memory()
    chosen, slack = get_method(wanted["method"]), read_slack(wanted["slack"])
    refresh = refresh_every(wanted["prediction"], wanted.get("refresh") or None)
    check_new_files({"--picture": picture, "--svg": svg}, drawn=["--picture", "--svg"])
    if model is not None and (recipe is not None or tiny):
        other = f"recipe {recipe!r}" if recipe is not None else "--tiny, which is of recipes,"
        raise ConfigError(f"model {model!r} and {other} were given; leave one out")
    if model is not None and data is None and (set_options or config_file):
        option = "--set" if set_options else "--config"
        raise ConfigError(f"{option} changes a recipe, and {model!r} returns model and mini-batch by itself; leave one out")
    others = (model, data, recipe, tiny, set_options, config_file, speed, devices)
    if from_run is not None and any(others):
        raise ConfigError(
            "--from-run has the run's own model and speeds; leave --model, --data, --recipe, --tiny, --set, --config, --speed and "
            "--devices out"
        )
    measured = None if from_run is None else read_measured_run(from_run)
    limits = [_bytes(gib) for gib in memory] if memory else None
    if model is not None and data is None:
        module, args, kwargs, depth, m = own_model(model)
    else:
        config = (
            measured.config if measured else chosen_run(recipe, tiny, config_file, model, data, "chars", set_options or ())[0]
        )
        module, args, kwargs, depth, m = of_config(config)
    module, args, kwargs = moved_to(device, module, args, kwargs)
    m = wanted.get("microbatches", m)
    stages = wanted.get("stages", depth if devices is None else None)
    costs = None
    if measured is not None:
        chosen = get_method(measured.config.method)
        own = "blocks" if sliceable(module) else "layers"  # as runs cut: it is blocks of this kind that its stages have
        costs = partition(module, stages, args, kwargs, how=own, microbatches=m).costs
        how = own if how == "auto" else how
        speed = measured.speeds(costs, stages)
    found = partition(
        module,
        stages,
        args,
        kwargs,
        how=how,
        layers=layers,
        costs=costs,
        speeds=speed,
        memory=limits,
        devices=devices,
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
        pins=[int(p) if p.isdigit() else p for p in pin or ()],
        method=chosen,
        microbatches=m,
        slack=slack,
        refresh=refresh,
    )
    if blocks:
        print(found.blocks_text())
    _show(found, len(found.stages), m, slack, refresh)
    if len(set(found.replicas)) > 1:
        print(
            "a run has whole copies of the pipeline, so it cannot have stages with different numbers of replicas: see --objective"
        )
    if measured is not None:
        print(measured.advice(found.lengths))
    if picture is not None:
        picture.write_text(found.to_svg())
        print(f"stages drawn in {picture}")
    if svg is not None:
        from pipeoptim.schedule import to_svg

        program = chosen.program(len(found.stages), m, slack=slack)
        svg.write_text(to_svg(program, max(2, 2 * program.warm_up // m)))
        print(f"schedule drawn in {svg}")


def _bytes(gib: float) -> int:
    if not 0 < gib < float("inf"):
        raise ConfigError(f"memory is {gib:g}, must be a positive number of GiB; leave it out where there is no limit")
    return int(gib * 2**30)


def _show(found: Partition, depth: int, m: int, slack: Slack, refresh: int | None) -> None:
    from rich.table import Column, Table

    from pipeoptim.methods import METHODS, copies
    from pipeoptim.partitioning.forecast import seconds_per_minibatch
    from pipeoptim.schedule import ORDERS
    from pipeoptim.telemetry.console import table_console

    print(found.to_text())
    table = Table(Column("method", no_wrap=True), "mini-batches/s", "busy", "largest gap", "most copies", "why not")
    for name, method in sorted(METHODS.items()):
        try:
            # Those that flush have none, and are shown beside the others.
            program = method.program(depth, m, slack=0.0 if ORDERS[method.order].flushes else slack)
        except ConfigError as error:
            table.add_row(name, "", "", "", "", str(error))
            continue
        seconds = seconds_per_minibatch(program, found.seconds)
        busy = sum(found.seconds) / (depth * seconds)
        gaps = max(program.steady_gap(k) for k in range(depth))
        anew = refresh if method.predicts_by_rule else None
        most = max(copies(method, depth, m, k, program=program, refresh=anew) for k in range(depth))
        table.add_row(name, f"{1 / seconds:.3g}", f"{busy:.0%}", str(gaps), str(most), "")
    table_console().print(table)
    print(
        f"{counted(depth, 'stage')}, {counted(m, 'micro-batch')} per mini-batch; forecast from the measured blocks, without transfers and "
        "updates"
    )
