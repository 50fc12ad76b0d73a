"""Modules that change their own weights in a forward: as without a pipeline, or refused before anything moves, never undone in silence."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pipeoptim as po

ROWS = torch.arange(10)
IN_PLACE = ("gpipe", "1f1b", "naive", "pipedream", "nesterov", "pipemare")
ON_COPIES = ("pipeoptim", "pipeoptim_stash", "spectrain", "xpipe")


class Clamped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.05, 0.05)
        return super().forward(x)


class Normalized(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(nn.functional.normalize(self.weight))
        return super().forward(x)


def embedded(where):
    """Four stages, of which ``where`` writes into its weight."""
    torch.manual_seed(0)
    stages = [nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 10)]
    if where == 0:
        stages[0] = nn.Embedding(10, 4, max_norm=1.0)
    else:
        stages[where] = {1: Clamped(4, 4), 2: nn.Sequential(nn.Tanh(), Normalized(4, 4)), 3: Clamped(4, 10)}[where]
    return stages


def written(where):
    return {0: "weight", 1: "weight", 2: "1.weight", 3: "weight"}[where]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def step_twice(pipe):
    for _ in range(2):
        pipe.step(ROWS, target=ROWS)


def step_often(pipe):
    for _ in range(10):
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))


def largest(stages, where):
    weight = dict(stages[where].named_parameters())[written(where)].detach()
    return (weight.norm(dim=1) if where in (0, 2) else weight.abs()).max().item()


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize(("method", "m"), [(method, m) for method in IN_PLACE for m in (1, 2)])
def test_on_the_latest_weights_a_write_stays(method, m, where):
    stages = embedded(where)
    limit = 0.05 if where in (1, 3) else 1.0
    pipe = po.Emulator(stages, sgd, nn.functional.cross_entropy, method, m)
    for _ in range(60):
        pipe.step(ROWS, target=ROWS)
    pipe.drain()
    assert largest(stages, where) < limit + 0.15, "the limit, and the updates since the last forward"


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_flush_training_equals_plain_training(where):
    stages = embedded(where)
    plain = nn.Sequential(*copy.deepcopy(stages))
    optimizer = sgd(plain.parameters())
    pipe = po.Emulator(stages, sgd, nn.functional.cross_entropy, "1f1b")
    for _ in range(20):
        loss = nn.functional.cross_entropy(plain(ROWS), ROWS)
        loss.backward()
        assert torch.equal(pipe.step(ROWS, target=ROWS), loss.detach())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize(("method", "m"), [*((method, 1) for method in ON_COPIES), ("pipeoptim", 4), ("pipedream_2bw", 4)])
def test_where_forwards_run_on_copies_a_write_is_refused_at_once(method, m, where):
    stages = embedded(where)
    before = copy.deepcopy(stages[(where + 1) % 4].state_dict())
    pipe = po.Emulator(stages, sgd, nn.functional.cross_entropy, method, m, uneven=True)
    if where == 3 and method in ("pipeoptim", "pipeoptim_stash"):  # the last stage, which predicts nothing
        for _ in range(20):
            pipe.step(ROWS, target=ROWS)
        assert largest(stages, 3) < 0.2
        return
    kind = type(dict(stages[where].named_modules())[written(where).rpartition(".")[0]]).__name__
    words = rf"stage {where} writes into the weight '{written(where)}' \({kind}\), but method '{method}' .* with on_update="
    with pytest.raises(po.ConfigError, match=words):
        step_twice(pipe)
    assert all(pipe.version(k) == 0 for k in range(where + 1))
    after = stages[(where + 1) % 4].state_dict()
    assert where == 3 or all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["pipeoptim", "pipeoptim_stash", "pipedream", "naive", "1f1b", "xpipe"])
def test_the_same_after_each_update_works_under_every_method(method):
    stages = embedded(1)
    stages[1] = nn.Linear(4, 4)

    def project(k, version):
        if k == 1:
            with torch.no_grad():
                stages[1].weight.clamp_(-0.05, 0.05)

    pipe = po.Emulator(stages, sgd, nn.functional.cross_entropy, method, on_update=project)
    for _ in range(40):
        pipe.step(ROWS, target=ROWS)
    pipe.drain()
    assert stages[1].weight.abs().max() <= 0.05 < stages[2].weight.abs().max()


@pytest.mark.parametrize("method", ["pipeoptim", "pipeoptim_stash", "pipedream", "xpipe"])
@pytest.mark.parametrize("normed", [parametrizations.spectral_norm, nn.utils.spectral_norm, parametrizations.weight_norm])
def test_norms_that_keep_their_state_in_buffers_are_no_writes(method, normed):
    torch.manual_seed(0)
    stages = [nn.Linear(4, 4), normed(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Linear(4, 4)]
    before = {name: b.clone() for name, b in nn.Sequential(*stages).named_buffers()}
    pipe = po.Emulator(stages, sgd, nn.functional.mse_loss, method)
    for _ in range(8):
        pipe.step(torch.randn(6, 4), target=torch.randn(6, 4))
    for name, b in nn.Sequential(*stages).named_buffers():
        assert not torch.equal(b, before[name]), f"{name} has stood still"


def through_data(weight):
    weight.data.clamp_(-0.05, 0.05)


def through_numpy(weight):
    values = weight.detach().numpy()
    values.clip(-0.05, 0.05, out=values)


def by_assignment(weight):
    weight.data = weight.data.clamp(-0.05, 0.05)


class Hidden(nn.Linear):
    """Writes in a way that no version counter sees, from forward number ``begin`` on."""

    def __init__(self, write, begin=1):
        super().__init__(4, 4)
        self.write, self.begin, self.forwards = write, begin, 0
        self.register_forward_pre_hook(Hidden.count)

    def count(self, _):
        self.forwards += 1
        if self.forwards >= self.begin:
            self.write(self.weight)


@pytest.mark.parametrize("write", [through_data, through_numpy, by_assignment])
@pytest.mark.parametrize(("method", "m"), [("pipeoptim", 1), ("pipeoptim_stash", 4), ("spectrain", 1), ("pipedream_2bw", 4)])
def test_a_write_that_no_counter_sees_is_refused_all_the_same(method, m, write):
    words = r"stage 1 writes into the weight 'weight' \(Hidden\)"
    if write is by_assignment:  # a forward in place may come first
        words += "|a weight of stage 1 .* was given other memory"
    for begin in (1, 7):
        stages = [nn.Linear(4, 4), Hidden(write, begin), nn.Linear(4, 4), nn.Linear(4, 4)]
        pipe = po.Emulator(stages, sgd, nn.functional.mse_loss, method, m)
        with pytest.raises(po.ConfigError, match=words):
            step_often(pipe)
        assert begin > 1 or pipe.version(1) == 0


@pytest.mark.parametrize("write", [through_data, through_numpy, by_assignment])
def test_on_the_latest_weights_such_a_write_stays_too(write):
    torch.manual_seed(0)
    stages = [nn.Linear(4, 4), Hidden(write), nn.Linear(4, 4)]
    plain = nn.Sequential(*copy.deepcopy(stages))
    optimizer = sgd(plain.parameters())
    flushed = po.Emulator(copy.deepcopy(stages), sgd, nn.functional.mse_loss, "1f1b")
    pipe = po.Emulator(stages, sgd, nn.functional.mse_loss, "pipedream")
    for _ in range(10):
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(plain(x), y)
        loss.backward()
        optimizer.step()
        assert torch.equal(flushed.step(x, target=y), loss.detach())
        if write is not by_assignment:
            pipe.step(x, target=y)
    assert write is by_assignment or stages[1].weight.abs().max() < 0.2
    # What is in flight needs the memory that an assignment takes from it.
    if write is by_assignment:
        pipe.step(x, target=y)
        with pytest.raises(
            po.ConfigError, match=r"a weight of stage 1 .* was given other memory .* while micro-batches are in flight"
        ):
            pipe.step(x, target=y)


def test_copies_elsewhere_are_told():
    stage = Clamped(4, 4).to(torch.bfloat16)
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    pipe = po.Emulator([stage], [sgd(po.master_weights(stage))], nn.functional.mse_loss, "1f1b")
    with pytest.raises(po.ConfigError, match="of which its float32 master would keep the old values"):
        pipe.step(x, target=x)
    embed, head = nn.Embedding(10, 4, max_norm=1.0), nn.Linear(4, 10, bias=False)
    head.weight = embed.weight
    stages, tied = po.untie([embed, head])
    pipe = po.Emulator(stages, sgd, nn.functional.cross_entropy, "1f1b", tied=tied)
    with pytest.raises(po.ConfigError, match="of which the other stages that tie it would keep the old values"):
        pipe.step(ROWS, target=ROWS)


def test_predictions_begin_with_what_on_update_wrote():
    """The step predicts in the same pass, from the values before the hook: such a prediction must not be used."""
    seen = []

    class Seen(nn.Linear):
        def forward(self, x):
            seen.append(self.weight.detach().clone())
            return super().forward(x)

    stages = [Seen(4, 4), *(nn.Linear(4, 4) for _ in range(3))]

    def zero(k, version):
        if k == 0:
            with torch.no_grad():
                stages[0].weight.zero_()

    pipe = po.Emulator(stages, lambda p: torch.optim.Adam(p, lr=1e-3), nn.functional.mse_loss, on_update=zero)
    for _ in range(12):
        pipe.step(torch.ones(2, 4), target=torch.ones(2, 4))
    assert all(weight.abs().max() < 0.01 for weight in seen[-4:]), "three predicted steps of 1e-3 from 0"


def test_on_update_that_writes_beside_the_masters_is_told():
    stage = nn.Linear(4, 4).to(torch.bfloat16)
    x = torch.ones(2, 4, dtype=torch.bfloat16)

    def halve(k, version):
        with torch.no_grad():
            stage.weight.mul_(0.5)

    pipe = po.Emulator([stage], [sgd(po.master_weights(stage))], nn.functional.mse_loss, "1f1b", on_update=halve)
    with pytest.raises(po.ConfigError, match="on_update wrote into weights of stage 0 that follow float32 masters"):
        pipe.step(x, target=x)


def test_weights_changed_between_mini_batches_are_no_writes_of_a_forward():
    stages = [nn.Linear(4, 4) for _ in range(3)]
    pipe = po.Emulator(stages, sgd, nn.functional.mse_loss, "pipeoptim")
    for _ in range(6):
        pipe.step(torch.ones(2, 4), target=torch.ones(2, 4))
        with torch.no_grad():
            stages[0].weight.mul_(0.9)
