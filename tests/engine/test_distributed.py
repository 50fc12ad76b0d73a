"""Processes compute what the emulator computes, bit for bit; a dead stage ends the others; bad use is said."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import case
import pipeoptim as po
import stage_processes

HERE = Path(__file__).parent


def emulate(depth, run, m, name, device, slack="0"):
    method, options = case.predicted(run)
    modules = [module.to(device) for module in case.pieces(depth)]
    opts = [case.optimizer(name, module.parameters()) for module in modules]
    options |= {"schedulers": [case.scheduler(o) for o in opts], "seed": 3, "slack": slack}
    pipe = po.Emulator(modules, opts, case.loss_fn, method, m, **options)
    losses = []
    for n, (x, y) in enumerate(case.batches(device)):
        losses.append(pipe.step(x, target=y))
        if n == 20:
            pipe.drain()
        if n in (25, 30):
            losses.append(pipe.eval_step(x[:5], target=y[:5], drain=n == 30))
    pipe.drain()
    return pipe, losses


CASES = (("1", "adamw", "0"), ("4", "sgd", "0"))


def check_equal(folder, depth, methods, device="cpu", *late, cases=CASES):
    """Run one process per stage; fails where one differs from the emulator by a bit."""
    torch.backends.cudnn.deterministic = True
    texts = ",".join(methods), ";".join(":".join(c) for c in cases)
    stage_processes.run(HERE / "equal_worker.py", depth, str(folder), *texts, device, *late)
    for method in methods:
        for m, name, slack in cases:
            if po.get_method(case.predicted(method)[0]).at_least_depth_microbatches and int(m) < depth:
                continue
            pipe, losses = emulate(depth, method, int(m), name, device, slack)
            for k in range(depth):
                theirs = torch.load(folder / case.file_name(method, m, name, k), weights_only=True)
                assert theirs["version"] == pipe.version(k) == case.UPDATES
                ours = tree_leaves(pipe.stage_state_dict(k))
                for a, b in zip(ours, tree_leaves(theirs["state"]), strict=True):
                    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                    assert same, f"{method}, M={m}, {name}: stage {k} differs"
                if k == depth - 1:
                    assert torch.equal(torch.stack(losses), torch.stack(theirs["losses"]))


OTHERS = ["pipemare(synchronous_updates=7)", "nesterov(anneal_updates=30)", "pipeoptim/1", "pipeoptim_stash/2"]


# Two stages have no stage in the middle, and at M = 4 more than D micro-batches.
@pytest.mark.parametrize(("depth", "cases"), [(2, CASES[1:]), (4, CASES)])
def test_processes_equal_the_emulator_bit_for_bit(depth, cases, tmp_path):
    check_equal(tmp_path, depth, [*sorted(po.METHODS), *OTHERS], cases=cases)


def test_so_they_do_with_slack(tmp_path):
    """Receives are posted ahead, also where the format changes (evaluations have other shapes)."""
    methods = ["pipeoptim", "pipedream+vertical_sync", "pipeoptim/1"]
    check_equal(tmp_path, 4, methods, cases=[("1", "adamw", "1"), ("4", "sgd", "0.5,2,0")])


def test_so_they_do_when_messages_are_copied_to_and_from_a_device_late(tmp_path):
    check_equal(tmp_path, 2, ["1f1b", "pipedream", "pipeoptim"], "cpu", "late")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_processes_on_one_gpu_equal_the_emulator_on_it(tmp_path):
    check_equal(tmp_path, 2, ["1f1b", "pipedream", "pipeoptim"], "cuda:0")


@pytest.mark.parametrize(("victim", "transport"), [(0, "auto"), (1, "auto"), (2, "auto"), (1, "group")])
def test_a_killed_stage_ends_the_others_and_is_named(victim, transport, tmp_path):
    with stage_processes.stages(HERE / "endless_worker.py", 3, "10", transport) as started:
        for p in started:
            assert p.stdout.readline().strip() == "running", p.stderr.read()
        started[victim].send_signal(signal.SIGKILL)
        killed, slowness = time.monotonic(), stage_processes.slowness()
        for k, p in enumerate(started):
            if k == victim:
                continue
            try:
                _, err = p.communicate(timeout=12 * slowness)
            except subprocess.TimeoutExpired:
                pytest.fail(f"stage {k} still runs {12 * slowness:.0f} s after stage {victim} was killed")
            assert p.returncode not in (0, None)
            assert f"stage {victim}" in err, err[-2000:]
        assert time.monotonic() - killed < 10 * slowness


@pytest.mark.parametrize(("victim", "transport"), [(2, "auto"), (1, "group"), (0, "auto")])
def test_a_frozen_stage_ends_the_others_within_the_liveness_timeout(victim, transport):
    with stage_processes.stages(HERE / "endless_worker.py", 3, "3", transport) as started:
        for p in started:
            assert p.stdout.readline().strip() == "running", p.stderr.read()
        started[victim].send_signal(signal.SIGSTOP)
        frozen, slowness = time.monotonic(), stage_processes.slowness()
        for k, p in enumerate(started):
            if k != victim:
                _, err = p.communicate(timeout=12 * slowness)
                assert p.returncode == 1
                last = err.strip().splitlines()[-1]
                holds = ", whose process holds the store," if victim == 0 else ""
                assert (
                    last.removeprefix(f"[rank{k}]: ").endswith(
                        f"StageFailure: stage {victim}{holds} gave no sign of life for 3 s"
                    )
                    or f"first failure: stage {victim} gave no sign of life for 3 s" in last
                ), err[-2000:]
        assert 2 < time.monotonic() - frozen < 10 * slowness
        started[victim].send_signal(signal.SIGCONT)


@pytest.mark.parametrize("where", ["saving", "default group"])
def test_a_stage_that_is_frozen_where_all_meet_is_missed_within_the_liveness_timeout(where):
    with stage_processes.stages(HERE / "meeting_worker.py", 2, where) as started:
        for p in started:
            assert p.stdout.readline().strip() == "ready", p.stderr.read()
        frozen, slowness = time.monotonic(), stage_processes.slowness()
        _, err = started[0].communicate(timeout=12 * slowness)
        assert err.strip().splitlines()[-1].endswith("StageFailure: stage 1 gave no sign of life for 2 s"), err[-2000:]
        assert time.monotonic() - frozen < 10 * slowness
        started[1].send_signal(signal.SIGCONT)  # one that wakes up later blames nobody else, and no connection
        _, err = started[1].communicate(timeout=12 * slowness)
        assert [p.returncode for p in started] == [1, 1]
        assert "StageFailure: " in err.strip().splitlines()[-1], err[-2000:]


def test_stages_that_were_all_stopped_for_a_while_go_on():
    with stage_processes.stages(HERE / "endless_worker.py", 3, "1", "auto") as started:
        for p in started:
            assert p.stdout.readline().strip() == "running", p.stderr.read()
        for p in started:
            p.send_signal(signal.SIGSTOP)
        time.sleep(4)
        for p in started:
            p.send_signal(signal.SIGCONT)
        time.sleep(3)
        assert [p.poll() for p in started] == [None, None, None]


def test_bad_use_is_refused_with_a_sentence():
    outputs = stage_processes.run(HERE / "misuse_worker.py", 2)
    cores = len(os.sched_getaffinity(0))
    assert f"2 processes of the pipeline compute with {2 * cores + 2} threads on {cores} core" in outputs[0]
    assert "warned:\n" in outputs[1], "one of them tells"
    assert "only stage 0 takes them" in outputs[1]
    assert "cannot be split into 3 equal micro-batches" in outputs[0]
    assert "must be a torch.distributed.pipelining.PipelineStage" in outputs[0]
    for k, output in enumerate(outputs):
        assert output.count("give all the same") == 2
        assert f"stage {k} was set up with" in output
        assert "prediction=paper" in output
    assert outputs[1].count("stage 0 did not answer within 1 s") == 2
    assert "stage 0 cut the model into 3 + 1 blocks, stage 1 into 1 + 3 blocks: each measured it by itself" in outputs[0]
    assert "stage 1 cut the model into 1 + 3 blocks, stage 0 into 3 + 1 blocks" in outputs[1]
    measured = [output[output.index("measured [") :] for output in outputs]
    assert measured[0] == measured[1]  # to the last digit of each time: one process measured for both


def test_without_a_process_group():
    with pytest.raises(po.ConfigError, match="start with torchrun"):
        po.Schedule(None, None, case.loss_fn)
