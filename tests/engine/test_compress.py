"""Compressed messages lose what they say and no more, feedback gives it back later, and both engines do the same."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import case
import compress_cases as cases
import pipeoptim as po
import stage_processes
from pipeoptim.engine.transport.compression import (
    KINDS,
    ROW,
    CompressedDirection,
    Compressor,
    Packed,
    pack_tensor,
    unpack,
    unpack_tensor,
)
from pipeoptim.engine.transport.message import HEADER, format_of

HERE = Path(__file__).parent
SHAPES = [(ROW,), (5, 40), (3, 4, 64), (2, 6, 5, 7), (40, 3), (2, 1, 33)]


def numbers(shape, seed, dtype=torch.float32):
    """Of very different sizes from row to row."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=g) * 10.0 ** torch.randint(-3, 4, shape[:1] + (1,) * (len(shape) - 1), generator=g)
    ).to(dtype)


def rounded(x):
    """int8 with one scale per row, written down once more; rows are the last dimension."""
    scale = x.abs().max(-1, keepdim=True).values / 127
    return (x / scale).round() * scale


@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_bf16_is_the_rounding_of_torch(shape, seed):
    x = numbers(shape, seed)
    packed = pack_tensor(x, "bf16")
    assert packed.payload.dtype == torch.bfloat16 and packed.scale is None
    assert torch.equal(unpack_tensor(packed), x.to(torch.bfloat16).to(torch.float32))


@given(st.sampled_from(SHAPES), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 10**6))
def test_int8_is_off_by_half_a_scale_at_most(shape, dtype, seed):
    x = numbers(shape, seed, dtype)
    packed = pack_tensor(x, "int8")
    y = unpack_tensor(packed)
    first = next(n for n in range(len(shape) - 1, -1, -1) if torch.Size(shape[n:]).numel() >= ROW)
    rows = x.double().flatten(first) if first < len(shape) else x.double()
    scale = (rows.abs().amax(-1) / 127).reshape(*shape[:first], *([1] * (len(shape) - first)))
    assert (packed.payload.dtype, y.dtype, y.shape, packed.scale.numel()) == (torch.int8, dtype, x.shape, scale.numel())
    last = torch.finfo(dtype).eps * y.double().abs()  # what the receiver's type can hold
    assert ((y.double() - x.double()).abs() <= scale / 2 * (1 + 1e-5) + last).all()


def test_rows_of_zeros_tiny_and_not_finite_numbers():
    x = torch.ones(4, 64)
    x[0], x[1], x[2, 3], x[3, 4] = 0, 1e-42, float("inf"), float("nan")
    y = unpack_tensor(pack_tensor(x, "int8"))
    assert torch.equal(y[:2], torch.zeros(2, 64))  # 1e-42 is 0 for whoever flushes denormal numbers, as GPUs do
    assert y[2:].isnan().all()
    assert torch.equal(unpack_tensor(pack_tensor(x, "bf16")).isfinite(), x.isfinite())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_alone_and_what_comes_back(kind):
    image = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    small = [torch.ones(ROW - 1), torch.tensor(1.0), torch.empty(0, 64)]
    alone = [*small, torch.ones(64, dtype=torch.float64), torch.ones(64, dtype=torch.int64), torch.ones(64) > 0, None, "text"]
    tree = {"alone": alone, "image": image, "plain": (torch.randn(3, 50).t(),)}
    packed = CompressedDirection(kind, False, 1).pack(0, tree)
    assert all(a is b for a, b in zip(packed["alone"], alone, strict=True))
    back = unpack(packed)
    assert (back["image"].stride(), back["image"].requires_grad, back["image"].is_leaf) == (image.stride(), True, True)
    assert not back["plain"][0].requires_grad and back["plain"][0].shape == (50, 3)
    assert format_of(packed)[0].payload < format_of(tree)[0].payload * 0.8
    assert isinstance(packed["image"], Packed)


def test_off_is_off():
    tree = (torch.randn(64), [None])
    off = Compressor(None, 2)
    assert off.pack_activations(0, tree) is off.pack_gradients(0, tree, 2.0) is off.unpack(tree) is tree
    assert off.state_dict() == {}
    finals = []
    for compress in (None, po.Compression(None, None)):
        _, pipe = emulate("int8", compress=compress)
        finals.append([t for t in tree_leaves(pipe.stage_state_dict(0)) if isinstance(t, torch.Tensor)])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


