"""Stages of partition() carry their names and ties: what a user forgets to pass on is not forgotten."""

import copy

import pytest
import torch
from torch import nn

import pipeoptim as po

DEPTH = 3
IDS = torch.randint(0, 11, (6,), generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    """An embedding, layers, and the embedding again."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(DEPTH))
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Around(nn.Module):
    """What DDP and torch.compile do to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def cut(**options):
    torch.manual_seed(0)
    return po.partition(Tied(), DEPTH, (IDS,), pins=[1, 2], **options)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02)


def emulator(stages, method="pipeoptim", **options):
    return po.Emulator(stages, adamw, nn.functional.cross_entropy, method, **options)


def trained(stages, **options):
    pipe = emulator(stages, **options)
    for _ in range(5):
        pipe.step(IDS, target=IDS)
    return pipe


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CARRIERS = {
    "the partition": lambda cut: cut,
    "its stages": lambda cut: cut.stages,
    "copies": lambda cut: copy.deepcopy(cut.stages),
    "wrapped": lambda cut: [Around(stage) for stage in cut.stages],
    "moved": lambda cut: [stage.to(torch.float64).to(torch.float32) for stage in cut.stages],
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_names_and_ties_come_with_the_stages(carrier):
    given = cut()
    oracle = trained(given.stages, tied=[[(0, "model.embed.weight"), (2, "model.head.weight")]])
    expected = po.full_state_dict(oracle, given.names)
    pipe = trained(CARRIERS[carrier](cut()))
    assert equal(po.full_state_dict(pipe), expected)
    assert expected.keys() == Tied().state_dict().keys()
    assert not torch.equal(expected["embed.weight"], cut().full_state_dict()["embed.weight"])


def test_a_trace_carries_them_as_well():
    pipe = trained(cut(how="trace"))
    full = po.full_state_dict(pipe)
    Tied().load_state_dict(full)
    assert torch.equal(full["embed.weight"], full["head.weight"])
    assert len(pipe.stage_worker(0).tied) == len(pipe.stage_worker(2).tied) == 1


def test_what_untie_has_separated_stays_equal():
    embed, head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
    head.weight = embed.weight
    stages, _ = po.untie([embed, nn.Linear(4, 4), head])
    pipe = trained(stages)
    pipe.drain()
    assert torch.equal(stages[0].weight, stages[2].weight)
    assert stages[0].weight is not stages[2].weight


def test_a_checkpoint_finds_its_weights_under_another_cut(tmp_path):
    pipe = trained(cut(), method="1f1b")
    po.save_sharded(pipe, tmp_path / "saved")
    torch.manual_seed(9)
    other = emulator(po.partition(Tied(), 2, (IDS,), pins=[2]), "1f1b")
    assert not po.load_sharded(other, tmp_path / "saved")
    assert equal(po.full_state_dict(other), po.full_state_dict(pipe))
    po.save_weights(pipe, tmp_path / "weights")
    one = po.partition(Tied(), 1, (IDS,), pins=[])
    po.load_weights(one.stages[0], tmp_path / "weights")
    assert equal(one.full_state_dict(), po.full_state_dict(pipe))


def with_other_copy():
    pipe = trained(cut())
    pipe.drain()
    with torch.no_grad():
        next(pipe.stage_module(2).parameters()).add_(1)
    return pipe


def with_adapter():
    pipe = emulator(cut())
    layers = pipe.stage_module(1).model.layers
    layers[1] = nn.Sequential(layers[1])
    return pipe


def existing(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder


class Refused:
    """Names that a user gives although the stages carry others."""

    swapped = staticmethod(lambda: [cut().names[k] for k in (1, 0, 2)])
    other = staticmethod(lambda: [{**cut().names[0], "embed.weight": "model.layers.0.weight"}, *cut().names[1:]])


REFUSED = {
    "no ties": (
        lambda _: emulator(cut(), tied=[]),
        r"tied says nothing of 'model.embed.weight' of stage 0 = .* leave tied out",
    ),
    "other ties": (
        lambda _: emulator(cut(), tied=[[(0, "model.layers.0.bias"), (2, "model.layers.2.bias")]]),
        "tied says nothing of 'model.embed.weight'",
    ),
    "other order": (lambda _: emulator(cut().stages[::-1]), "stage 0 of 3 was made as stage 2 of 3"),
    "other depth": (lambda _: emulator(cut().stages[1:]), "stage 0 of 2 was made as stage 1 of 3"),
    "interleaved": (lambda _: emulator(po.partition(Tied(), 4, (IDS,), pins=[1, 2, 3]), processes=2), "one stage per process"),
    "clip": (lambda _: emulator(cut(), clip=1.0), "use scope 'global'"),
    "names of another stage": (lambda _: po.full_state_dict(emulator(cut()), Refused.swapped()), "says nothing of"),
    "other names": (
        lambda _: po.full_state_dict(emulator(cut()), Refused.other()),
        r"says that 'embed.weight' is 'model.layers.0.weight' of stage 0|says nothing of",
    ),
    "copies that differ": (
        lambda f: po.save_weights(with_other_copy(), f / "w"),
        "'embed.weight' has other values on stage 0 than on stage 2",
    ),
    "state of copies that differ": (lambda _: po.full_state_dict(with_other_copy()), "has other values on stage 0"),
    "an adapter": (lambda f: po.save_weights(with_adapter(), f / "w"), "stage 1 was cut with 'model.layers.1.weight'"),
    "an adapter, before training": (lambda f: po.check_export(with_adapter(), f / "w"), "stage 1 was cut with"),
    "a folder": (lambda f: po.check_export(emulator(cut()), existing(f / "w")), "exists already; .* overwrite=True"),
    "a folder of the user's": (
        lambda f: po.save_weights(emulator(cut()), existing(f / "w"), overwrite=True),
        "holds no model.safetensors.index.json, so it is not replaced",
    ),
    "a checkpoint's folder": (
        lambda f: po.save_sharded(emulator(cut()), existing(f / "w"), overwrite=True),
        "holds no state.json, so it is not replaced",
    ),
    "a file above": (
        lambda f: po.check_export(emulator(cut()), existing(f / "w") / "thesis.txt" / "w"),
        "nothing can be made in .*thesis.txt",
    ),
    "a folder of the kernel's": (lambda f: po.check_export(emulator(cut()), "/proc/x/y"), "nothing can be made in /proc"),
    "a model beside": (lambda f: po.check_export(emulator(cut()), f / "w", also_save=[nn.Linear(1, 1)]), "such as a tokenizer"),
    "a name beside": (lambda f: po.check_export(emulator(cut()), f / "w", also_save="gpt2"), "also_save is 'gpt2', must be"),
    "overwrite": (lambda f: po.check_export(emulator(cut()), f / "w", overwrite="yes"), "overwrite is 'yes', must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_them_is_told_in_a_sentence(case, tmp_path):
    work, words = REFUSED[case]
    with pytest.raises(po.ConfigError, match=words) as told:
        work(tmp_path)
    assert len(str(told.value).splitlines()) == 1
    kept = tmp_path / "w" / "thesis.txt"
    assert list(tmp_path.iterdir()) == ([tmp_path / "w"] if kept.exists() else [])


def test_renaming_is_welcome_and_an_export_replaces_an_export(tmp_path):
    given = cut()
    pipe = trained(given)
    renamed = [{f"net.{original}": own for original, own in names.items()} for names in given.names]
    assert po.full_state_dict(pipe, renamed).keys() == {f"net.{name}" for name in Tied().state_dict()}
    for _ in range(2):
        pipe.step(IDS, target=IDS)
        po.save_weights(pipe, tmp_path / "w", overwrite=True)
        po.save_sharded(pipe, tmp_path / "c", overwrite=True)
    again = Tied()
    po.load_weights(again, tmp_path / "w")
    assert equal(again.state_dict(), po.full_state_dict(pipe))
    assert po.load_sharded(pipe, tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "w"], "nothing is left of what was replaced"


def test_what_is_around_a_whole_stage_is_in_no_name_and_a_check_leaves_nothing_behind(tmp_path):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    stages = [torch.compile(model[:2]), torch.compile(model[2:])]
    pipe = po.Emulator(stages, adamw, nn.functional.mse_loss, "1f1b")
    po.check_export(pipe, tmp_path / "deep" / "weights")
    assert list(tmp_path.iterdir()) == []
    found = po.full_state_dict(pipe)
    assert found.keys() == model.state_dict().keys()
    po.save_weights(pipe, tmp_path / "weights")
    for target, entries in (
        (nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), model),
        (torch.compile(model[2:]), model[2:]),
    ):
        po.load_weights(target, tmp_path / "weights")
        for own, saved in zip(target.parameters(), entries.parameters(), strict=True):
            assert torch.equal(own, saved)
    same = [torch.compile(nn.Linear(2, 2)) for _ in range(2)]  # no slices: their names are those of a Sequential of them
    assert list(po.full_state_dict(po.Emulator(same, adamw, nn.functional.mse_loss, "1f1b"))) == [
        f"{k}.{name}" for k in range(2) for name in ("weight", "bias")
    ]
