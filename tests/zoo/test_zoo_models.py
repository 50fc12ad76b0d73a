"""The models are the published ones, and may be cut anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.models.alexnet import alexnet
from pipeoptim_zoo.models.chain import Carry, Chain
from pipeoptim_zoo.models.digits_cnn import digits_cnn
from pipeoptim_zoo.models.gnmt import gnmt, gnmt8, gnmt16
from pipeoptim_zoo.models.googlenet import googlenet
from pipeoptim_zoo.models.gpt import gpt
from pipeoptim_zoo.models.image import INPUT_SIZES
from pipeoptim_zoo.models.inception_v3 import inception_v3
from pipeoptim_zoo.models.recurrent import residual_lstm
from pipeoptim_zoo.models.resnet import resnet50, resnet101
from pipeoptim_zoo.models.transformer import Attention, Block
from pipeoptim_zoo.models.vgg import vgg16
from pipeoptim_zoo.models.vit import vit, vit_b16

IMAGE_MODELS: list[Callable[..., nn.Sequential]] = [alexnet, vgg16, resnet50, resnet101, googlenet, inception_v3]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize(
    ("make", "options", "published"),
    [
        (alexnet, {}, 61_100_840),
        (vgg16, {}, 138_357_544),
        (vgg16, {"batch_norm": True}, 138_365_992),
        (resnet50, {}, 25_557_032),
        (resnet101, {}, 44_549_160),
        (googlenet, {}, 13_004_888),
        (googlenet, {"auxiliary": False}, 6_624_904),
        (inception_v3, {}, 27_161_264),
        (inception_v3, {"auxiliary": False}, 23_834_568),
        (vit_b16, {}, 86_567_656),
    ],
)
def test_parameters_are_the_published_number(make: Callable[..., nn.Module], options: dict[str, Any], published: int) -> None:
    with torch.device("meta"):
        assert count(make(**options)) == published


#: What is another than in the published net at 1000 classes, from the deviations that each docstring states.
CLASSIFIER_OF_ALEXNET = 4096 * 256 * (6 * 6 - 3 * 3)  # sees 3x3 positions
SMALL: dict[Callable[..., nn.Module], dict[int, int]] = {
    alexnet: {32: CLASSIFIER_OF_ALEXNET, 64: CLASSIFIER_OF_ALEXNET},
    vgg16: {32: 4096 * 512 * (7 * 7 - 1), 64: 4096 * 512 * (7 * 7 - 2 * 2)},
    resnet50: dict.fromkeys((32, 64), 3 * 64 * (7 * 7 - 3 * 3)),  # first convolution
    resnet101: dict.fromkeys((32, 64), 3 * 64 * (7 * 7 - 3 * 3)),
    googlenet: dict.fromkeys((32, 64), 3 * 64 * (7 * 7 - 3 * 3)),
    inception_v3: {},
}
PUBLISHED = {
    alexnet: 61_100_840,
    vgg16: 138_357_544,
    resnet50: 25_557_032,
    resnet101: 44_549_160,
    googlenet: 13_004_888,
    inception_v3: 27_161_264,
}


@pytest.mark.parametrize("size", INPUT_SIZES)
@pytest.mark.parametrize("make", IMAGE_MODELS, ids=lambda make: make.__name__)
def test_parameters_at_every_input_size(make: Callable[..., nn.Module], size: int) -> None:
    with torch.device("meta"):
        assert count(make(input_size=size)) == PUBLISHED[make] - SMALL[make].get(size, 0)


def test_gpt_parameters_are_those_of_gpt_2_but_for_the_deviations() -> None:
    """124,439,808 for the small one, with one matrix for embedding and head, and biases in attention's linear layers."""
    words, width, layers = 50_257, 768, 12
    with torch.device("meta"):
        model = gpt(words, 1024, width, layers, 12)
    assert count(model) == 124_439_808 + words * width - layers * (3 * width + width)
    assert count(model) == width * (2 * words + 1024 + 2) + layers * (12 * width**2 + 9 * width), "the docstring's formula"


