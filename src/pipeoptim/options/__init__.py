"""The options of a pipeline, each told once.

A new option is one entry: a field of :class:`PipelineOptions` in :mod:`.table`. ``Emulator``, ``Schedule`` and ``InterleavedSchedule``
take their keyword arguments, signatures, docstrings and checks from it; training runs and the command line, where the entry says how a
run spells the option, their settings. What type checkers need is written out by :mod:`.generate`. Where an option takes effect, it is read
as ``options.<name>``.

Nothing here imports torch, so that the command line answers at once.
"""

from pipeoptim.options.documents import document, takes_options
from pipeoptim.options.entry import Option, Setting
from pipeoptim.options.function_types import LossWeight, UpdateHook
from pipeoptim.options.keywords import OptionKeywords, ProcessKeywords
from pipeoptim.options.run_options import RunOptions
from pipeoptim.options.runs import RUN_SETTINGS, options_of_run, setting, settings_of
from pipeoptim.options.table import (
    DEFAULTS,
    OPTIONS,
    PROCESS_OPTIONS,
    RENAMED,
    PipelineOptions,
    about,
    read_option,
)

__all__ = [
    "DEFAULTS",
    "OPTIONS",
    "PROCESS_OPTIONS",
    "RENAMED",
    "RUN_SETTINGS",
    "LossWeight",
    "Option",
    "OptionKeywords",
    "PipelineOptions",
    "ProcessKeywords",
    "RunOptions",
    "Setting",
    "UpdateHook",
    "about",
    "document",
    "options_of_run",
    "read_option",
    "setting",
    "settings_of",
    "takes_options",
]
