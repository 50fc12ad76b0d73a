"""Three hundred random small pipelines: no hang, and no bit of difference between the emulator and processes."""

import json
from pathlib import Path

import pytest

import fuzz_cases
import pipeoptim as po
import stage_processes

COUNT, LIMIT = 300, 420


def emulate(case):
    modules = [case.module(k) for k in range(case.depth)]
    optimizers = [case.make_optimizer(module) for module in modules]
    processes = case.processes if case.layout == "interleaved" else None
    return case.train(po.Emulator(modules, optimizers, fuzz_cases.loss_fn, processes=processes, **case.options()))


@pytest.mark.timeout(600)
def test_processes_equal_the_emulator_on_random_pipelines(tmp_path):
    with stage_processes.stages(Path(__file__).parent / "fuzz_worker.py", 4, str(tmp_path), str(COUNT), str(LIMIT)) as started:
        ours = {}
        for row in fuzz_cases.rounds(COUNT):
            for _, case in row:
                ours.update({f"{case.seed}/{k}": d for k, d in emulate(case).items()})
        for k, p in enumerate(started):
            out, err = p.communicate(timeout=LIMIT + 30)
            assert p.returncode == 0, f"process {k} failed after {out.splitlines()[-1:]}:\n{err[-3000:]}"
    theirs = {}
    for k in range(4):
        theirs.update(json.loads((tmp_path / f"{k}.json").read_text()))
    assert set(theirs) == set(ours)
    assert len(set(ours.values())) > 0.9 * len(ours), "fingerprints that do not differ would prove nothing"
    assert len({name.split("/")[0] for name in ours}) >= COUNT
    differing = [name for name in ours if ours[name] != theirs[name]]
    assert not differing, f"case/stage: {' '.join(differing)}"
