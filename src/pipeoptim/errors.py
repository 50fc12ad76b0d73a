"""The errors that users see: one sentence each, with the value, the reason and what to do."""

from __future__ import annotations


class PipeOptimError(Exception):
    """Base of every error that PipeOptim raises on purpose."""


class ConfigError(PipeOptimError, ValueError):
    """Input that cannot work, found before any work started. The command line ends with exit code 2."""


class StageFailure(PipeOptimError, RuntimeError):
    """Another stage died or stopped answering; the message names it."""
