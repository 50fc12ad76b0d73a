"""A backward on other weights than the forward's is exact for every module, also through views, and nothing is kept alive.

Oracle: the slow and obvious way. Copy the forward's weights into the parameters in place, run the forward, copy the backward's
weights in, run the backward. Every view follows by itself.
"""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from pipeoptim.errors import PipeOptimError
from pipeoptim.weights import SavedWeights, StorageLayout, swapped


class Views(nn.Module):
    """Weights used through transposes, slices, expansion and twice."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.v = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = x @ self.w.t() + torch.mm(x, self.w[:, :].T)
        x = torch.tanh(x[:, :3] @ self.w[1:4, 2:5]) @ self.w[:3]
        return x * self.v.expand(x.shape) * self.w.diagonal()


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.norm(self.embed((x * 3).abs().long() % 7)).tanh())


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a.requires_grad_(False)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class FlatStorage(nn.Module):
    """Two parameters that are views of one buffer, as flattening libraries make them, beside a frozen one."""

    def __init__(self):
        super().__init__()
        flat = torch.randn(6 * 6 + 6 + 6)
        self.w, self.b = nn.Parameter(flat[:36].view(6, 6)), nn.Parameter(flat[36:42])
        self.c = nn.Parameter(flat[42:], requires_grad=False)

    def forward(self, x):
        return torch.tanh(nn.functional.linear(x, self.w, self.b)) @ self.w.t() * self.c


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None, :].expand(-1, 3, -1))[0].sum(1)


MODULES = {
    "views": Views,
    "shared": Shared,
    "frozen": Frozen,
    "flat": FlatStorage,
    "lstm": Recurrent,
    "linear": lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 6), nn.Softplus(), nn.Linear(6, 2)),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True)),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
    "bilinear": lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(), nn.Linear(4, 4).double().float(), nn.GroupNorm(2, 4)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
}


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def by_copying(module, x, forward_weights, backward_weights):
    """The oracle. Returns output, gradient of the input, gradients of the weights."""
    params = trainable(module)
    before = [p.detach().clone() for p in params]
    x = x.clone().requires_grad_()

    def put(tensors):
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(params)):
            for p, t in zip(params, tensors, strict=True):
                p.copy_(t)

    put(forward_weights)
    y = module(x)
    put(backward_weights)
    y.square().sum().backward()
    put(before)
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    return y.detach(), x.grad, grads


def by_place(module, x, forward_weights):
    """The library: forward on a copy, backward on the latest."""
    params = trainable(module)
    layout = StorageLayout(params)
    copy = layout.copy()
    for t, w in zip(copy.tensors, forward_weights, strict=True):
        t.copy_(w)
    x = x.clone().requires_grad_()
    saved = SavedWeights(copy.table)
    with swapped(params, copy.tensors), saved:
        y = module(x)
        out = y.square().sum()
    alive = weakref.ref(copy.bases[0])
    for t in copy.tensors:
        t.fill_(float("nan"))  # the copy is overwritten before the backward, as the next prediction does
    del copy, t
    saved.target = layout.latest.bases
    out.backward()
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    return y.detach(), x.grad, grads, alive


def equal(a, b):
    return all((p is None and q is None) or torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_forward_on_a_copy_and_backward_on_the_latest_is_exact(name):
    torch.manual_seed(0)
    module, x = MODULES[name](), torch.randn(4, 6)
    other = [p.detach() + 0.1 * torch.randn_like(p) for p in trainable(module)]
    latest = [p.detach().clone() for p in trainable(module)]
    pointers = [p.data_ptr() for p in module.parameters()]
    expected = by_copying(module, x, other, latest)
    *found, alive = by_place(module, x, other)
    assert torch.equal(expected[0], found[0])
    assert equal([expected[1]], [found[1]])
    assert equal(expected[2], found[2])
    assert pointers == [p.data_ptr() for p in module.parameters()]
    assert equal(latest, [p.detach() for p in trainable(module)])
    gc.collect()
    assert alive() is None, "something keeps the copy alive"


@pytest.mark.parametrize("name", MODULES)
def test_forward_in_place_and_backward_on_a_stash_is_exact(name):
    torch.manual_seed(0)
    module, x = MODULES[name](), torch.randn(4, 6)
    params = trainable(module)
    latest = [p.detach().clone() for p in params]
    expected = by_copying(module, x, latest, latest)
    layout = StorageLayout(params)
    x = x.clone().requires_grad_()
    saved = SavedWeights(layout.latest.table)
    with saved:
        y = module(x)
        out = y.square().sum()
    stash = layout.copy()
    with torch.no_grad():
        for p in params:
            p.add_(1.0)  # the update
    saved.target = stash.bases
    out.backward()
    assert torch.equal(expected[0], y.detach())
    assert torch.equal(expected[1], x.grad) if expected[1] is not None else x.grad is None
    assert equal(expected[2], [p.grad for p in params])


def test_weights_come_back_when_the_forward_raises():
    layer = nn.Linear(2, 2)
    pointers = [p.data_ptr() for p in layer.parameters()]
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        swapped(list(layer.parameters()), [torch.zeros(2, 2), torch.zeros(2)]),
    ):
        layer(torch.ones(1, 3))
    assert pointers == [p.data_ptr() for p in layer.parameters()]


def test_a_backward_outside_the_pipeline_is_refused():
    layer = nn.Linear(2, 2)
    with SavedWeights(StorageLayout(list(layer.parameters())).latest.table):
        out = layer(torch.ones(1, 2).requires_grad_()).sum()
    with pytest.raises(PipeOptimError, match="no weights were chosen"):
        out.backward()


def test_an_activation_changed_in_place_is_still_an_error():
    layer = nn.Linear(2, 2)
    layout = StorageLayout(list(layer.parameters()))
    saved = SavedWeights(layout.latest.table)
    with saved:
        y = torch.exp(layer(torch.ones(1, 2)))
        out = y.sum()
    saved.target = layout.latest.bases
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_copy_has_the_layout_of_the_weights():
    flat = FlatStorage()
    layout = StorageLayout([flat.w, flat.b])
    copy = layout.copy()
    assert len(copy.bases) == 1
    assert copy.nbytes() == flat.w.untyped_storage().nbytes() == 48 * 4
    assert copy.tensors[1].storage_offset() == 36
    assert torch.equal(copy.tensors[0], flat.w)
    mixed = StorageLayout([torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16).t()])
    assert [t.dtype for t in mixed.copy().tensors] == [torch.float32, torch.bfloat16]
    assert mixed.copy().tensors[1].stride() == (1, 2)