@given(
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(1, 3),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=12),
    st.lists(st.sampled_from([0.5, 1.0, 3.0, 64.0]), min_size=12, max_size=12),
)
def test_what_was_sent_and_what_is_lost_is_all_there_was(kind, dtype, m, seeds, scales):
    """The sum telescopes at every position, also when the loss scale changes on the way; the oracle adds in float64."""
    channel, shape = CompressedDirection(kind, True, m), (4, 33)
    given_, sent = torch.zeros(m, *shape, dtype=torch.float64), torch.zeros(m, *shape, dtype=torch.float64)
    for i, (seed, scale) in enumerate(zip(seeds, scales, strict=False)):
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
        given_[i % m] += x.double() / scale
        sent[i % m] += unpack(channel.pack(i, [x], loss_scale=scale))[0].double() / scale
    for (place, _), (lost, scale) in channel.lost.items():
        sent[place] += lost.double() / scale
    assert torch.allclose(sent, given_, rtol=0, atol=2e-5)


def test_residuals_of_another_shape_or_position_are_not_added():
    channel = CompressedDirection("int8", True, 2)
    x, other = torch.randn(4, 64), torch.randn(3, 64)
    for i, value in ((0, x), (1, other), (2, other), (4, x)):
        plain = unpack_tensor(pack_tensor(value, "int8"))
        assert torch.equal(unpack(channel.pack(i, value)), plain), f"message {i} begins anew"
    assert not torch.equal(unpack(channel.pack(6, x)), unpack_tensor(pack_tensor(x, "int8")))


def linear():
    torch.manual_seed(1)
    return [nn.Linear(6, 64), nn.Linear(64, 32)]


def pipe_of(stages, lr, compress, method="gpipe"):
    return po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=lr), nn.functional.mse_loss, method, compress=compress)


def test_gradients_are_those_of_a_hand_computation():
    first, second = linear()
    x, target = torch.randn(8, 6), torch.randn(8, 32)
    h = rounded((x @ first.weight.t() + first.bias).detach())
    error = 2 * (h @ second.weight.t() + second.bias - target).detach() / target.numel()
    back = rounded(error @ second.weight.detach())
    expected = [back.t() @ x, back.sum(0), error.t() @ h, error.sum(0)]
    before = [p.detach().clone() for p in (*first.parameters(), *second.parameters())]
    pipe_of([first, second], 1.0, "int8").step(x, target=target)
    found = [b - p.detach() for b, p in zip(before, (*first.parameters(), *second.parameters()), strict=True)]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-7)
    exact = (error @ second.weight.detach()).t() @ x
    assert (found[0] - exact).abs().max() > 2e-5  # the compression is seen


def test_with_feedback_a_bias_loses_nothing_in_the_long_run():
    """A bias's gradient is the sum of the rows that arrive: after 30 messages as wrong as one can make it, without it more."""
    rows, drifts = 8, {}
    for feedback in ("none", "gradients"):
        channel = Compressor(po.Compression("int8", "int8", feedback), 1).gradients
        g = torch.Generator().manual_seed(2)
        drift, worst = torch.zeros(64, dtype=torch.float64), 0.0
        for i in range(30):
            gradient = torch.randn(rows, 64, generator=g)
            drift += unpack(channel.pack(i, [gradient]))[0].double().sum(0) - gradient.double().sum(0)
            worst = max(worst, float(gradient.abs().max()) / 127 / 2)  # half a scale, but for the residual in it
        drifts[feedback] = float(drift.abs().max())
    assert drifts["gradients"] <= rows * worst * 1.05 < drifts["none"]


def test_evaluation_sends_everything_as_it_is():
    first, second = linear()
    x, target = torch.randn(8, 6), torch.randn(8, 32)
    pipe = pipe_of([first, second], 0.1, po.Compression("int8", "int8", "both"), "pipeoptim")
    for _ in range(3):
        pipe.step(x, target=target)
    loss = pipe.eval_step(x, target=target)
    assert torch.equal(loss, nn.functional.mse_loss(second(first(x)), target).detach())
    lost = copy.deepcopy(pipe.stage_state_dict(0)["compress"])
    pipe.eval_step(x, target=target)
    assert torch.equal(lost["activations"][0][2], pipe.stage_state_dict(0)["compress"]["activations"][0][2])


