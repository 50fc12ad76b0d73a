"""Slack that is chosen by itself, where M changes before enough was measured: the measurement begins anew, in all processes."""

import json
from pathlib import Path

import torch
from torch import nn

import auto_slack_changes as case
import pipeoptim as po
import stage_processes
from pipeoptim.engine.stage_times import WINDOW


def test_processes_measure_anew_after_a_change_of_m_and_equal_the_emulator_with_what_they_chose(tmp_path):
    stage_processes.run(Path(__file__).parent / "auto_slack_changes_worker.py", 2, str(tmp_path), timeout=100)
    (at, slack), theirs = (json.loads((tmp_path / f"{k}.json").read_text()) for k in range(2))
    assert [at, slack] == theirs
    assert at == case.CHANGE + WINDOW + 2 + 2  # not where it would have been chosen without the change
    # The emulator begins without slack, and goes on with what was chosen from the boundary on at which it was.
    before, batches = po.Emulator(case.stages(), case.adamw, nn.functional.mse_loss), case.batches()
    for n, x in enumerate(batches[:at]):
        if n == case.CHANGE:
            before.set_microbatches(2)
        before.step(x, target=x)
    before.drain()
    stages = case.stages()
    chosen = tuple(slack) if isinstance(slack, list) else slack
    after = po.Emulator(stages, case.adamw, nn.functional.mse_loss, microbatches=2, slack=chosen)
    for k in range(2):
        after.load_stage_state_dict(k, before.stage_state_dict(k))
    for x in batches[at:]:
        after.step(x, target=x)
    after.drain()
    for k, stage in enumerate(stages):
        for ours, weights in zip(stage.parameters(), torch.load(tmp_path / f"{k}.pt", weights_only=True), strict=True):
            assert torch.equal(ours, weights)
