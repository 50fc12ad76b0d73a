"""``pipeoptim report``: render the page of a comparison, or of one run, anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from pipeoptim.errors import ConfigError


def report(
    directory: Annotated[Path, Argument(help="Folder of a comparison or of a run, for example runs/compare-chars.")],
) -> None:
    """Write report.html from what a comparison or a run left in its folder.

    The page holds everything it shows, plotly.js included, and opens without a network.

    \b
    Examples:
      pipeoptim report runs/compare-chars
          All methods of a comparison, as far as it has come.
      pipeoptim report runs/chars-pipeoptim
          The curves of one run.
    """
    from pipeoptim.compare.folder import Folder
    from pipeoptim.compare.report import write_report, write_run_report

    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a folder; name that of a comparison or of a run")
    if Folder(directory).about.exists():
        print(f"report: {write_report(directory)}")
    elif (directory / "config.json").exists():
        print(f"report: {write_run_report(directory)}")
    else:
        raise ConfigError(f"{directory} holds no comparison (compare.json) and no run (config.json); check the path")
