"""Weights under the original names, safetensors, and checkpoints that other numbers of stages resume from."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import pipeoptim as po
import stage_processes
import state_case
from pipeoptim.checkpoint import save
from pipeoptim.rules import CombinedOptimizer
from pipeoptim.train.group import SingleProcessGroup

WORKER = Path(__file__).with_name("state_worker.py")


def pipeline(depth, optimizer="adamw", method="pipeoptim", dropout=0.0, microbatches=1):
    stages = state_case.cut(depth, dropout)
    return po.Emulator(
        stages,
        state_case.OPTIMIZERS[optimizer],
        nn.functional.cross_entropy,
        method,
        microbatches,
        schedulers=state_case.schedule,
        seed=5,
    )


def train(pipe, steps):
    for n in steps:
        x, y = state_case.batch(n)
        pipe.step(x, target=y)
    pipe.drain()


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_full_state_dict_is_that_of_the_model():
    pipe = pipeline(3)
    train(pipe, range(4))
    full = po.full_state_dict(pipe)
    whole = state_case.model()
    whole.load_state_dict(full)
    x, _ = state_case.batch(99)
    value = x
    for k in range(3):
        value = pipe.stage_module(k).eval()(value)
    assert torch.equal(whole.eval()(x), value)
    before = full["0.0.weight"].clone()
    train(pipe, range(4, 6))
    assert torch.equal(full["0.0.weight"], before), "a snapshot, not a view of the weights"


def test_weights_go_through_safetensors(tmp_path):
    pipe = pipeline(4)
    train(pipe, range(4))
    po.save_weights(pipe, tmp_path / "w")
    whole = state_case.model()
    po.load_weights(whole, tmp_path / "w")
    assert equal(whole.state_dict(), po.full_state_dict(pipe))
    stages = state_case.cut(3)  # another cut reads the same files, each stage its own part
    for stage in stages:
        po.load_weights(stage, tmp_path / "w")
    assert equal(nn.Sequential(*stages[0], *stages[1], *stages[2]).state_dict(), whole.state_dict())
    with pytest.raises(po.ConfigError, match="exists already"):
        po.save_weights(pipe, tmp_path / "w")
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_a_stage_on_the_meta_device_is_filled_without_the_rest_of_the_model(tmp_path):
    pipe = pipeline(4)
    po.save_weights(pipe, tmp_path / "w")
    with torch.device("meta"):
        stages = state_case.cut(2)
    po.load_weights(stages[1], tmp_path / "w")
    assert not any(t.is_meta for t in stages[1].state_dict().values())
    assert all(p.requires_grad for p in stages[1].parameters())
    assert all(t.is_meta for t in stages[0].state_dict().values())
    assert torch.equal(stages[1][0][0].weight, state_case.model()[4][0].weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_shared_inside_a_stage_are_written_once(tmp_path, device):
    stage = Tied()
    pipe = po.Emulator([stage], lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss)
    po.save_weights(pipe, tmp_path / "w")
    index = json.loads((tmp_path / "w" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == ["a.bias", "a.weight"]
    with torch.device(device):
        other = Tied()
    po.load_weights(other, tmp_path / "w")
    assert other.b.weight is other.a.weight
    assert equal(other.state_dict(), stage.state_dict())


def test_bad_weights_are_refused_with_a_sentence(tmp_path):
    pipe = pipeline(2)
    po.save_weights(pipe, tmp_path / "w")
    with pytest.raises(po.ConfigError, match="no weights in"):
        po.load_weights(nn.Linear(1, 1), tmp_path)
    with pytest.raises(po.ConfigError, match=r"does not hold 2 of the 2 entries .*'weight'"):
        po.load_weights(nn.Linear(1, 1), tmp_path / "w")
    with pytest.raises(po.ConfigError, match=r"shape \(3, 8\) .* but \(1, 1\)"):
        po.load_weights(nn.Linear(1, 1), tmp_path / "w", {"7.weight": "weight", "7.bias": "bias"})
    own = [{name: name for name in pipe.stage_module(k).state_dict() if name != "0.0.weight"} for k in range(2)]
    with pytest.raises(po.ConfigError, match=r"says nothing of 1 entries"):
        po.full_state_dict(pipe, own)
    with torch.device("meta"):
        stage = nn.Sequential(nn.Linear(8, 3))
        stage.register_buffer("table", torch.ones(2), persistent=False)
    with pytest.raises(po.ConfigError, match=r"1 tensors are still on the meta device .*'table'"):
        po.load_weights(stage, tmp_path / "w", {"7.weight": "0.weight", "7.bias": "0.bias"})


@pytest.mark.parametrize("optimizer", state_case.OPTIMIZERS)
def test_a_sharded_checkpoint_resumes_bit_for_bit(tmp_path, optimizer):
    pipe = pipeline(4, optimizer, dropout=0.1)
    train(pipe, range(5))
    saving = po.save_sharded(pipe, tmp_path / "c", background=True)
    train(pipe, range(5, 9))
    saving.result(60)
    other = pipeline(4, optimizer, dropout=0.1)
    assert po.load_sharded(other, tmp_path / "c")
    assert other.version(0) == 5
    train(other, range(5, 9))
    assert equal(po.full_state_dict(pipe), po.full_state_dict(other))


@pytest.mark.parametrize("depths", [(4, 2), (2, 8), (3, 1)])
@pytest.mark.parametrize("optimizer", state_case.OPTIMIZERS)
def test_another_number_of_stages_goes_on_as_if_it_had_been_so_from_the_start(tmp_path, depths, optimizer):
    """A flush method computes the same at every depth, so the undisturbed run of the second depth is the oracle."""
    before, after = depths
    pipe = pipeline(before, optimizer, "1f1b", microbatches=2)
    train(pipe, range(5))
    po.save_sharded(pipe, tmp_path / "c")
    resumed = pipeline(after, optimizer, "1f1b", microbatches=2)
    assert not po.load_sharded(resumed, tmp_path / "c")
    train(resumed, range(5, 9))
    oracle = pipeline(after, optimizer, "1f1b", microbatches=2)
    train(oracle, range(9))
    for name, value in po.full_state_dict(oracle).items():
        torch.testing.assert_close(po.full_state_dict(resumed)[name], value, rtol=2e-5, atol=2e-6)


def test_masters_and_combined_optimizers_are_named_by_their_weights(tmp_path):
    def build(depth):
        torch.manual_seed(0)
        whole = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6))).to(torch.bfloat16)
        ends = [round(k * 6 / depth) for k in range(depth + 1)]
        stages = [whole[a:b] for a, b in pairwise(ends)]
        made = []
        for stage in stages:
            masters = po.master_weights(stage)
            matrices, rest = [p for p in masters if p.dim() == 2], [p for p in masters if p.dim() != 2]
            made.append(CombinedOptimizer(torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(rest)))
        return po.Emulator(stages, made, nn.functional.mse_loss, "gpipe"), made

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    first, _ = build(3)
    second, optimizers = build(2)
    for _ in range(3):
        first.step(x, target=x)
    po.save_sharded(first, tmp_path / "c")
    po.load_sharded(second, tmp_path / "c")
    for _ in range(3):
        first.step(x, target=x)
        second.step(x, target=x)
    a, b = po.full_state_dict(first), po.full_state_dict(second)
    assert equal(a, b)
    assert optimizers[0].param_groups[0]["params"][0].dtype is torch.float32


def test_bad_checkpoints_are_refused_with_a_sentence(tmp_path):
    pipe = pipeline(2)
    po.save_sharded(pipe, tmp_path / "c")
    with pytest.raises(po.ConfigError, match="exists already"):
        po.save_sharded(pipe, tmp_path / "c")
    with pytest.raises(po.ConfigError, match="no complete sharded checkpoint"):
        po.load_sharded(pipe, tmp_path / "nowhere")
    renamed = [{f"model.{name}": name for name in pipe.stage_module(k).state_dict()} for k in range(2)]
    with pytest.raises(po.ConfigError, match=r"lacks .* weights of stage 0 .*model\.0\.0\.weight"):
        po.load_sharded(pipe, tmp_path / "c", renamed)
    other = po.Emulator(
        state_case.cut(2),
        lambda p: torch.optim.AdamW([{"params": list(p)[:2]}, {"params": []}]),
        nn.functional.cross_entropy,
    )
    with pytest.raises(po.ConfigError, match=r"param groups"):
        po.load_sharded(other, tmp_path / "c")
    train(pipe, range(2))
    po.save_sharded(pipe, tmp_path / "adamw")
    with pytest.raises(po.ConfigError, match=r"the state of AdamW for .*0\.0\.weight.*, but stage 0 moves it by RMSprop"):
        po.load_sharded(po.Emulator(state_case.cut(3), torch.optim.RMSprop, nn.functional.cross_entropy), tmp_path / "adamw")
    shorter = po.Emulator(state_case.cut(2)[:1], torch.optim.AdamW, nn.functional.cross_entropy)
    with pytest.raises(po.ConfigError, match=r"has \d+ weights that no stage has"):
        po.load_sharded(shorter, tmp_path / "adamw")
    text = (tmp_path / "c" / "state.json").read_text()
    (tmp_path / "c" / "state.json").write_text(text[: len(text) // 2])
    with pytest.raises(po.ConfigError, match="no complete sharded checkpoint"):
        po.load_sharded(pipe, tmp_path / "c")


def test_damaged_weights_are_one_sentence(tmp_path):
    pipe = pipeline(2)
    po.save_weights(pipe, tmp_path / "w")
    index = tmp_path / "w" / "model.safetensors.index.json"
    whole = index.read_bytes()
    for text in (whole[:50], b"\xff\xfe", b"[" * 100_000, b"{}", b'{"weight_map": 3}'):
        index.write_bytes(text)
        with pytest.raises(po.ConfigError, match=r"index\.json is no index of weights"):
            po.load_weights(state_case.model(), tmp_path / "w")
    index.write_bytes(whole)
    file = sorted((tmp_path / "w").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(po.ConfigError, match=r"\.safetensors cannot be read as safetensors"):
        po.load_weights(state_case.model(), tmp_path / "w")
    file.unlink()
    with pytest.raises(po.ConfigError, match=r"\.safetensors cannot be read as safetensors"):
        po.load_weights(state_case.model(), tmp_path / "w")


def test_what_is_saved_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, named = set(), []

    def fsync(descriptor, real=os.fsync):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.update({path, path.removesuffix(".part")})  # a file may be written beside its place, and renamed
        real(descriptor)

    def rename(self, target, real=Path.rename):
        if self.is_dir():
            named.append(Path(target).name)
            files = {str(path) for path in self.rglob("*") if path.is_file()}
            assert files <= synced, f"not on the disk: {files - synced}"
            assert str(self) in synced
        return real(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    pipe = pipeline(2)
    po.save_sharded(pipe, tmp_path / "a" / "sharded")
    po.save_weights(pipe, tmp_path / "a" / "weights")
    states = {k: pipe.stage_state_dict(k) for k in range(2)}
    save(tmp_path / "a" / "run", 7, states, config="c", group=SingleProcessGroup(), keep=1, versions={})
    assert named == ["sharded", "weights", "step-000007"]
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "run")} <= synced, "names are in the folder above"


def test_processes_resume_save_and_export_as_the_emulator_does(tmp_path, monkeypatch):
    before = 3
    pipe = pipeline(before, dropout=0.1)
    train(pipe, range(6))
    po.save_sharded(pipe, tmp_path / "six")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(WORKER.parent), os.environ.get("PYTHONPATH", "")]))
    outputs = stage_processes.run(WORKER, 2, str(tmp_path), str(tmp_path / "six"))
    assert [json.loads(out)["equal"] for out in outputs] == [True, True]
    refusals = {json.loads(out)["refused"] for out in outputs}
    assert len(refusals) == 1, "what one process refuses, all do"
    assert "the state of AdamW for" in refusals.pop()
    twin = pipeline(2, dropout=0.1)
    po.load_sharded(twin, tmp_path / "six")
    train(twin, range(6, 9))
    train(twin, range(9, 12))
    expected = po.full_state_dict(twin)
    assert equal(torch.load(tmp_path / "full.pt", weights_only=True), expected)
    whole = state_case.model()
    po.load_weights(whole, tmp_path / "weights")
    assert equal(whole.state_dict(), expected)


def test_state_keeps_its_order_in_memory_over_a_sharded_checkpoint(tmp_path):
    def made():
        stages = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(4 * 2 * 2, 1)]
        stages[0].to(memory_format=torch.channels_last)
        return po.Emulator(stages, lambda p: torch.optim.AdamW(p, lr=0.1), nn.functional.mse_loss)

    def step(pipe, seed):
        torch.manual_seed(seed)
        pipe.step(torch.randn(2, 3, 4, 4), target=torch.ones(2, 1))

    pipe = made()
    for seed in range(3):
        step(pipe, seed)
    po.save_sharded(pipe, tmp_path / "saved")
    other = made()
    assert po.load_sharded(other, tmp_path / "saved")
    weight = other.stage_module(0)[0].weight
    (moment,) = [s["exp_avg"] for p, s in other.stage_worker(0).optimizer.state.items() if p is weight]
    assert moment.stride() == weight.stride() and not moment.is_contiguous()
    for seed in range(3, 6):
        step(pipe, seed)
        step(other, seed)
    pipe.drain()
    other.drain()
    assert torch.equal(pipe.stage_module(0)[0].weight, weight)