@pytest.mark.parametrize(("make", "half", "blocks"), [(gnmt8, 4, 11), (gnmt16, 8, 19)])
def test_gnmt_parameters_follow_from_its_layers(make: Callable[..., nn.Sequential], half: int, blocks: int) -> None:
    width, words = 1024, 32_320
    with torch.device("meta"):
        model = make()
    lstm, wide = 8 * width**2 + 8 * width, 12 * width**2 + 8 * width  # inputs of width, of 2 * width
    encoder = 2 * lstm + wide + (half - 2) * lstm
    attention = 2 * width**2 + 2 * width + 1
    decoder = lstm + attention + (half - 1) * wide
    assert count(model) == 2 * words * width + encoder + decoder + (width + 1) * words
    assert len(model) == blocks


@pytest.mark.parametrize("size", INPUT_SIZES)
@pytest.mark.parametrize("make", IMAGE_MODELS, ids=lambda make: make.__name__)
def test_every_input_size_gives_logits(make: Callable[..., nn.Sequential], size: int) -> None:
    with torch.device("meta"):
        model = make(input_size=size, classes=7, width=0.25)
        shapes = [tuple(out.shape) for out in as_tuple(model(torch.empty(2, 3, size, size)))]
    heads = {googlenet: 3, inception_v3: 2}.get(make, 1)
    assert shapes == [(2, 7)] * heads


@pytest.mark.parametrize("make", IMAGE_MODELS, ids=lambda make: make.__name__)
def test_another_input_size_is_refused(make: Callable[..., nn.Sequential]) -> None:
    with pytest.raises(ConfigError, match="input_size=48"):
        make(input_size=48)


@pytest.mark.parametrize("make", [googlenet, inception_v3])
def test_auxiliary_logits_come_in_training_alone(make: Callable[..., nn.Sequential]) -> None:
    model = make(input_size=32, classes=5, width=0.05)
    x = torch.randn(2, 3, 32, 32)
    assert isinstance(model(x), tuple)
    model.eval()
    assert tuple(model(x).shape) == (2, 5)


@pytest.mark.parametrize("make", [googlenet, inception_v3])
def test_tensors_between_stages_are_the_same_in_both_modes(make: Callable[..., nn.Sequential]) -> None:
    with torch.device("meta"):
        model = make(input_size=32, classes=5, width=0.05)
        x = torch.empty(2, 3, 32, 32)
        shapes = []
        for mode in (True, False):
            model.train(mode)
            args: tuple[Tensor, ...] = (x,)
            seen = []
            for block in model[:-1]:
                args = as_tuple(block(*args))
                seen.append([tuple(a.shape) for a in args])
            shapes.append(seen)
    assert shapes[0] == shapes[1]
    assert max(map(len, shapes[0])) > 1


@pytest.mark.parametrize("make", [googlenet, inception_v3])
def test_auxiliary_heads_are_trained(make: Callable[..., nn.Sequential]) -> None:
    model = make(input_size=32, classes=5, width=0.05)
    sum(logits.sum() for logits in model(torch.randn(2, 3, 32, 32))).backward()
    assert all(p.grad is not None for p in model.parameters())


IDS = torch.tensor([[5, 6, 7, 0, 2, 8, 9], [4, 5, 6, 7, 2, 3, 0]])
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CUTTABLE: dict[str, tuple[Callable[[], nn.Sequential], Tensor]] = {
    "alexnet": (lambda: alexnet(32, 5, 0.05), IMAGE),
    "vgg16": (lambda: vgg16(32, 5, 0.05, batch_norm=True), IMAGE),
    "resnet101": (lambda: resnet101(32, 5, 0.05), IMAGE),
    "googlenet": (lambda: googlenet(32, 5, 0.05), IMAGE),
    "inception_v3": (lambda: inception_v3(32, 5, 0.05), IMAGE),
    "vit": (lambda: vit(32, 8, 16, 3, 2, 5, dropout=0.1), IMAGE),
    "digits_cnn": (lambda: digits_cnn(8), IMAGE[:, :1, :8, :8]),
    "gpt": (lambda: gpt(12, 8, 16, 4, 2, dropout=0.1), IDS),
    "residual_lstm": (lambda: residual_lstm(12, 3, 8, 4), IDS),
    "gnmt": (lambda: gnmt(12, 4, 8, 8), IDS),
}


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Sequential]:
    torch.manual_seed(0)
    return {name: make() for name, (make, _) in CUTTABLE.items()}


