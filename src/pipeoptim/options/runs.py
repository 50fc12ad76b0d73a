"""The options of a pipeline that a training run has, as its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, field, fields
from typing import Any

from pipeoptim.options.entry import Setting
from pipeoptim.options.table import PROCESS_OPTIONS, PipelineOptions, about


def settings_of(entry: Field[Any]) -> dict[str, Setting]:
    """The settings of a run, by name, that say the option in a field of :class:`PipelineOptions`."""
    option = about(entry)
    if not option.in_runs:
        return dict(option.settings)
    help = option.help[0].upper() + option.help[1:]
    return {entry.name: Setting(entry.default, help, check_value=option.check, type=str(entry.type))}


RUN_SETTINGS = {name: known for entry in fields(PipelineOptions) for name, known in settings_of(entry).items()}
"""All of them."""


def run_setting(name: str) -> Any:
    """The field called ``name`` of :class:`~pipeoptim.options.run_options.RunOptions`."""
    return setting(RUN_SETTINGS[name])


def setting(known: Setting) -> Any:
    """A field of a dataclass whose fields are settings."""
    return field(default=known.default, metadata={"setting": known})


def options_of_run(run: Any, names: Sequence[str] = PROCESS_OPTIONS) -> dict[str, Any]:
    """The options of a pipeline that trains as the settings of ``run`` say, of those called ``names``.

    Raises:
        ConfigError: settings that do not fit together.
    """
    return {
        entry.name: getattr(run, entry.name) if of_run is None else of_run(run)
        for entry in fields(PipelineOptions)
        if entry.name in names and settings_of(entry)
        for of_run in (about(entry).of_run,)
    }
