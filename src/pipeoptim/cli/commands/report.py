"""``pipeoptim report``: render the page of a comparison, of one run or of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pipeoptim.errors import ConfigError


def report(
    directory: Annotated[
        Path, Argument(help="Folder of a comparison, of a run or of a trace, as runs/compare-chars; or a file of plan --out.")
    ],
    cost: Annotated[Path | None, Option(help="Of a plan: a file of pipeoptim cost --out, for the same page.")] = None,
) -> None:
    """Write report.html from what a comparison or a run left in its folder, or the page of a plan beside its file.

    The page holds everything it shows and opens without a network.

    \b
    Examples:
      pipeoptim report runs/compare-chars
          All methods of a comparison, as far as it has come.
      pipeoptim report runs/chars-pipeoptim
          The curves of one run, and where its time went if it was run with --trace.
      pipeoptim report trace
          What a script saved with pipeoptim.Trace: merged to one trace and a picture; no page.
      pipeoptim report plan.json --cost cost.json
          A plan, its simulated timeline, the memory of its stages, alternatives and costs, in plan.html.
    """
    if cost is not None and not directory.is_file():
        raise ConfigError(
            f"--cost belongs to a plan, and {directory} is no file; leave it out, or name a file of pipeoptim plan --out"
        )
    if directory.is_file():
        from pipeoptim.compare.report import write_plan_report

        print(f"report: {write_plan_report(directory, cost)}")
        return
    from pipeoptim.compare.folder import ComparisonFolder
    from pipeoptim.compare.report import write_report, write_run_report

    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is not a folder, and no file of a plan; name that of a comparison, of a run or of a trace"
        )
    if ComparisonFolder(directory).about.exists():
        print(f"report: {write_report(directory)}")
    elif (directory / "config.json").exists():
        print(f"report: {write_run_report(directory)}")
    elif (directory / "stage-0.json").exists():
        from pipeoptim.telemetry.trace import merge_trace

        print(merge_trace(directory).to_text())
    else:
        raise ConfigError(
            f"{directory} holds no comparison (compare.json), no run (config.json) and no trace (stage-0.json); check the path"
        )
