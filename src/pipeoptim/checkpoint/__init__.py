"""Checkpoints that are complete or absent, never half. They are taken while the pipeline is drained.

``checkpoints/step-000200/`` holds one ``stage-<k>.safetensors`` per stage and ``meta.json`` with sizes and SHA-256 sums. It is
written beside its place and renamed when complete; what a crash leaves half-written is never taken for a checkpoint.

For use outside a run there are the weights under the names of the original model, as safetensors, and sharded checkpoints that
another number of stages can resume from.
"""

from pipeoptim.checkpoint.background_writer import BackgroundWriter
from pipeoptim.checkpoint.checkpointer import Checkpointer
from pipeoptim.checkpoint.find_checkpoint import Found, find, load_stage
from pipeoptim.checkpoint.health import sick_entry, sick_weight
from pipeoptim.checkpoint.manifest import Meta, OtherFormatError, TornError, folder_name, read_meta, verify
from pipeoptim.checkpoint.sharded import load_sharded, save_sharded
from pipeoptim.checkpoint.weight_files import load_weights
from pipeoptim.checkpoint.weights import check_export, full_state_dict, save_weights
from pipeoptim.checkpoint.write_checkpoint import save, unfinished_checkpoints

__all__ = [
    "BackgroundWriter",
    "Checkpointer",
    "Found",
    "Meta",
    "OtherFormatError",
    "TornError",
    "check_export",
    "find",
    "folder_name",
    "full_state_dict",
    "load_sharded",
    "load_stage",
    "load_weights",
    "read_meta",
    "save",
    "save_sharded",
    "save_weights",
    "sick_entry",
    "sick_weight",
    "unfinished_checkpoints",
    "verify",
]
