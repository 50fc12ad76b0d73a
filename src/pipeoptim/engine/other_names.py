"""Names that a script for one model or for torch's schedules calls, and what a pipeline has in their place."""

from __future__ import annotations

OTHER_NAMES = {
    "state_dict": "po.full_state_dict(pipe) returns the weights of all stages under the model's names, stage_state_dict(k) all of stage k",
    "load_state_dict": "load the weights into the model before it is cut, or go on from a checkpoint: po.Checkpointer, po.load_sharded",
    "parameters": "the parameters are the model's: po.full_state_dict(pipe), or stage_module(k).parameters() of a stage of this process",
    "optimizer": "it is the one you gave; to keep hold of it, make the optimizers yourself and give them, one per stage",
    "optimizers": "they are those you gave; to keep hold of them, make them yourself and give a list of one per stage",
    "train": "step() trains; a stage's mode is stage_module(k).train()",
    "eval": "evaluate() and eval_step() switch to evaluation and back by themselves",
    "forward": "step() trains on a mini-batch, eval_step() evaluates one",
    "backward": "step() runs the backwards as well",
    "zero_grad": "step() clears the gradients by itself",
    "save": "po.save_weights(pipe, path), po.save_sharded(pipe, folder) or po.Checkpointer(pipe, folder, every=100)",
}
