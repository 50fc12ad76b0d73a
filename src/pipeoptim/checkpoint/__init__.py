"""Surviving: checkpoints that are complete or absent, never half. Taken where the pipeline is drained.

``checkpoints/step-000200/`` holds one ``stage-<k>.pt`` per stage and ``meta.json`` with sizes and SHA-256 sums. It is
written beside its place and renamed when complete; what a crash leaves half-written is never taken for a checkpoint.
"""

from pipeoptim.checkpoint.meta import Meta, TornError, folder_name, read_meta, verify
from pipeoptim.checkpoint.read import Found, find, load_stage
from pipeoptim.checkpoint.write import save

__all__ = ["Found", "Meta", "TornError", "find", "folder_name", "load_stage", "read_meta", "save", "verify"]