@pytest.mark.parametrize("name", CUTTABLE)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_gives_the_same_output_and_gradients(name: str, built: dict[str, nn.Sequential], data: st.DataObject) -> None:
    whole, x = built[name], CUTTABLE[name][1]
    length = len(whole)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4), label="cuts"))
    parts = copy.deepcopy(whole)
    stages = [parts[a:b] for a, b in zip([0, *cuts], [*cuts, length], strict=True)]

    torch.manual_seed(1)
    expected = as_tuple(whole(x))
    torch.manual_seed(1)
    args: tuple[Tensor, ...] = (x,)
    inputs: list[tuple[Tensor, ...]] = []
    outputs: list[tuple[Tensor, ...]] = []
    for stage in stages:  # as a pipeline does it: each stage starts from detached tensors
        args = tuple(a.detach().requires_grad_(a.is_floating_point() and bool(inputs)) for a in args)
        inputs.append(args)
        args = as_tuple(stage(*args))
        outputs.append(args)
    assert len(args) == len(expected)
    for ours, theirs in zip(args, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    whole.zero_grad()
    sum(out.square().sum() for out in expected).backward()
    sum(out.square().sum() for out in outputs[-1]).backward()
    for k in reversed(range(len(stages) - 1)):
        pairs = [(out, arg.grad) for out, arg in zip(outputs[k], inputs[k + 1], strict=True) if out.requires_grad]
        assert all(grad is not None for _, grad in pairs), "a stage would wait for a gradient that never comes"
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    for (key, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=f"gradient of {key}")


@pytest.mark.parametrize("name", CUTTABLE)
def test_models_are_flat_and_have_enough_blocks(name: str, built: dict[str, nn.Sequential]) -> None:
    model = built[name]
    assert isinstance(model, nn.Sequential)
    assert len(model) >= 5
    assert type(model[1:3]) is type(model)
    shared = [p for p in model.parameters() if sum(p is q for block in model for q in block.parameters()) > 1]
    assert not shared, "a parameter of two blocks could not be cut apart"


def test_digits_cnn_has_at_least_eight_blocks_with_norm_and_dropout() -> None:
    model = digits_cnn()
    assert len(model) >= 8
    kinds = {type(module) for module in model.modules()}
    assert nn.BatchNorm2d in kinds
    assert nn.Dropout in kinds


def test_chain_spreads_tuples_and_joins_a_single_output() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + 1

    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor]:
            return (a + b,)

    chain = Chain(Two(), Carry(nn.Identity()), Add())
    assert float(chain(torch.tensor(2.0))) == 5.0
    assert [float(v) for v in chain[:2](torch.tensor(2.0))] == [2.0, 3.0]


def test_gpt_does_not_see_the_future() -> None:
    model = gpt(12, 8, 16, 2, 2).eval()
    ids = torch.randint(12, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 12
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_gpt_residual_projections_start_smaller_with_depth() -> None:
    torch.manual_seed(0)
    model = gpt(64, 8, 128, 8, 4)
    block = model[3]
    assert isinstance(block, Block)
    assert float(block.up.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.down.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(block.attention.out.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)


def test_attention_is_softmax_of_scaled_products() -> None:
    torch.manual_seed(0)
    layer, x = Attention(8, 2, 0.0, causal=True, bias=True), torch.randn(2, 5, 8)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / 2
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., h])
    torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, -1)))


def test_impossible_transformers_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads=3"):
        gpt(10, 8, 16, 1, 3)
    with pytest.raises(ConfigError, match="patch=5"):
        vit(32, 5)
    with pytest.raises(ValueError, match="longer than context=8"):
        gpt(10, 8, 16, 1, 2)(torch.zeros(1, 9, dtype=torch.long))


def test_constructors_are_deterministic() -> None:
    for make, _ in CUTTABLE.values():
        torch.manual_seed(3)
        first = make().state_dict()
        torch.manual_seed(3)
        second = make().state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
