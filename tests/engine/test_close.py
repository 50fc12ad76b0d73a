"""Closing a pipeline gives back all that it held, whatever state it is in, and never waits for who will not come."""

from pathlib import Path

import stage_processes


def test_close_gives_everything_back_and_waits_for_nobody():
    outputs = stage_processes.run(Path(__file__).parent / "close_worker.py", 3, timeout=100)
    for k, output in enumerate(outputs):
        assert output.splitlines()[-1] == "done", output
        assert output.count("ConfigError: the pipeline is closed") == 2
        told = "ConfigError: the" if k == 1 else "StageFailure: stage 1 could not be set up: the"
        assert f"{told} optimizer of stage 1 holds 2 parameters that are not in the stage's module" in output
    assert "StageFailure: stage 2 died or closed its connection" in outputs[1]
    assert "first failure: stage 2" in outputs[0] or "StageFailure: stage 1 died" in outputs[0]
