"""What users do to weights between two mini-batches: other memory, other parameters, frozen ones. It takes effect, or is refused."""

import pytest
import torch
from torch import nn

import pipeoptim as po

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),  # has no rule: predicted by its last displacement
}


def made(optimizer, method, **options):
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)]
    return stages, emulated(stages, optimizer, method, **options)


def emulated(stages, optimizer, method, **options):
    m = 3 if po.METHODS[method].at_least_depth_microbatches else 1
    try:
        return po.Emulator(stages, OPTIMIZERS[optimizer], nn.functional.mse_loss, method, m, **options)
    except po.ConfigError as refusal:  # a method that is made for other optimizers
        pytest.skip(str(refusal))


def train(pipe, first, count):
    for n in range(first, first + count):
        g = torch.Generator().manual_seed(n)
        pipe.step(torch.randn(6, 4, generator=g), target=torch.randn(6, 2, generator=g))


def weights(stages):
    return torch.cat([p.detach().flatten() for stage in stages for p in stage.parameters()])


def halve_in_place(stage):
    with torch.no_grad():
        for p in stage.parameters():
            p.mul_(0.5)


def halve_elsewhere(stage):
    vector = nn.utils.parameters_to_vector(stage.parameters())
    nn.utils.vector_to_parameters(0.5 * vector.detach(), stage.parameters())  # one memory for all of them


@pytest.mark.parametrize("method", po.METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_weights_may_be_given_other_memory_at_a_drained_boundary(optimizer, method):
    found = []
    for halve in (halve_in_place, halve_elsewhere):
        stages, pipe = made(optimizer, method)
        train(pipe, 0, 5)
        pipe.drain()
        for stage in stages:
            halve(stage)
        train(pipe, 5, 6)
        pipe.drain()
        found.append(weights(stages))
    assert torch.equal(*found)


def test_in_flight_or_in_another_form_they_are_refused():
    stages, pipe = made("adam", "pipeoptim")
    train(pipe, 0, 5)
    halve_elsewhere(stages[0])
    with pytest.raises(
        po.ConfigError, match=r"a weight of stage 0 of shape \(4, 4\) was given other memory .* drain\(\) before"
    ):
        train(pipe, 5, 1)
    stages, pipe = made("adam", "pipeoptim")
    train(pipe, 0, 5)
    pipe.drain()
    stages[1].double()
    with pytest.raises(po.ConfigError, match="a weight of stage 1 .* of another type, shape or device; make a new pipeline"):
        train(pipe, 5, 1)


@pytest.mark.parametrize("method", ["1f1b", "pipedream", "pipeoptim"])
@pytest.mark.parametrize("drained", [True, False])
def test_parameters_that_the_module_has_lost_are_told(method, drained):
    stages, pipe = made("sgd", method)
    train(pipe, 0, 5)
    if drained:
        pipe.drain()
    before = weights(stages)
    stages[1].load_state_dict({name: p.clone() for name, p in stages[1].state_dict().items()}, assign=True)
    with pytest.raises(
        po.ConfigError, match=r"optimizer of stage 1 moves 2 parameters that are not in the stage's module any more"
    ):
        train(pipe, 5, 1)
    assert torch.equal(before, weights(stages)), "refused before a weight has moved"


class Seen(nn.Linear):
    """Notes the weights of its training forwards."""

    def forward(self, x):
        self.__dict__.setdefault("seen", []).append(self.weight.detach().clone())
        return super().forward(x)


@pytest.mark.parametrize("method", po.METHODS)
@pytest.mark.parametrize(("optimizer", "drained"), [("sgd", True), ("adam", False), ("rmsprop", True), ("rmsprop", False)])
def test_a_frozen_weight_is_predicted_to_stay(optimizer, method, drained):
    stages, _ = made(optimizer, method)
    stages[0][0] = Seen(4, 4)
    pipe = emulated(stages, optimizer, method)
    if pipe.microbatches > 1 and not drained:
        pytest.skip("half of a mini-batch's gradients are there, which the update then uses, as torch's own does")
    train(pipe, 0, 6)
    if drained:
        pipe.drain()
    stages[0][0].weight.requires_grad_(False)
    frozen, before = stages[0][0].weight.clone(), len(stages[0][0].seen)
    train(pipe, 6, 5)
    pipe.drain()
    after = stages[0][0].seen[before:]
    assert torch.equal(stages[0][0].weight, frozen) and all(torch.equal(w, frozen) for w in after)


class Numbered(nn.Linear):
    """Holds whole numbers as a parameter, which its optimizer is given too."""

    def __init__(self):
        super().__init__(4, 4)
        self.number = nn.Parameter(torch.tensor([2, 3]), requires_grad=False)

    def forward(self, x):
        return super().forward(x) * self.number.sum()


@pytest.mark.parametrize("method", po.METHODS)
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_whole_numbers_among_the_parameters_stay_as_they_are(optimizer, method):
    stages = [Numbered(), Numbered(), nn.Linear(4, 2)]
    pipe = emulated(stages, optimizer, method)
    train(pipe, 0, 5)  # spectrain diverges with RMSprop after 6
    assert stages[0].number.tolist() == [2, 3]
