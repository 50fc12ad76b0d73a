"""Interleaved and overlapping programs: valid, counted, at full speed where they claim it; the emulator runs them right."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import layout_cases as cases
import pipeoptim as po
from pipeoptim.schedule import ActionKind, Program, count_gaps, timeline, to_svg, to_text, validate

processes, chunks, micros = st.integers(1, 5), st.integers(1, 4), st.integers(1, 6)


@given(p=processes, v=chunks, m=micros, minibatches=st.integers(1, 5), overlap=st.booleans())
def test_every_interleaved_program_is_valid(p, v, m, minibatches, overlap):
    program = Program("async_interleaved", p * v, m, p, overlap)
    validate(program, minibatches)
    for process in range(p):
        for n in range(minibatches):
            merged = program.process_step(process, n)
            for k in range(process, p * v, p):
                assert [a for j, a in merged if j == k] == program.step(k, n)
            assert {program.process_of(k) for k, _ in merged} == {process}
        drained = program.process_drain(process, minibatches)
        for k in range(process, p * v, p):
            assert [a for j, a in drained if j == k] == program.drain(k, minibatches)


@given(p=processes, v=chunks, m=micros, overlap=st.booleans(), k=st.integers(0, 19))
def test_gaps_of_interleaved_programs_are_periodic_as_the_count_assumes(p, v, m, overlap, k):
    program, k = Program("async_interleaved", p * v, m, p, overlap), k % (p * v)
    n = 3 * p * v + 4
    assert count_gaps(program.full(k, n)) == {i: program.gap(k, i) for i in range(n * m)}


@given(d=st.integers(1, 6), m=micros, k=st.integers(0, 5), i=st.integers(0, 60))
def test_one_stage_per_process_is_plain_async_1f1b_and_overlap_costs_one_update(d, m, k, i):
    k %= d
    plain = Program("async_1f1b", d, m)
    assert Program("async_interleaved", d, m).step(k, i) == plain.step(k, i)
    assert Program("async_interleaved", d, m, d).drain(k, i) == plain.drain(k, i)
    late = Program("async_1f1b", d, m, overlap=True)
    ahead = d - k if i + 1 > d - k else i  # forwards between F and B of micro-batch i, its own included
    assert late.gap(k, i) == i // m - max(0, i - ahead) // m


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 1), (2, 4, 1), (3, 2, 1), (4, 2, 4), (4, 4, 2), (8, 2, 8)])
def test_interleaving_keeps_every_process_busy(p, v, m):
    program = Program("async_interleaved", p * v, m, p)
    spans = [s for s in timeline(program, 40) if s.action.kind is not ActionKind.U]
    length = 3 * v * m  # of a mini-batch on one process, F = 1 and B = 2
    steady = [s for s in spans if 15 * length <= s.start < 25 * length]
    assert sum(s.end - s.start for s in steady) == pytest.approx(p * 10 * length, rel=0.03)


def test_activations_are_spread_over_the_processes():
    program = Program("async_interleaved", 8, 1, 4)
    held = [sum(program.in_flight(k) for k in range(p, 8, 4)) for p in range(4)]
    assert held == [7, 7, 5, 5]  # of half a stage each; 8, 6, 4, 2 with the two halves on one process


def test_drawings_name_the_process():
    program = Program("async_interleaved", 4, 1, 2)
    assert "stage 3 on 1 |" in to_text(program, 2)
    assert "stage 2 on 0" in to_svg(program, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Program("async_interleaved", 4, 1, 3), "processes is 3, must divide the depth of 4"),
        (lambda: Program("gpipe", 4, 1, 2), "one stage per process, so 4 stages"),
        (lambda: Program("1f1b", 4, 1, overlap=True), "it flushes"),
        (lambda: po.METHODS["spectrain"].program(4, 1, 2), "for its own order"),
        (lambda: po.METHODS["pipedream_2bw"].program(4, 4, overlap=True), "for its own order"),
        (lambda: po.Clip(1.0, "global").check(Program("async_interleaved", 4, 4, 2)), "use scope 'stage'"),
    ],
)
def test_what_cannot_be_had_is_refused(make, words):
    with pytest.raises(po.ConfigError, match=words):
        make()


def oracle(program, weights, batches, loss_fn, lr):
    """pipeoptim with SGD on stages ``x -> tanh(x @ W)``, all past versions kept: a plain walk along the action program."""
    versions = [[w] for w in weights]
    depth, gradient = len(weights), [None] * len(weights)
    predicted, kept, losses = {}, {}, []
    at = [0] * depth
    programs = [program.full(k, len(batches)) for k in range(depth)]
    while any(at[k] < len(programs[k]) for k in range(depth)):
        for k in range(depth):
            while at[k] < len(programs[k]):
                kind, i = programs[k][at[k]]
                if kind is ActionKind.F:
                    if k and ("out", k - 1, i) not in kept:
                        break
                    x = batches[i][0] if k == 0 else kept["out", k - 1, i]
                    steps, now = program.gap(k, i), len(versions[k]) - 1
                    moved = versions[k][now] - versions[k][now - 1] if now else 0
                    predicted[k, i] = versions[k][now] + steps * moved
                    kept["in", k, i], kept["out", k, i] = x, torch.tanh(x @ predicted[k, i])
                elif kind is ActionKind.B:
                    out = kept["out", k, i]
                    if k == depth - 1:
                        leaf = out.clone().requires_grad_()
                        loss = loss_fn(leaf, batches[i][1])
                        losses.append(loss.item())
                        (grad,) = torch.autograd.grad(loss, leaf)
                    elif ("grad", k, i) in kept:
                        grad = kept["grad", k, i]
                    else:
                        break
                    inner = grad * (1 - out**2)
                    gradient[k] = kept["in", k, i].T @ inner
                    if k:
                        kept["grad", k - 1, i] = inner @ versions[k][-1].T  # B sees the latest weights
                else:
                    versions[k].append(versions[k][-1] - lr * gradient[k])
                at[k] += 1
    return [v[-1] for v in versions], losses


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64) / 2)

    def forward(self, x):
        return torch.tanh(x @ self.w)


@pytest.mark.parametrize(
    ("options", "gaps"),
    [
        ({"processes": 2}, [2, 2, 0, 0]),
        ({"processes": 1}, [1, 1, 0, 0]),
        ({"overlap": True}, [4, 3, 2, 1]),
        ({"processes": 2, "overlap": True}, [3, 3, 1, 1]),
        ({"processes": 2, "slack": 1}, [4, 3, 1, 0]),
        ({"processes": 2, "slack": 2, "overlap": True}, [6, 5, 2, 1]),
    ],
    ids=str,
)
def test_the_emulator_equals_an_oracle_that_keeps_all_versions(options, gaps):
    torch.manual_seed(0)
    stages = [Layer() for _ in range(4)]
    weights = [s.w.detach().clone() for s in stages]
    batches = [(torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)) for _ in range(14)]
    loss_fn = torch.nn.functional.mse_loss
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), loss_fn, prediction="displacement", **options)
    losses = [pipe.step(x, target=y).item() for x, y in batches]
    pipe.drain()
    expected, expected_losses = oracle(pipe.program, weights, batches, loss_fn, 0.1)
    assert losses == pytest.approx(expected_losses, abs=1e-12)
    for stage, w in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.w.detach(), w, rtol=0, atol=1e-12)
    assert [pipe.version_gap(k) for k in range(4)] == gaps


@pytest.mark.parametrize("method", sorted(po.METHODS))
def test_every_method_that_counts_interleaves_and_overlaps(method):
    def run(**options):
        modules = [cases.module(cases.Case(), k) for k in range(4)]
        pipe = po.Emulator(modules, lambda p: torch.optim.AdamW(p), torch.nn.functional.mse_loss, method, 4, **options)
        for x, y in list(cases.batches())[:4]:
            pipe.step(x, target=y)
        most = [pipe.weight_bytes(k) for k in range(4)]
        pipe.drain()
        own = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in modules]
        for k in range(4):
            assert pipe.version(k) == 4
            assert most[k] <= own[k] * pipe.weight_copies(k) or po.METHODS[method].predictor
        return pipe

    source = po.METHODS[method]
    able = source.forward.any_order and source.backward.any_order
    if source.order != "async_1f1b" or not able:
        with pytest.raises(po.ConfigError):
            run(processes=2)
        return
    run(processes=2)
    run(overlap=True)
