"""``pipeoptim report``: render the page of a comparison or of one run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from pipeoptim.errors import ConfigError


def report(
    directory: Annotated[
        Path, Argument(help="Folder of a comparison, of a run or of a trace, for example runs/compare-chars.")
    ],
) -> None:
    """Write report.html from what a comparison or a run left in its folder.

    The page holds everything it shows and opens without a network.

    \b
    Examples:
      pipeoptim report runs/compare-chars
          All methods of a comparison, as far as it has come.
      pipeoptim report runs/chars-pipeoptim
          The curves of one run, and where its time went if it was run with --trace.
      pipeoptim report trace
          What a script saved with pipeoptim.Trace: merged to one trace and a picture; no page.
    """
    from pipeoptim.compare.folder import ComparisonFolder
    from pipeoptim.compare.report import write_report, write_run_report

    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a folder; name that of a comparison, of a run or of a trace")
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
