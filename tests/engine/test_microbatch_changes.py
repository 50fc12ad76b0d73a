"""M changes in the middle of a run: as a new pipeline that goes on from the drained state, as the oracle, and on all stages alike."""

import copy
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import case
import oracle
import pipeoptim as po
import stage_processes
from test_oracle import WIDTH, Layer, corrections, takes_slack, uses

CHANGES = {12: 4, 24: 2, 31: 1}  # by mini-batch
SIZES = {0: 2, 12: 8, 24: 4}  # rows: the mini-batch may change with it
HERE = Path(__file__).parent


def batch(n, x, y):
    rows = SIZES[max(at for at in SIZES if at <= n)]
    return x[:rows], y[:rows]


def asking(holder, gap=lambda pipe: pipe.version_gap(0)):
    """An on_update that asks for the changes so early that they take effect at their mini-batch."""

    def on_update(k, version):
        at = version + gap(holder[0])
        if at in CHANGES:
            holder[0].set_microbatches(CHANGES[at])

    return on_update


def emulator(method, m, on_update=None, **options):
    modules = case.pieces(4)
    opts = [case.optimizer("adamw", module.parameters()) for module in modules]
    rates = [case.scheduler(o) for o in opts]
    return po.Emulator(modules, opts, case.loss_fn, method, m, schedulers=rates, seed=3, on_update=on_update, **options)


def train(method, how, **options):
    """The states of all stages after the run; ``how`` M changes: "between" steps, from "within" on_update, or with "new" pipelines."""
    holder = []
    pipe = emulator(method, 1, asking(holder) if how == "within" else None, **options)
    holder.append(pipe)
    for n, whole in enumerate(case.batches()):
        if n in CHANGES and how == "new":
            pipe.drain()
            states = [copy.deepcopy(pipe.stage_state_dict(k)) for k in range(4)]
            pipe = emulator(method, CHANGES[n], **options)
            for k, state in enumerate(states):
                pipe.load_stage_state_dict(k, state)
        elif n in CHANGES and how == "between":
            pipe.set_microbatches(CHANGES[n])
        pipe.step(batch(n, *whole)[0], target=batch(n, *whole)[1])
        if n > 0:
            assert pipe.microbatches == CHANGES.get(max((at for at in CHANGES if at <= n), default=-1), 1)
    pipe.drain()
    assert [pipe.version(k) for k in range(4)] == [case.UPDATES] * 4
    return [pipe.stage_state_dict(k) for k in range(4)]


def assert_equal(ours, theirs):
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("method", [name for name, m in sorted(po.METHODS.items()) if not m.at_least_depth_microbatches])
def test_a_change_is_a_new_pipeline_that_goes_on(method):
    expected = train(method, "new")
    assert_equal(train(method, "between"), expected)


@pytest.mark.parametrize(
    "options",
    [{"slack": 1}, {"clip": po.Clip(0.5, "global_delayed")}, {"compress": "int8"}, {"prediction": "in_progress"}],
    ids=str,
)
def test_so_it_is_with_options_and_from_within_on_update(options):
    expected = train("pipeoptim", "new", **options)
    assert_equal(train("pipeoptim", "between", **options), expected)
    assert_equal(train("pipeoptim", "within", **options), expected)


