"""The simulator: the engines' own actions, closed forms, simpy as another way to the same times, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeoptim as po
from pipeoptim.cli.app import _run
from pipeoptim.errors import ConfigError
from pipeoptim.failures import best_checkpoint_interval, useful_shares
from pipeoptim.methods import METHODS, get_method
from pipeoptim.schedule import ORDERS, Program
from pipeoptim.schedule.actions_table import KINDS, program_table
from pipeoptim.simulate import Conditions, Failures, Scenario, TransformerSizes, even_cut, read_profile, simulate, synthetic
from pipeoptim.simulate.profile import PassCost
from pipeoptim.simulate.simulate import largest_gaps, most_in_flight, summary
from pipeoptim.simulate.timed_events import timed_events
from pipeoptim.telemetry.trace.read import read
from simpy_oracle import simulated_by_simpy

FREE = PassCost(0.0, 0.0)


def simple(stages, forward=1.0, backward=2.0, rows=16, **optimizer):
    """A profile of equal blocks with round figures: F and B of a mini-batch, free updates and links."""
    profile = synthetic(TransformerSizes(rows=rows), stages)
    blocks = tuple(
        replace(block, forward=(forward / rows, forward), backward=(backward / rows, backward)) for block in profile.blocks
    )
    passes = {name: optimizer.get(name, FREE) for name in ("step", "predict", "copy")}
    return replace(
        profile,
        blocks=blocks,
        optimizer=replace(profile.optimizer, **passes),
        link=replace(profile.link, latency=0.0, bandwidth=None),
    )


def scenario(
    method, depth, m=1, minibatches=20, profile=None, processes=None, slack=0.0, replicas=1, overlap=False, **conditions
):
    method = get_method(method)
    program = method.program(depth, m, processes, overlap, slack)
    return Scenario(
        profile or simple(depth), (1,) * depth, method, program, minibatches, replicas, conditions=Conditions(**conditions)
    )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_actions_are_those_that_the_engine_carries_out(name, tmp_path):
    depth, m, n = 3, 4, 5
    trace = po.Trace()
    stages = [torch.nn.Linear(2, 2) for _ in range(depth)]
    pipe = po.Emulator(stages, lambda p: torch.optim.Adam(p), torch.nn.functional.mse_loss, name, m, trace=trace)
    for _ in range(n):
        pipe.step(torch.ones(m, 2), target=torch.ones(m, 2))
    pipe.drain()
    trace.save(tmp_path)
    done = [[(s.what, s.number) for s in stage.spans if s.what in ("F", "B", "U")] for stage in read(tmp_path)]
    table = timed_events(scenario(name, depth, m, n)).table
    planned = [[] for _ in range(depth)]
    for k, kind, number in zip(table.stage, table.kind, table.number, strict=True):
        planned[k].append((KINDS[kind].value, int(number)))

    assert planned == done


@pytest.mark.parametrize(("method", "depth", "m"), [("gpipe", 4, 8), ("1f1b", 4, 8), ("gpipe", 7, 2), ("1f1b", 5, 16)])
def test_the_bubble_of_flushing_methods_is_that_of_the_textbook(method, depth, m):
    """(M + D - 1) times F and B of a micro-batch, of which D - 1 are the bubble."""
    found = simulate(scenario(method, depth, m, minibatches=6))
    assert found.seconds.median == pytest.approx(6 * (m + depth - 1) * 3 / m)
    assert found.throughput.median == pytest.approx(m / (3 * (m + depth - 1)))
    assert [one.idle for one in found.stages] == pytest.approx([(depth - 1) / (m + depth - 1)] * depth)
    assert [one.in_flight for one in found.stages] == [m if method == "gpipe" else min(depth - k, m) for k in range(depth)]
    assert [one.gap for one in found.stages] == [0] * depth


def test_asynchronous_methods_keep_all_stages_busy_and_wait_for_the_slowest():
    steady = simulate(scenario("pipeoptim", 5, minibatches=60))
    assert steady.throughput.median == pytest.approx(1 / 3)
    assert [one.idle for one in steady.stages] == pytest.approx([0.0] * 5, abs=1e-9)
    assert [(one.gap, one.in_flight, one.copies) for one in steady.stages] == [
        (4, 5, 2),
        (3, 4, 2),
        (2, 3, 2),
        (1, 2, 2),
        (0, 1, 1),
    ]
    slow = simulate(scenario("pipeoptim", 5, minibatches=60, stragglers={2: 1.5}))
    assert slow.throughput.median == pytest.approx(1 / 4.5)
    assert [round(one.idle, 6) for one in slow.stages] == [0.333333, 0.333333, 0.0, 0.333333, 0.333333]
    assert (slow.path[0].what, slow.path[0].stage) == ("B", 2)
    late = simulate(scenario("pipeoptim", 5, minibatches=60, delay=0.9))
    hidden = simulate(scenario("pipeoptim", 5, minibatches=60, delay=0.9, slack=1))
    assert late.throughput.median < 0.8 / 3
    assert hidden.throughput.median == pytest.approx(1 / 3)
    assert hidden.stages[0].in_flight == 9


def test_recomputation_costs_a_forward_and_keeps_inputs_only():
    plain = scenario("pipeoptim", 3, minibatches=40)
    again = replace(plain, recompute="backward")
    kept, rebuilt = simulate(plain), simulate(again)
    assert rebuilt.throughput.median == pytest.approx(1 / 4)
    block = plain.profile.blocks[0]
    assert kept.stages[0].activations == 3 * block.saved_bytes[1]
    assert rebuilt.stages[0].activations == 3 * block.output_bytes[1]
    # Three forwards without a gradient, or two with it: the larger.
    weights, size = 2 + 2, block.weight_bytes
    assert kept.stages[0].memory == weights * size + max(3 * block.saved_bytes[1], 2 * block.saved_bytes[1] + size)
    held = max(3 * block.output_bytes[1], 2 * block.output_bytes[1] + size)
    assert rebuilt.stages[0].memory == weights * size + held + block.saved_bytes[1]


def small_scenarios():
    figures = st.floats(0.0, 5.0)

    @st.composite
    def build(draw):
        name = draw(st.sampled_from(sorted(METHODS)))
        depth = draw(st.integers(1, 4))
        m = draw(st.sampled_from([4, 8]))
        chunks = draw(st.sampled_from([1, 2])) if depth % 2 == 0 and ORDERS[METHODS[name].order].interleaved_as else 1
        if not (METHODS[name].forward.any_order and METHODS[name].backward.any_order):
            chunks = 1
        profile = simple(
            depth,
            draw(st.floats(0.1, 5.0)),
            draw(figures),
            rows=16,
            step=PassCost(draw(figures), 0.0),
            predict=PassCost(draw(figures), 0),
        )
        conditions = {
            "delay": draw(figures),
            "bandwidth": draw(st.sampled_from([float("inf"), 1e8, 1e9])),
            "stragglers": {draw(st.integers(0, depth - 1)): draw(st.floats(0.5, 3.0))},
            "jitter": 0.0,
        }
        return scenario(
            name, depth, m, draw(st.integers(1, 5)), profile, depth // chunks, 0.0, draw(st.integers(1, 2)), **conditions
        )

    return build()


@given(small_scenarios())
def test_simpy_finds_the_same_times(one):
    timed = timed_events(one)
    ends = timed.ends(timed.drawn(range(1)))[:, 0]
    assert len(timed.table) == one.actions
    expected = simulated_by_simpy(one, timed.costs)
    count = len(timed.table)
    found = {
        (r, int(timed.table.stage[v]), KINDS[timed.table.kind[v]].value, int(timed.table.number[v])): ends[r * count + v]
        for r in range(one.replicas)
        for v in range(count)
    }
    assert found == pytest.approx(expected)
    waits = summary(timed).stages
    program = one.program
    for p in range(program.processes or program.depth):  # what a process did and what it waited for is all of its time
        own = [w.waits for w in waits if program.process_of(w.stage) == p]
        whole = sum(w.busy + w.activations + w.gradients + w.replicas for w in own)
        assert whole <= 1 + 1e-9


@given(small_scenarios(), st.data())
@settings(max_examples=15)
def test_nothing_ends_earlier_where_anything_takes_longer(one, data):
    timed = timed_events(one)
    more = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.3, 2.0]), min_size=7, max_size=7)))

    def longer(values):
        return values + np.resize(more, len(values))

    before = timed.ends(timed.lasts)
    for slower in (
        timed.events.ends(longer(timed.lasts), timed.prepares, timed.arrives),
        timed.events.ends(timed.lasts, longer(timed.prepares), timed.arrives),
        timed.events.ends(timed.lasts, timed.prepares, longer(timed.arrives)),
    ):
        assert (slower >= before).all()


@pytest.mark.parametrize("order", sorted(ORDERS))
@given(depth=st.integers(1, 6), m=st.integers(1, 5), n=st.integers(1, 6))
def test_counts_of_the_table_are_those_of_the_program(order, depth, m, n):
    program = Program(order, depth, m)
    table = program_table(program, n)
    gaps = [max(program.gap(k, i) for i in range(n * m)) for k in range(depth)]
    assert largest_gaps(table) == gaps
    if n > 2 * program.warm_up:
        assert most_in_flight(table) == [program.in_flight(k) for k in range(depth)]


def test_jitter_gives_an_interval_and_slows_the_pipeline():
    found = simulate(scenario("pipeoptim", 4, minibatches=40, jitter=0.3))
    assert found.throughput.low < found.throughput.median < found.throughput.high < 1 / 3
    assert found == simulate(scenario("pipeoptim", 4, minibatches=40, jitter=0.3)), "drawn from a seed"


def test_replicas_share_the_mini_batch_and_wait_for_the_average():
    """Twice the devices, half of the rows each: twice as fast but for the average, which overlap hides behind a forward."""
    alone = simulate(scenario("pipeoptim", 2, 2, 40))
    free = simulate(scenario("pipeoptim", 2, 2, 40, replicas=2))
    assert free.throughput.median == pytest.approx(2 * alone.throughput.median)
    profile = simple(2)
    weight = profile.blocks[0].weight_bytes
    slow = replace(profile, link=replace(profile.link, bandwidth=weight / 0.2))  # the average of two: weights / bandwidth
    one = scenario("pipeoptim", 2, 2, 40, slow, replicas=2)
    tiny = tuple(replace(b, output_bytes=(0.0, 0.0), gradient_bytes=(0.0, 0.0)) for b in slow.blocks)
    one = replace(one, profile=replace(slow, blocks=tiny))
    waiting = simulate(one)
    assert 1 / waiting.throughput.median == pytest.approx(1 / free.throughput.median + 0.2)
    assert waiting.stages[0].waits.replicas == pytest.approx(0.2 * waiting.throughput.median)
    overlapping = replace(one, program=get_method("pipeoptim").program(2, 2, overlap=True))
    assert simulate(overlapping).throughput.median == pytest.approx(free.throughput.median)


@pytest.mark.parametrize(("mtbf", "devices", "recovery"), [(1e6, 10, 300.0), (2e4, 8, 60.0)])
def test_failures_agree_with_the_closed_form(mtbf, devices, recovery):
    """A segment of s seconds under failures of rate r takes (e^(r s) - 1) (1/r + recovery) on average (Daly 2006, no restart fails)."""
    failures = Failures(mtbf, recovery, checkpoint_every=600.0, checkpoint=20.0)
    shares = useful_shares(failures, devices, seconds=600 * 2000, draws=100)
    rate = devices / mtbf
    expected = 600 / (np.expm1(rate * 620) * (1 / rate + recovery))
    assert np.mean(shares) == pytest.approx(expected, rel=0.005)
    best = best_checkpoint_interval(1e6, 10, 20.0)
    around = [np.mean(useful_shares(Failures(1e6, 300.0, t, 20.0), 10, 4e6, 100)) for t in (best / 3, best, best * 3)]
    assert max(around) == around[1]


def test_an_even_cut_balances_and_a_profile_survives_its_file(tmp_path):
    profile = synthetic(TransformerSizes(layers=9), stages=4)
    assert sorted(even_cut(profile, 4, 8)) == [2, 2, 2, 3]
    assert even_cut(profile, 2, 8, speeds=[2.0, 1.0]) == (6, 3)
    assert read_profile(profile.write(tmp_path / "p.json")) == replace(profile, made=read_profile(tmp_path / "p.json").made)
    assert profile.at((1.0, 64.0), 8) == pytest.approx(8.0), "between the sizes that there are"
    with pytest.raises(
        ConfigError, match="has micro-batches of 1 to 64 rows, none of 65; choose another number of micro-batches\n"
    ):
        profile.at((1.0, 64.0), 65)
    with pytest.raises(
        ConfigError, match="rows, none of 16; .* micro-batches, or profile the model with --microbatches 4 as well"
    ):
        replace(profile, rows=(32, 64)).at((1.0, 64.0), 16)


def command(capsys, *arguments):
    code = _run(["simulate", *arguments])
    out = capsys.readouterr()
    return code, out.out, " ".join(out.err.split())


def test_the_command_writes_what_is_asked_for(capsys, tmp_path):
    trace, picture = tmp_path / "t.json", tmp_path / "t.svg"
    common = ("--synthetic", "--stages", "4", "--microbatches", "4", "--mini-batches", "12", "--straggler", "2:1.5")
    code, out, _ = command(
        capsys, *common, "--mtbf", "500", "--recovery", "60", "--trace", str(trace), "--picture", str(picture)
    )
    assert code == 0
    for words in (
        "a formula, nothing of it measured",
        "critical path: B",
        "stage 3 waits 3",
        "for activations from 2",
        "failures leave 9",
    ):
        assert words in out
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(e["ph"] == "X" and e["name"] == "F47" and e["pid"] == 1000 for e in events) == 4
    assert "simulated: pipeoptim" in picture.read_text()
    assert "pipeoptim, 1 stage, M = 1;" in command(capsys, "--synthetic", "--stages", "1")[1]
    code, out, _ = command(capsys, *common, "--chunks", "2", "--json")
    found = json.loads(out)
    assert (code, found["depth"], len(found["stages"]), found["synthetic"]) == (0, 4, 4, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give either --profile FILE"),
        (("--synthetic", "--profile", "x"), "give either --profile FILE"),
        (("--synthetic", "--prediction", "none"), "prediction is 'none', which a simulation does not tell from others"),
        (("--synthetic", "--prediction", "in_progress", "--method", "1f1b"), "1f1b makes no such predictions; leave it out"),
        (("--profile", "nowhere.json"), "cannot be read (No such file or directory); make it with pipeoptim profile"),
        (("--synthetic", "--bandwidth", "0"), "bandwidth is 0 bytes per second, must be above 0"),
        (("--synthetic", "--delay", "-1"), "delay is -0.001, must be a number of at least 0"),
        (("--synthetic", "--delay", "1,2"), "delay has 2 numbers, must have one for each of the 3 boundaries"),
        (("--synthetic", "--straggler", "17:1.5"), "the straggler is stage 17, which a pipeline of 4 stages does not have"),
        (("--synthetic", "--straggler", "1"), "straggler is '1', must be a stage and how many times as long it takes: 17:1.5"),
        (("--synthetic", "--mtbf", "100"), "failures need both --mtbf"),
        (("--synthetic", "--checkpoint-every", "60"), "failures need both --mtbf"),
        (("--synthetic", "--mtbf", "-3", "--recovery", "10"), "mtbf is -3 hours, must be above 0"),
        (("--synthetic", "--draws", "5"), "--draws and --seed are of jitter, and there is none"),
        (("--synthetic", "--mtbf", "1e-9", "--recovery", "1"), "fail so often that no checkpoint"),
        (("--synthetic", "--sizes", "with=3"), "unknown size 'with'; did you mean 'width'?"),
        (("--synthetic", "--sizes", "width=x"), "width is 'x', must be a whole number, as in width=4096"),
        (("--synthetic", "--sizes", "bandwidth=0"), "bandwidth is 0, must be a number above 0"),
        (("--synthetic", "--microbatches", "5"), "has 64 rows, which 5 micro-batches x 1 replicas do not divide"),
        (("--synthetic", "--cut", "1,1,1"), "the cut is [1, 1, 1], must be 4 lengths of at least 1"),
        (("--synthetic", "--mini-batches", "0"), "mini-batches is 0, must be at least 1"),
        (("--synthetic", "--mini-batches", "9000000"), "are more than the 20,000,000 that can be simulated"),
        (("--synthetic", "--trace", "nowhere/t.json"), "the folder nowhere does not exist"),
        (
            ("--synthetic", "--trace", "t.svg", "--picture", "t.svg"),
            "t.svg is asked for by --trace as well; choose another file for --picture",
        ),
        (("--synthetic", "--mini-batches", "20000", "--trace", "t"), "a trace of 240,000 actions is more than viewers open"),
        (("--synthetic", "--stages", "1000000000"), "1,000,000,000 blocks are more than the 100,000 of a formula"),
        (("--synthetic", "--sizes", "layers=6000"), "6,000 blocks are more than the 5,000 that a cut is looked for of"),
        (("--synthetic", "--sizes", "width=1e300"), "width is 1e+300, must be a number above 0"),
        (("--synthetic", "--sizes", "flops=1e-320"), "flops is 9.99989e-321, must be a number above 0 (at least 1e-30)"),
        (("--synthetic", "--sizes", "width=1e29"), "forward of block block 0 is 3.15"),
        (("--synthetic", "--bandwidth", "1e-320"), "bytes per second, must be above 0 (at least 1e-30)"),
        (("--synthetic", "--delay", "1e308"), "delay is 1e+305, must be a number of at least 0 and at most 1e+30"),
        (("--synthetic", "--jitter", "1000"), "jitter is 1000, must be a number of at least 0 and at most 10"),
        (("--synthetic", "--straggler", "0:1e300"), "the straggler of stage 0 is 1e+300 times as slow"),
        (("--synthetic", "--jitter", "0.1", "--seed", "-1"), "seed is -1, must be at least 0"),
        (("--synthetic", "--mtbf", "1e5", "--recovery", "1", "--checkpoint-every", "1e-6"), "make checkpoints less often"),
        (("--synthetic", "--mtbf", "0.03", "--recovery", "1"), "fail so often that no checkpoint"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = command(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_damaged_profiles_are_refused(tmp_path):
    path = synthetic(TransformerSizes(), stages=2).write(tmp_path / "p.json")
    whole = json.loads(path.read_text())
    cases = {
        "is damaged": path.read_text()[:-40],
        "is no profile of format 2 (it says 1)": json.dumps({**whole, "format": 1}),
        "bandwidth of the link is 0": json.dumps({**whole, "link": {"latency": 0, "bandwidth": 0}}),
        "a profile needs at least one block": json.dumps({**whole, "blocks": []}),
        "forward of block block 0 is -1": json.dumps({**whole, "blocks": [{**whole["blocks"][0], "forward": [-1, 0]}]}),
        "rows is [8, 4], must be": json.dumps({**whole, "rows": [8, 4]}),
        "is damaged (KeyError: 'optimizer')": json.dumps({key: value for key, value in whole.items() if key != "optimizer"}),
        "forward of block block 0 is None, must be a list": json.dumps(
            {**whole, "blocks": [{**whole["blocks"][0], "forward": None}]}
        ),
        "weight_bytes of block block 0 is 1000": json.dumps(
            {**whole, "blocks": [{**whole["blocks"][0], "weight_bytes": 10**400}]}
        ),
        "bandwidth of the link is True": json.dumps({**whole, "link": {"latency": 0, "bandwidth": True}}),
        "batch_rows is 64.5, must be a whole number": json.dumps({**whole, "batch_rows": 64.5}),
        "spread is 1000, must be at most 10": json.dumps({**whole, "spread": 1000}),
        "whose train, if it has any, is a list of options": json.dumps({**whole, "made": {"train": 5}}),
        "made is [], must be an object": json.dumps({**whole, "made": []}),
        "is damaged (TypeError: asdict()": json.dumps({**whole, "optimizer": {**whole["optimizer"], "rule_step": 0}}),
        "has 1 numbers for 2 sizes": json.dumps({**whole, "blocks": [{**whole["blocks"][0], "forward": [1]}]}),
    }
    for words, text in cases.items():
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            read_profile(path)
        assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"/dev/zero cannot be read \(Is a device, must be a file\)"):  # it has no end
        read_profile(Path("/dev/zero"))
