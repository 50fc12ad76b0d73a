"""Stages of ordinary models train in processes exactly as in the emulator."""

import json
from pathlib import Path

import torch
import transformers

import partition_models as models
import pipeoptim as po
import stage_processes

# One worker: it imports everything once and forks a process per stage.
MODELS = ["gpt2", "llama", "resnet101", "gnmt8"]
RUNS = {2: [*MODELS, "gpt2_tied"], 3: [*MODELS, "gpt2_tied"], 4: MODELS}


def test_asynchronous_training_in_processes_equals_the_emulator_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    stage_processes.run(Path(__file__).parent / "partition_worker.py", 1, str(tmp_path), json.dumps(RUNS), timeout=240)
    for depth, names in RUNS.items():
        for name in names:
            case = models.case(name)
            cut = po.partition(case.model, depth, case.args, case.kwargs, costs=models.equal_costs(name))
            pipe = po.Emulator(cut, models.optimizer, case.loss, seed=3)
            losses = [pipe.step(*args, target=target, **kwargs) for args, kwargs, target in models.feeds(case)]
            pipe.drain()
            everyone = [torch.load(tmp_path / f"{name}-{depth}-{k}.pt", weights_only=True) for k in range(depth)]
            for theirs, (k, stage) in zip(everyone, enumerate(cut.stages), strict=True):
                ours = stage.state_dict()
                assert theirs["state"].keys() == ours.keys()
                for key, value in ours.items():
                    assert torch.equal(theirs["state"][key], value), f"{name}, depth {depth}, stage {k}: {key} differs"
            if name.endswith("_tied"):
                check_exported(tmp_path / f"{name}-{depth}-exported", pipe, [theirs["told"] for theirs in everyone])
            assert torch.equal(torch.stack(losses), torch.stack(theirs["losses"])), f"{name}, depth {depth}: losses differ"


def check_exported(folder, pipe, told):
    """What processes have written is what the emulator's stages hold, and what one process refuses, all do."""
    again, full = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict(), po.full_state_dict(pipe)
    assert full.keys() == again.keys()
    assert all(torch.equal(full[name], again[name]) for name in full)
    assert told == told[:1] * len(told)
    exists, differ = told[0]
    assert "exists already" in exists
    assert f"'transformer.wte.weight' has other values on stage 0 than on stage {pipe.depth - 1}" in differ
