"""2 stages x 2 replicas on 4 processes equal 2 stages with the doubled batch, whoever averages the gradients."""

import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import layout_cases as cases
import pipeoptim as po

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))
import stage_processes  # noqa: E402

PROCESSES = list(product(range(cases.DEPTH), range(cases.REPLICAS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What 4 processes wrote, all cases in one start."""
    path = tmp_path_factory.mktemp("replicas")
    stage_processes.run(HERE / "replicas_worker.py", len(PROCESSES), str(path), "plain,ddp,fsdp,extras", timeout=400)
    return path


def check_equal(folder, case):
    pipe, losses = cases.emulate(case)
    for k in range(cases.DEPTH):
        expected = pipe.stage_state_dict(k)["module"]
        theirs = [torch.load(folder / f"{case.name()}-{k}-{r}.pt", weights_only=True) for r in range(cases.REPLICAS)]
        for name, weight in expected.items():
            assert torch.equal(theirs[0]["module"][name], theirs[1]["module"][name]), f"{case}: replicas differ in {name}"
            torch.testing.assert_close(theirs[0]["module"][name], weight, rtol=0, atol=1e-10, msg=lambda m: f"{case}: {m}")
        assert theirs[0]["gaps"] == [pipe.version_gap(k, i) for i in range(case.m)]
    found = torch.stack([torch.stack(t["losses"]) for t in theirs]).mean(0)
    torch.testing.assert_close(found, losses, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", cases.plain(), ids=cases.Case.name)
def test_replicas_equal_the_doubled_batch(folder, case):
    check_equal(folder, case)


@pytest.mark.parametrize("case", cases.wrapped(), ids=cases.Case.name)
def test_stages_wrapped_in_ddp_equal_the_doubled_batch(folder, case):
    check_equal(folder, replace(case, wrap="ddp"))


@pytest.mark.parametrize("case", cases.sharded(), ids=cases.Case.name)
def test_sharded_stages_equal_the_doubled_batch(folder, case):
    check_equal(folder, replace(case, wrap="fsdp"))


def test_fsdp_equals_ddp_and_holds_two_copies_of_its_shards_only(folder):
    same = cases.Case()
    for k, r in PROCESSES:
        ddp, fsdp = (
            torch.load(folder / f"{replace(same, wrap=w).name()}-{k}-{r}.pt", weights_only=True) for w in ("ddp", "fsdp")
        )
        for name, weight in ddp["module"].items():
            torch.testing.assert_close(fsdp["module"][name], weight, rtol=0, atol=1e-12)
        whole = sum(t.numel() * t.element_size() for t in fsdp["module"].values())
        assert ddp["bytes"] == whole * (2 - k)  # the last stage predicts nothing
        assert fsdp["bytes"] == whole * (2 - k) // cases.REPLICAS


@pytest.mark.parametrize("overlap", [False, True])
def test_predictions_from_the_mini_batch_in_progress_use_a_replicas_own_gradient(folder, overlap):
    """Fed the same, two replicas train as one does alone, bit for bit: nothing of the other enters their predictions."""
    modules = [cases.module(cases.Case(), k) for k in range(cases.DEPTH)]
    options = {"overlap": overlap, "clip": po.AdaGC(lambda_abs=0.05, warmup=3), "prediction": "in_progress", "scale": "auto"}
    adamw = lambda params: torch.optim.AdamW(params, lr=0.01)  # noqa: E731
    pipe = po.Emulator(modules, adamw, torch.nn.functional.mse_loss, "pipeoptim", 4, **options)
    for x, y in cases.batches():
        pipe.step(x, target=y)
    pipe.drain()
    for (k, _), found in extras(folder, "in_progress").items():
        for name, weight in modules[k].state_dict().items():
            assert torch.equal(found[overlap][name], weight), f"stage {k}, {name}"


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_bad_on_one_replica_is_left_out_on_all(folder, wrapped):
    modules = [cases.module(cases.Case(), k) for k in range(cases.DEPTH)]
    adamw = lambda params: torch.optim.AdamW(params, lr=0.01)  # noqa: E731
    pipe = po.Emulator(modules, adamw, torch.nn.functional.mse_loss, "pipeoptim", on_bad="skip")
    for x, y in cases.spoiled():
        pipe.step(x, target=y)
    pipe.drain()
    for (k, _), found in extras(folder, "skipping").items():
        skipped, weights = found[wrapped]
        assert skipped == pipe.skipped(k) == [2, 4]
        for name, weight in modules[k].state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-12)


def extras(folder, what):
    return {p: torch.load(folder / f"extras-{p[0]}-{p[1]}.pt", weights_only=True)[what] for p in PROCESSES}


def test_dropout_and_batchnorm_are_each_replicas_own(folder):
    runs = extras(folder, "resumed")
    for k in range(cases.DEPTH):
        one, other = (runs[k, r]["whole"]["module"] for r in range(cases.REPLICAS))
        for name in one:
            assert torch.equal(one[name], other[name]) == ("running" not in name), name
        assert not torch.equal(*(s["cpu"] for s in runs[k, 0]["whole"]["random"]["replicas"]))
        lost = [tree_leaves(s)[2] for s in runs[k, 0]["whole"]["compress"]["replicas"]]
        assert lost[0].shape == (8, cases.WIDTH) and not torch.equal(*lost)


def test_the_checkpoint_of_one_replica_resumes_all_bit_for_bit(folder):
    for (k, r), run in extras(folder, "resumed").items():
        whole, halves = ({**run[name], "module": run[name]["module"].copy()} for name in ("whole", "halves"))
        if r > 0:  # its own running statistics are not in the checkpoint; nothing in training depends on them
            for state in (whole, halves):
                state["module"] = {n: t for n, t in state["module"].items() if "running" not in n}
        pairs = zip(tree_leaves(whole), tree_leaves(halves), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs), f"stage {k}, replica {r}"


def test_a_stop_wanted_by_one_replica_stops_all_after_the_same_mini_batch(folder):
    fed = extras(folder, "stopped")
    assert set(fed.values()) == {2 + cases.DEPTH + 1}


def test_means_begin_during_the_backward_and_are_waited_for_before_the_next_forward(folder):
    for log in extras(folder, "order").values():
        begun, ended = log.index("mean 0"), log.index("first layer")
        assert begun < ended, log  # of the same backward: both are the first of their kind
        assert log.index("finish") > ended
        following = log[log.index("finish") + 1 :]
        assert following[0] == "forward", log


def test_with_overlap_the_next_forward_runs_between_the_start_of_the_means_and_their_use(folder):
    for log in extras(folder, "overlap").values():
        begun = max(n for n, entry in enumerate(log[: log.index("finish")]) if entry.startswith("mean"))
        assert "forward" in log[begun : log.index("finish")], log


def test_wrong_replicas_are_refused_with_a_sentence(folder):
    for (k, r), words in extras(folder, "refusals").items():
        assert f"holds stage {k} of 2 and, on rank" in words[0], (k, r)
        assert "replicas is a str" in words[1]
        assert "its replica on rank" in words[2]
        assert "2 of the stage's 6 parameters are sharded" in words[3]
        assert "cannot scale its loss" in words[4]
        assert "'spectrain' keeps averages" in words[5]
        assert "no uneven micro-batches" in words[6]
        assert "is tied, but the stage's parameters are sharded" in words[7]
        assert "a process gets its shard of the gradient with" in words[8]
        assert "a process looks at its shards of the gradients only" in words[9]
        assert "static_graph=True" in words[10]
        assert k > 0 or "Adafactor moves each matrix as a whole" in words[11]


def test_a_killed_replica_ends_all_others(tmp_path):
    with stage_processes.stages(HERE / "endless_replicas_worker.py", len(PROCESSES)) as started:
        for p in started:
            assert p.stdout.readline().strip() == "running"
        started[3].send_signal(signal.SIGKILL)
        limit = 20 * stage_processes.slowness()
        for n, p in enumerate(started[:3]):
            try:
                _, err = p.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                pytest.fail(f"process {n} still runs {limit:.0f} s after a replica was killed")
            assert p.returncode not in (0, None)
            assert "stage 1" in err, err[-2000:]
