"""Models that skip layers by chance are refused when they are cut, not in the middle of a run; those that only could are cut."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import pipeoptim as po


def torch_item(p):
    return torch.rand(()).item() < p


def torch_bool(p):
    return bool(torch.rand([]) < p)


def torch_keep(p):
    return not torch.empty(1).uniform_() < 1 - p


def python(p):
    return random.random() < p


def numpy(p):
    return np.random.uniform(0, 1) < p


class Dropping(nn.Module):
    def __init__(self, drop, p, residual, always=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        self.drop, self.p, self.residual, self.always = drop, p, residual, always

    def forward(self, x):
        for layer in self.layers:
            if (self.training or self.always) and self.drop(self.p):
                continue
            x = x + layer(x) if self.residual else layer(x)
        return x


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("how", ["auto", "layers"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("drop", "p"), [(torch_item, 1e-4), (torch_bool, 0.1), (torch_keep, 1e-4), (python, 0.1), (numpy, 0.1)]
)
def test_a_model_that_drops_layers_is_refused_whenever_it_is_cut(drop, p, training, residual, how):
    torch.manual_seed(0)
    before = states()
    model = Dropping(drop, p, residual).train(training)
    with pytest.raises(po.ConfigError, match=r"does not run the same layers .*layers\.\d.*set its probability to 0"):
        po.partition(model, 3, (torch.ones(4, 4),), how=how)
    if not training or drop not in (python, numpy):  # else the run in its own mode has drawn
        torch.manual_seed(0)
        assert states() == before


class Held(nn.Module):
    """What decides is held by the model: a generator of its own, or how often it has run."""

    def __init__(self, kind):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(8)), nn.Linear(4, 4)
        self.kind, self.python, self.numpy, self.runs = kind, random.Random(3), np.random.default_rng(3), 0
        self.register_buffer("steps", torch.tensor(0))

    def drops(self, n):
        return {
            "python": lambda: self.training and self.python.random() < 0.1,
            "numpy": lambda: self.training and self.numpy.random() < 0.1,
            "every second run": lambda: n == 2 and self.runs % 2,
            "every tenth run": lambda: n == 2 and self.runs % 10 == 9,
            "buffer": lambda: n == 2 and self.steps.item() % 2,
        }[self.kind]()

    def forward(self, x):
        self.runs += 1
        self.steps += 1
        for n, layer in enumerate(self.layers):
            if not self.drops(n):
                x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize("how", ["auto", "layers"])
@pytest.mark.parametrize("kind", ["python", "numpy", "every second run", "every tenth run", "buffer"])
def test_a_model_that_decides_by_what_it_holds_is_refused_and_left_as_it_was(kind, how):
    model = Held(kind)
    before = model.python.getstate(), str(model.numpy.bit_generator.state), model.runs, int(model.steps)
    with pytest.raises(po.ConfigError, match=r"does not run the same layers .*layers\.\d"):
        po.partition(model, 3, (torch.ones(4, 4),), how=how)
    assert (model.python.getstate(), str(model.numpy.bit_generator.state), model.runs, int(model.steps)) == before


def test_what_a_traced_model_notes_holds_no_tensors_of_the_trace():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.mask = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.full((4,), 2.0)
            for layer in self.layers:
                x = x + layer(x) * self.mask
            return x

    model, x = Caching(), torch.ones(2, 4)
    cut = po.partition(model, 2, (x,), how="trace")
    assert model.mask is None
    pipe = po.Emulator(
        cut.stages, [torch.optim.SGD(s.parameters(), lr=0.1) for s in cut.stages], nn.functional.mse_loss, "1f1b"
    )
    assert pipe.eval_step(x, target=x) == nn.functional.mse_loss(model(x), x)


@pytest.mark.parametrize("drop", [torch_item, torch_bool, torch_keep, python, numpy])
@pytest.mark.parametrize("always", [True, False])
def test_a_model_that_draws_but_drops_nothing_is_cut_and_trains(drop, always):
    torch.manual_seed(0)
    cut = po.partition(Dropping(drop, 0.0, False, always), 3, (torch.ones(4, 4),), how="layers")
    for stage in cut.stages:
        stage.train()
    pipe = po.Emulator(cut.stages, lambda p: torch.optim.SGD(p, lr=0.01), nn.functional.mse_loss)
    for _ in range(5):
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))


class Noisy(nn.Module):
    """Random numbers that are values: dropout and noise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x + 0.1 * self.training * torch.randn_like(x))
        return self.norm(x)


def test_dropout_and_noise_are_no_decisions():
    model = Noisy()
    mean = model.norm.running_mean.clone()
    assert len(po.partition(model, 2, (torch.ones(4, 4),), how="layers").stages) == 2
    assert torch.equal(model.norm.running_mean, mean)
    assert all(module.training for module in model.modules())


def test_layers_that_run_in_evaluation_only_are_refused():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            for layer in self.layers[: 3 if self.training else 4]:
                x = layer(x)
            return x

    with pytest.raises(po.ConfigError, match=r"layers\.3 differs"):
        po.partition(Early().eval(), 2, (torch.ones(4, 4),), how="layers")


def test_a_stage_whose_model_skips_a_layer_after_all_says_which():
    model = Dropping(torch_item, 0.0, False)
    cut = po.partition(model, 3, (torch.ones(4, 4),), how="layers")
    last = cut.stages[-1].train()
    sent = cut.stages[1](*cut.stages[0](torch.ones(4, 4)))
    last.model.p = 1.0
    with pytest.raises(po.PipeOptimError, match=r"returned without running layer \d"):
        last(*sent)
