"""Updates that are done again: equal for every optimizer and method, unequal where a bit was flipped."""

import gc
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.engine.stage.audit import different_bits
from pipeoptim.rules import CombinedOptimizer

mse = nn.functional.mse_loss


def layers(depth):
    torch.manual_seed(2)
    return [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(depth)]


def feed(pipe, updates=5):
    g = torch.Generator().manual_seed(3)
    for _ in range(updates):
        pipe.step(torch.randn(4, 5, generator=g), target=torch.randn(4, 5, generator=g))
    pipe.drain()


class Noisy(torch.optim.SGD):
    """Draws random numbers in its step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p), alpha=1e-3)


def muon(params):
    found = list(params)
    return CombinedOptimizer(
        torch.optim.Muon([p for p in found if p.ndim == 2]), torch.optim.AdamW([p for p in found if p.ndim < 2])
    )


NAMES = "SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop", "Adafactor"
OPTIMIZERS = {name: partial(getattr(torch.optim, name), lr=0.01) for name in NAMES} | {
    "muon": muon,
    "noisy": partial(Noisy, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_computes_the_same_bits_again(name):
    weights = []
    for audit in (None, 2):
        torch.manual_seed(0)
        modules = layers(2)
        rates = None if name == "muon" else lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        torch.manual_seed(1)
        feed(po.Emulator(modules, OPTIMIZERS[name], mse, schedulers=rates, audit=audit))
        weights.append([p.detach().clone() for module in modules for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True)), "and changes nothing"


@pytest.mark.parametrize("method", sorted(po.METHODS))
def test_every_method_steps_the_same_way_again(method):
    depth, m = 3, 3
    options = {"synchronous_updates": 2} if method == "pipeoptim" else {"clip": 0.01}
    pipe = po.Emulator(layers(depth), lambda p: torch.optim.Adam(p, lr=0.01), mse, method, m, audit=1, uneven=True, **options)
    feed(pipe)
    assert pipe.version(0) == 5


class Faulty(torch.optim.SGD):
    """Flips a bit of a weight or of its state in one step of the original; a copy is sound."""

    original, at, where = None, 0, "weight"

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        if self is not Faulty.original():
            return
        Faulty.at -= 1
        if Faulty.at == 0:
            bias = self.param_groups[0]["params"][1]
            target = bias if Faulty.where == "weight" else self.state[bias]["momentum_buffer"]
            target.view(torch.int32)[2] ^= 1 << 30


@pytest.mark.parametrize(
    ("where", "what"), [("weight", "parameter '0.bias'"), ("state", "the optimizer's 'momentum_buffer' of .*'0.bias'")]
)
@pytest.mark.parametrize("method", ["pipeoptim", "1f1b"])
def test_a_flipped_bit_is_found_where_it_was_flipped(where, what, method):
    Faulty.where, modules = where, layers(3)
    opts = [Faulty(module.parameters(), lr=0.1, momentum=0.9) for module in modules]
    Faulty.original, Faulty.at = weakref.ref(opts[1]), 4
    pipe = po.Emulator(modules, opts, mse, method, audit=2)
    with pytest.raises(po.CorruptionError, match=f"^update 4 of stage 1 was done twice .* and {what} differs in 1 bit: "):
        feed(pipe)


def test_what_cannot_be_done_again_is_refused():
    class Stuck(torch.optim.SGD):
        def __deepcopy__(self, memo):
            raise TypeError("no")

    modules = layers(2)
    stuck = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    stuck[1].handle = (n for n in ())  # a generator cannot be copied
    with pytest.raises(po.ConfigError, match="audit is 3, but the SGD of stage 1 cannot be copied"):
        po.Emulator(modules, stuck, mse, audit=3)
    hooked = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    hooked[0].register_step_post_hook(lambda *_: None)
    with pytest.raises(po.ConfigError, match="the step of the SGD of stage 0 has hooks"):
        feed(po.Emulator(modules, hooked, mse, audit=1))
    with pytest.raises(po.ConfigError, match="audit is 0"):
        po.Emulator(modules, hooked, mse, audit=0)


def test_copies_are_there_during_an_audited_update_only():
    def parameters():
        gc.collect()
        return sum(type(one) is nn.Parameter for one in gc.get_objects())

    modules = layers(3)
    before = parameters()
    pipe = po.Emulator(modules, lambda p: torch.optim.Adam(p, lr=0.01), mse, audit=2)
    assert parameters() == before
    feed(pipe)
    assert parameters() == before


def test_bits_are_counted():
    nan = torch.tensor([float("nan"), 0.0])
    assert different_bits(nan, nan.clone()) == 0 and different_bits(torch.zeros(2), torch.tensor([0.0, -0.0])) == 1
    assert different_bits(math.nan, math.nan) == 0 and different_bits(0.0, math.nan) == 1
    assert different_bits(torch.zeros(()), torch.ones(())) == 7 and different_bits(torch.zeros(2), torch.zeros(3)) == 96