def test_packing_is_in_the_trace():
    trace = po.Trace()
    pipe = po.Emulator(
        linear(), lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss, compress="bf16", trace=trace, microbatches=2
    )
    pipe.step(torch.ones(8, 6), target=torch.ones(8, 32))
    pipe.drain()
    seen = [[span[0] for span in trace._rows[k].to_json()["spans"]] for k in range(2)]
    assert [row.count("pack") for row in seen] == [2, 2]
    assert all("unpack" in row for row in seen)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pipe_of(linear(), 0.1, "int4"), "compress is 'int4', must be one of bf16, int8"),
        (lambda: pipe_of(linear(), 0.1, 8), "compress is 8"),
        (lambda: po.Compression("fp8", None), "compression of activations is 'fp8'"),
        (lambda: po.Compression("bf16", "bf16", "all"), "error_feedback is 'all'"),
        (lambda: po.Compression("bf16", None, "both"), "gradients are not compressed"),
    ],
)
def test_bad_use_is_said(make, message):
    with pytest.raises(po.ConfigError, match=message):
        make()


def emulate(name, **changes):
    modules, batches, m, options = cases.CASES[name]
    stages = modules()
    options = {**options, **changes, **({"processes": 2} if len(stages) > 2 else {})}
    opts = [cases.optimizer(module) for module in stages]
    pipe = po.Emulator(stages, opts, case.loss_fn, "pipeoptim", m, seed=3, **options)
    return cases.train(pipe, lambda x, y: ([x], y), batches()), pipe


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("compressed")
    return path, stage_processes.run(HERE / "compress_worker.py", 2, str(path))


@pytest.mark.parametrize("name", cases.CASES)
def test_processes_equal_the_emulator_bit_for_bit(written, name):
    losses, pipe = emulate(name)
    for k in pipe.local_stages:
        theirs = torch.load(written[0] / f"{name}-{k}.pt", weights_only=True)
        pairs = zip(tree_leaves(pipe.stage_state_dict(k)), tree_leaves(theirs["state"]), strict=True)
        assert all(same(a, b) for a, b in pairs), f"stage {k} differs"
    assert torch.equal(torch.stack(losses), torch.stack(theirs["losses"]))
    assert all(loss.isfinite() for loss in losses)
    others, _ = emulate(name, compress=None)
    assert not torch.equal(torch.stack(losses), torch.stack(others)), "compression changed nothing"


def test_bytes_on_the_wire_and_settings_that_differ(written):
    for output in written[1]:
        plain, half, quarter = (int(n) for n in output.splitlines()[0].split()[1:])
        assert plain == HEADER + 32 * 512 * 4
        assert 0.49 < half / plain < 0.51
        assert 0.25 < quarter / plain < 0.26
        assert output.count("give all the same") == 3


def test_resume_is_bit_for_bit(tmp_path):
    """Stopped after 7 mini-batches and taken up by a new pipeline, from a state_dict and from a sharded checkpoint."""
    modules, batches, m, options = cases.CASES["fed back"]

    def pipeline():
        stages = modules()
        return po.Emulator(stages, [cases.optimizer(s) for s in stages], case.loss_fn, "pipeoptim", m, seed=3, **options)

    whole = pipeline()
    for x, y in batches()[:7]:
        whole.step(x, target=y)
    whole.drain()
    half = {k: copy.deepcopy(whole.stage_state_dict(k)) for k in range(2)}
    po.save_sharded(whole, tmp_path / "seven")
    assert [len(half[k]["compress"]["activations"]) for k in range(2)] == [2, 0]
    assert [len(half[k]["compress"]["gradients"]) for k in range(2)] == [0, 2]
    others = [pipeline(), pipeline(), pipeline()]
    for k in range(2):
        others[0].load_stage_state_dict(k, copy.deepcopy(half[k]))
        others[1].load_stage_state_dict(k, {name: v for name, v in half[k].items() if name != "compress"})
    assert po.load_sharded(others[2], tmp_path / "seven")
    for pipe in (whole, *others):
        for x, y in batches()[7:]:
            pipe.step(x, target=y)
        pipe.drain()
    finals = [tree_leaves([pipe.stage_state_dict(k) for k in range(2)]) for pipe in (whole, *others)]
    for forgets, final in zip((False, True, False), finals[1:], strict=True):
        assert all(same(a, b) for a, b in zip(finals[0], final, strict=True)) != forgets
