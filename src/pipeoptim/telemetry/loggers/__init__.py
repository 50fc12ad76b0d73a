"""Where the figures of a run go besides ``metrics.jsonl``: one file per tool, each with its ``LOGGER`` and the ``PACKAGE`` it needs.

A tool of one's own is a class with the same two methods, named as ``module:Class``. Nothing is imported before a run asks for it.
"""

from pipeoptim.telemetry.loggers.registry import LOGGERS, check_installed, logger_class
from pipeoptim.telemetry.loggers.run_logger import LoggedRun, RunLogger

__all__ = ["LOGGERS", "LoggedRun", "RunLogger", "check_installed", "logger_class"]
