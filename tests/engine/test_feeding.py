"""Processes that are fed: they split and evaluate as the emulator does, and say who was fed otherwise than the others."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import evaluation_cases
import pipeoptim as po
import split_cases
import stage_processes

DEPTHS = {"plain": 2, "interleaved": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feeding")
    stage_processes.run(Path(__file__).parent / "feeding_worker.py", 2, str(folder), timeout=300)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    """What each process has found and was told."""
    return [json.loads((folder / f"{p}.json").read_text()) for p in range(2)]


@pytest.mark.parametrize("kind", DEPTHS)
def test_processes_split_as_the_emulator_does(kind, folder):
    stages = split_cases.stages(DEPTHS[kind])
    processes = 2 if kind == "interleaved" else None
    pipe = po.Emulator(stages, split_cases.sgd, split_cases.loss_fn, "pipeoptim", 2, uneven=True, processes=processes)
    losses = [pipe.step(x, target=y, stage_kwargs={1: {"gate": gate}}) for x, gate, y in split_cases.batches()]
    pipe.drain()
    found = [torch.load(folder / f"{kind}-{p}.pt", weights_only=True) for p in range(2)]
    assert torch.equal(torch.stack(losses), torch.stack(found[1]["losses"]))
    for k in range(DEPTHS[kind]):
        ours = tree_leaves(pipe.stage_state_dict(k))
        other = tree_leaves(found[k % 2]["states"][k])
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize(("number", "name"), enumerate(["keywords", "target"]))
def test_a_stage_that_is_given_other_rows_than_the_first_says_so(number, name, both):
    assert f"2 of the 4 rows of the input, but 3 of 6 of the {name}" in both[1]["refusals"][number]


@pytest.mark.parametrize(("number", "kind"), enumerate(DEPTHS))
def test_all_processes_find_what_the_emulator_finds(number, kind, both):
    def emulator(options):
        stages, processes = evaluation_cases.stages(DEPTHS[kind]), 2 if kind == "interleaved" else None
        return po.Emulator(stages, evaluation_cases.sgd, evaluation_cases.loss_fn, "pipeoptim", processes=processes, **options)

    ours = list(evaluation_cases.evaluations(emulator))
    assert both[0]["found"][number] == both[1]["found"][number] == ours


def test_a_process_that_is_fed_less_is_named_by_the_others(both):
    for short in (0, 1):
        waiting = both[1 - short]["told"][short]
        assert f"stage {short} ended after 4 mini-batches, but stage {1 - short} was given" in waiting
        assert "loaders of one length" in waiting
        assert waiting.removeprefix(f"{short} drain: ").removeprefix("first failure: ").startswith(f"stage {short} ended")


def test_nobody_trains_on_what_another_evaluates(both):
    """Where one process evaluates already, the next message is not of the kind that the other waits for."""
    assert "0 evaluate: stage 0 evaluates while stage 1 trains" in both[1]["told"][2]
    assert "1 evaluate: stage 0 trains while stage 1 evaluates" in both[1]["told"][3]
    assert "stage 1 failed: stage 0 trains while stage 1 evaluates" in both[0]["told"][3]


def test_evaluations_of_different_length_and_empty_ones_are_told(both):
    for one in both:
        assert "stage 1 ended after 2 batches to evaluate, but stage 0 was given 3" in one["told"][4]
        assert "None nothing: evaluate was given 0 batches" in one["told"][5]


def test_an_evaluation_that_ends_otherwise_on_one_process_is_told_at_once(both):
    """More batches on either, and a loader that raises on either: nobody waits for the time-out, which is beyond that of the test."""
    for one in both:
        for longer in (0, 1):
            told, shorter = one["at_once"][longer], 1 - longer
            assert f"stage {longer} was given more batches to evaluate than stage {shorter}, which had 2" in told or (
                f"stage {shorter} ended after 2 batches to evaluate, but stage {longer} was given 3" in told
            ), told
    for failing in (0, 1):
        assert both[failing]["at_once"][2 + failing] == "KeyError: 'no such file'"
        assert (
            f"stage {failing} left evaluate(), where it had begun 2 batches: KeyError: 'no such file'"
            in (both[1 - failing]["at_once"][2 + failing])
        )
