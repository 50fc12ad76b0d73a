"""From a folder to its ``report.html``."""

from __future__ import annotations

import shlex
from pathlib import Path

from pipeoptim.compare.api import write_summaries
from pipeoptim.compare.folder import ComparisonFolder, write_text
from pipeoptim.compare.outcome import read_run
from pipeoptim.compare.report import cost_sections, sections
from pipeoptim.compare.report.page import page
from pipeoptim.compare.report.prediction import predictions
from pipeoptim.compare.report.series import axis_top, chart_data, comparison_series, run_series
from pipeoptim.files import reading
from pipeoptim.train.rundir import RunDir


def write_report(path: Path) -> Path:
    """Render the comparison in ``path`` anew from its runs, with its summaries.

    Raises:
        ConfigError: there is no comparison, or it is damaged.
    """
    with reading(path):
        return _write_report(path)


def _write_report(path: Path) -> Path:
    folder = ComparisonFolder(path)
    about, comparison = folder.read_about(), write_summaries(folder)
    config = comparison.settings.config
    series = comparison_series(comparison)
    body = [
        sections.headline(comparison),
        sections.charts(series, len(comparison.settings.seeds)),
        sections.table(comparison),
        sections.notes(comparison),
        sections.methods(comparison.settings.methods, config, series),
        sections.setup(config, about["machine"], about["command"], comparison),
    ]
    title = f"{config.recipe}: methods compared"
    write_text(folder.report, page(title, body, chart_data(series, axis_top(series))))
    return folder.report


def write_run_report(path: Path) -> Path:
    """Render the curves and facts of the one run in ``path``.

    Raises:
        ConfigError: there is no run, it has no figures yet, or it is damaged.
    """
    with reading(path):
        return _write_run_report(path)


def _write_run_report(path: Path) -> Path:
    config = RunDir(path).read_config()
    run = read_run(config, path)
    series = run_series(run)
    section, measured = predictions(path)
    body = [
        sections.run_headline(run, config),
        sections.charts(series),
        sections.stages(path),
        section,
        sections.trace(path),
        sections.methods((config.method,), config, []),
        cost_sections.account(path),
        sections.setup(config, run.machine, _again(path), None, run.versions, run.data),
    ]
    out = path / "report.html"
    data = chart_data(series, axis_top(series)) | {"prediction": measured}
    write_text(out, page(f"{path.resolve().name}: {config.method}", body, data))
    return out


def _again(path: Path) -> str:
    """The command that trains the same once more."""
    return shlex.join(["pipeoptim", "train", "--config", str(RunDir(path).config), "--name", f"{path.resolve().name}-again"])
