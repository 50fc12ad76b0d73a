"""The cut is optimal (brute force agrees), respects limits and pins, and its stages compute what the model computes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pipeoptim as po
from pipeoptim.partitioning import BlockCost, best_cut, best_replicas, partition, profile


def cuts(blocks, parts):
    for ends in itertools.combinations(range(1, blocks), parts - 1):
        edges = [0, *ends, blocks]
        yield [(k, a, b) for k, (a, b) in enumerate(itertools.pairwise(edges))]


seconds_lists = st.lists(st.integers(1, 50), min_size=1, max_size=12)


@settings(max_examples=150)
@given(
    seconds=seconds_lists, parts=st.integers(1, 4), speeds=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=4, max_size=4)
)
def test_the_cut_equals_brute_force(seconds, parts, speeds):
    if parts > len(seconds):
        return

    def cost(k, start, end):
        return sum(seconds[start:end]) / speeds[k]

    lengths = best_cut(len(seconds), parts, cost)
    edges = [0, *itertools.accumulate(lengths)]
    ours = [cost(k, a, b) for k, (a, b) in enumerate(itertools.pairwise(edges))]
    every = [[cost(*r) for r in cut] for cut in cuts(len(seconds), parts)]
    best = min(max(c) for c in every)
    assert max(ours) == best
    assert sum(c * c for c in ours) == pytest.approx(min(sum(x * x for x in c) for c in every if max(c) == best))


@settings(max_examples=40)
@given(data=st.data(), blocks=st.integers(1, 5), devices=st.integers(1, 4), bandwidth=st.sampled_from([1.0, 10.0, 1e9]))
def test_replicas_equal_brute_force(data, blocks, devices, bandwidth):
    numbers = st.lists(st.integers(1, 30), min_size=blocks, max_size=blocks)
    seconds, weights = data.draw(numbers), data.draw(numbers)

    def time(start, end, m):
        return max(sum(seconds[start:end]), 2 * (m - 1) / m * sum(weights[start:end]) / bandwidth) / m

    best = math.inf
    for parts in range(1, min(blocks, devices) + 1):
        for cut in cuts(blocks, parts):
            for replicas in itertools.product(range(1, devices + 1), repeat=parts):
                if sum(replicas) == devices:
                    best = min(best, max(time(a, b, m) for (_, a, b), m in zip(cut, replicas, strict=True)))
    lengths, replicas = best_replicas(seconds, weights, devices, bandwidth)
    edges = [0, *itertools.accumulate(lengths)]
    assert sum(replicas) == devices
    assert sum(lengths) == blocks
    found = max(time(a, b, m) for (a, b), m in zip(itertools.pairwise(edges), replicas, strict=True))
    assert found == pytest.approx(best)


def block_costs(seconds, weights=None):
    weights = weights or [1] * len(seconds)
    return [BlockCost(str(n), s / 3, 2 * s / 3, 1, 0, w) for n, (s, w) in enumerate(zip(seconds, weights, strict=True))]


def linears(n):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(n)))


def test_faster_devices_get_more_and_pins_and_memory_hold():
    model = linears(6)
    assert partition(model, 2, costs=block_costs([1] * 6)).lengths == [3, 3]
    assert partition(model, 2, costs=block_costs([1] * 6), speeds=[2, 1]).lengths == [4, 2]
    assert partition(model, 2, costs=block_costs([1] * 6), pins=[1]).lengths == [1, 5]
    heavy = block_costs([1] * 6, [100, 1, 1, 1, 1, 1])
    assert partition(model, 2, costs=heavy, memory=[320, 10**9]).lengths == [3, 3]
    assert partition(model, 2, costs=heavy, memory=[302, 10**9]).lengths == [1, 5]
    with pytest.raises(po.ConfigError, match="cannot be cut into 2 stages under these limits"):
        partition(model, 2, costs=heavy, memory=[10, 10])


def test_replicas_links_and_depth_are_chosen_together():
    model, even = linears(4), block_costs([3, 1, 1, 1], [0, 0, 0, 0])
    cut = partition(model, costs=even, devices=4, bandwidth=1e9)  # without weights to reduce, data parallelism is perfect
    assert (cut.lengths, cut.replicas, max(cut.seconds)) == ([4], [4], pytest.approx(1.5))
    heavy = block_costs([3, 1, 1, 1], [0, 8, 8, 8])
    cut = partition(model, costs=heavy, devices=4, bandwidth=1.0)
    assert (cut.lengths, cut.replicas, max(cut.seconds)) == ([1, 1, 2], [2, 1, 1], 2.0)
    assert "on 2 devices" in cut.to_text()
    cut = partition(model, 2, costs=heavy, devices=2, bandwidth=0.1)  # sending one byte back and forth takes 20 s
    assert cut.seconds == [20.0, 3.0]
    cut = partition(model, costs=block_costs([1] * 4, [100] * 4), devices=4, bandwidth=1e9, memory=[500])
    assert max(cut.memory_bytes) <= 500 and len(cut.stages) > 1
    with pytest.raises(po.ConfigError, match="cannot be cut into"):
        partition(model, costs=heavy, devices=4, bandwidth=1.0, memory=[1])


@settings(max_examples=25)
@given(data=st.data(), blocks=st.integers(2, 6), devices=st.integers(1, 4))
def test_the_plan_with_replicas_equals_brute_force_under_pins_memory_and_links(data, blocks, devices):
    numbers = st.lists(st.integers(1, 20), min_size=blocks, max_size=blocks)
    seconds, weights, sent = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    pins, limit = data.draw(st.lists(st.integers(1, blocks - 1), max_size=1)), data.draw(st.integers(20, 200))
    costs = [BlockCost(str(n), 0, s, o, 0, w) for n, (s, w, o) in enumerate(zip(seconds, weights, sent, strict=True))]

    def time(start, end, m):
        link = 2 * sent[end - 1] / 5.0 if end < blocks else 0
        return max(sum(seconds[start:end]), 2 * (m - 1) / m * sum(weights[start:end]) / 5.0, link) / m

    best = math.inf
    for parts in range(1, min(blocks, devices) + 1):
        for cut in cuts(blocks, parts):
            bytes_held = [sum(weights[a:b]) * (3 if k < parts - 1 else 2) for k, a, b in cut]
            if max(bytes_held) > limit or any(a < pin < b for _, a, b in cut for pin in pins):
                continue
            for replicas in itertools.product(range(1, devices + 1), repeat=parts):
                if sum(replicas) == devices:
                    best = min(best, max(time(a, b, m) for (_, a, b), m in zip(cut, replicas, strict=True)))
    options = {"costs": costs, "devices": devices, "bandwidth": 5.0, "memory": [limit], "pins": pins}
    if best == math.inf or len(pins) > min(devices, blocks) - 1:
        with pytest.raises(po.ConfigError):
            partition(linears(blocks), **options)
    else:
        assert max(partition(linears(blocks), **options).seconds) == pytest.approx(best)


def test_memory_is_that_of_the_method():
    model, costs = linears(4), block_costs([1] * 4, [1000] * 4)
    assert partition(model, 4, costs=costs, method="pipedream").memory_bytes == [5000, 4000, 3000, 2000]
    assert partition(model, 4, costs=costs, method="pipeoptim").memory_bytes == [3000, 3000, 3000, 2000]


def tied_ends(width=16, words=40):
    """An embedding, two layers, and the embedding again as the head."""
    embed, head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
    head.weight = embed.weight
    return nn.Sequential(embed, nn.Linear(width, width), nn.Linear(width, width), head)


@pytest.mark.parametrize(
    ("method", "depth", "sums"), [("1f1b", 1, 0), ("1f1b", 2, 0), ("pipeoptim", 2, 2), ("pipedream", 4, 4)]
)
def test_every_stage_counts_its_own_copy_of_a_tied_weight_once(method, depth, sums):
    model = tied_ends()
    costs = [BlockCost(str(n), 0, 1, 0, 0, sum(p.nbytes for p in block.parameters())) for n, block in enumerate(model)]
    cut = partition(model, depth, costs=costs, method=method)
    tied = model[0].weight.nbytes
    for k, stage in enumerate(cut.stages):
        own = sum(p.nbytes for p in stage.parameters())
        elsewhere = any(k in tie.holders for tie in cut.tied)
        copies = po.Emulator(cut.stages, torch.optim.SGD, nn.functional.cross_entropy, method).weight_copies(k)
        assert cut.memory_bytes[k] == own * (copies + 1) + sums * tied * elsewhere
    if depth > 1:
        last = cut.memory_bytes[-1]
        assert last >= 2 * tied and cut.tied[0].holders == (0, depth - 1)
        limits = [10**9] * (depth - 1)
        assert partition(tied_ends(), depth, costs=costs, method=method, memory=[*limits, last]).lengths == cut.lengths
        with pytest.raises(po.ConfigError, match="under these limits"):  # less than the head alone, with one gradient
            partition(tied_ends(), depth, costs=costs, method=method, memory=[*limits, (2 + sums) * tied - 1])


def test_stages_compute_what_the_model_computes_and_measuring_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    x = torch.randn(16, 8)
    torch.set_rng_state(state)
    cut = partition(model, 3, (x,))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    y = x
    for stage in cut.stages:
        y = stage.eval()(y)
    assert torch.equal(y, model.eval()(x))
    assert sum(cut.lengths) == 6
    assert all(s > 0 for s in cut.seconds)
    assert cut.to_text().count("stage") == 3


def test_the_profile_counts_bytes():
    (cost,) = profile([nn.Linear(8, 4)], (torch.ones(16, 8),), ["0 Linear"], repeats=1)
    assert cost.weight_bytes == (8 * 4 + 4) * 4
    assert cost.output_bytes == 16 * 4 * 4
    assert cost.saved_bytes == 16 * 8 * 4  # the input, for the gradient of the weight
    assert cost.seconds == cost.forward + cost.backward > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_stages": 4}, r"use 1 \.\. 3"),
        ({"num_stages": 2}, "pass one mini-batch as sample_args"),
        ({"num_stages": 2, "costs": []}, "0 entries for 3 blocks"),
        ({"num_stages": 2, "speeds": [1]}, "must be 2 positive numbers"),
        ({"num_stages": 2, "pins": [0]}, "where a stage must begin"),
        ({"num_stages": 2, "pins": [1, 2]}, "where a stage must begin"),
        ({"num_stages": 2.0}, "num_stages is 2.0, must be an integer"),
        ({"num_stages": 2, "microbatches": 0}, "microbatches is 0"),
        ({"num_stages": 2, "sample_args": (torch.ones(3, 4),)}, "block 0 Linear does not run on what it is given"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(options, words):
    with pytest.raises(po.ConfigError, match=words):
        partition(linears(3), **options)


@pytest.mark.parametrize("wrong", ["2", [2], 2.0, True])
@pytest.mark.parametrize("name", ["num_stages", "devices"])
def test_a_number_of_another_type_is_refused_before_the_model_is_looked_at(wrong, name):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(linears(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    with pytest.raises(po.ConfigError, match=f"{name} is .*, must be an integer"):
        partition(Own(), sample_args=(torch.ones(2, 4),), **{"num_stages": 2, name: wrong})


def test_a_model_that_cannot_be_sliced_is_refused():
    with pytest.raises(po.ConfigError, match="pass an nn.Sequential or the list of its blocks"):
        partition(nn.Linear(2, 2), 1)


def test_the_full_state_of_a_cut_moves_on_with_training_and_that_of_a_pipeline_does_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    cut = partition(model, 2, pins=[1])
    pipe = po.Emulator(cut.stages, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss)
    live, copied = cut.full_state_dict(), po.full_state_dict(pipe, cut.names)
    before = {name: value.clone() for name, value in live.items()}
    pipe.step(torch.ones(2, 3), target=torch.zeros(2, 3))
    pipe.drain()
    for name, value in cut.full_state_dict().items():
        assert torch.equal(live[name], value)
        assert torch.equal(copied[name], before[name])
        assert not torch.equal(value, before[name]), f"{name} did not move"


def test_one_block_is_told_in_the_singular():
    cut = partition(nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))), 2, pins=[1])
    for picture in (str(cut), cut.to_svg()):
        assert "1 block: " in picture and "2 blocks: 1" in picture and "1 blocks" not in picture


class Structured(nn.Module):
    """Takes a dict and a pair."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, batch, pair):
        x = batch["x"]
        for layer in self.layers:
            x = x + layer(x) * pair[1] + pair[0]
        return x


def test_a_traced_model_takes_its_inputs_in_their_structure():
    model = Structured()
    inputs = {"x": torch.randn(3, 4)}, (torch.randn(3, 4), torch.randn(3, 1))
    expected = model(*inputs)
    cut = po.partition(model, 3, inputs, how="trace")
    pipe = po.Emulator(cut.stages, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss, "1f1b")
    assert pipe.eval_step(*inputs, target=torch.zeros(3, 4)) == nn.functional.mse_loss(expected, torch.zeros(3, 4))
