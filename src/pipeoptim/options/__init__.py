"""The options of a pipeline, each told once.

``Emulator``, ``Schedule`` and ``InterleavedSchedule`` take their keyword arguments, signatures, docstrings and checks from here, and
``pipeoptim train`` the meaning of those that it offers under the same name. A new option is a field of :class:`PipelineOptions`
(:mod:`.table`) and, in :mod:`.keywords`, its type as users give it; where it takes effect, it is read as ``options.<name>``.

Nothing here imports torch, so that the command line answers at once.
"""

from pipeoptim.options.documents import document, takes_options
from pipeoptim.options.keywords import LossWeight, OptionKeywords, ProcessKeywords, UpdateHook
from pipeoptim.options.table import (
    DEFAULTS,
    OPTIONS,
    PROCESS_OPTIONS,
    RENAMED,
    Option,
    PipelineOptions,
    about,
    option_named,
    read_option,
)

__all__ = [
    "DEFAULTS",
    "OPTIONS",
    "PROCESS_OPTIONS",
    "RENAMED",
    "LossWeight",
    "Option",
    "OptionKeywords",
    "PipelineOptions",
    "ProcessKeywords",
    "UpdateHook",
    "about",
    "document",
    "option_named",
    "read_option",
    "takes_options",
]