@pytest.mark.parametrize("method", [name for name in sorted(po.METHODS) if takes_slack(name) and name != "pipemare"])
def test_a_ramp_equals_the_oracle(method):
    """PipeMare is left out: its averages forget at another pace in each part, which the oracle has only one number for."""
    depth, slack, parts = 3, 0.5, [4, 8, 5]
    segments = [7, 6, 9]
    torch.manual_seed(1)
    stages = [torch.nn.Sequential(Layer(), Layer()) for _ in range(depth)]
    rule = oracle.Rule("nadam") if method.startswith("nesterov") else oracle.Rule("adamw", wd=0.1)
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    batches = [
        (torch.randn(m, WIDTH).double(), torch.randn(m, WIDTH).double())
        for m, n in zip(parts, segments, strict=True)
        for _ in range(n)
    ]
    pipe = po.Emulator(stages, rule.torch, torch.nn.functional.mse_loss, method, parts[0], slack=slack)
    losses, fed = [], iter(batches)
    for m, minibatches in zip(parts, segments, strict=True):
        pipe.set_microbatches(m)
        losses += [pipe.step(x, target=y).item() for x, y in (next(fed) for _ in range(minibatches))]
        assert pipe.version_gap(0) == -(-oracle.ahead(0, depth, slack) // m)
    pipe.drain()
    each = [corrections(method, depth, m, rule, slack) for m in parts]
    ends = list(accumulate(segments))

    def correct(k, stage, *rest):
        return each[bisect_right(ends, len(stage.weights) - 1)](k, stage, *rest)

    used = {"correct": correct if each[0] else None, "slack": slack}
    expected, expected_losses = oracle.train(initial, rule, segments, batches, parts, *uses(method, rule), **used)
    assert losses == pytest.approx(expected_losses, abs=1e-10, rel=0)
    for stage, theirs in zip(stages, expected, strict=True):
        for p, w in zip(stage.parameters(), theirs.weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def test_processes_change_with_the_emulator_and_are_told_where_they_differ(tmp_path):
    outputs = stage_processes.run(HERE / "changes_worker.py", 2, str(tmp_path))
    for how in ("between", "within"):
        holder = []
        modules = case.pieces(2)
        opts = [case.optimizer("adamw", module.parameters()) for module in modules]
        hook = asking(holder) if how == "within" else None
        rates = [case.scheduler(o) for o in opts]
        pipe = po.Emulator(modules, opts, case.loss_fn, "pipeoptim", 1, schedulers=rates, seed=3, on_update=hook, slack=1)
        holder.append(pipe)
        for n, whole in enumerate(case.batches()):
            if how == "between" and n in CHANGES:
                pipe.set_microbatches(CHANGES[n])
            pipe.step(batch(n, *whole)[0], target=batch(n, *whole)[1])
        pipe.drain()
        for k in range(2):
            assert_equal(pipe.stage_state_dict(k), torch.load(tmp_path / f"{how}-{k}.pt", weights_only=True))
    assert "0 stage 0 was told to cut mini-batches into 2 micro-batches, stage 1 into 4" in outputs[1]
    assert "1 stage 0 trains while stage 1 changes its number of micro-batches: call set_microbatches() in all" in outputs[1]


def test_what_cannot_change_is_refused_and_nothing_has_changed():
    class Predictor(po.methods.average_predictors.SmoothedGradient):
        use_program = None

    own = po.Method("own", "async_1f1b", po.weights.Predicted(), po.weights.Latest(), "own", predictor=Predictor)
    stages = [torch.nn.Linear(4, 4, bias=False) for _ in range(4)]
    stages[3].weight.data.copy_(stages[0].weight.data)

    def pipe(method="pipeoptim", m=4, **options):
        return po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, method, m, **options)

    x = torch.ones(8, 4)
    for made, m, words in (
        (pipe(), 0, "microbatches is 0"),
        (pipe(), True, "microbatches is True"),
        (pipe("pipedream_2bw"), 2, "needs at least as many micro-batches as stages: microbatches is 2"),
        (pipe(clip=po.Clip(1.0, "global")), 1, "needs microbatches >= depth - 1"),
        (pipe(trace=po.Trace()), 2, "leave trace out"),
        (pipe(tied=[[(0, "weight"), (3, "weight")]]), 2, "are 1 updates old, and would be 2 with 2 micro-batches"),
        (pipe(own), 2, "give it a method use_program"),
    ):
        made.step(x, target=x)
        with pytest.raises(po.ConfigError, match=words):
            made.set_microbatches(m)
        assert made.microbatches == made.program.microbatches == 4
        made.step(x, target=x)
        made.drain()
        assert made.version(0) == 2

    def two(k, version):
        made.set_microbatches(2 if k else 8)

    made = pipe(on_update=two)
    made.step(x, target=x)
    with pytest.raises(po.ConfigError, match="set_microbatches.. was given (2 and 8|8 and 2) at version 1"):
        made.step(x, target=x)
