"""A script with a Checkpointer is the script that was never interrupted, whatever has become of its newest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipeoptim as po
from exactly import assert_equal
from pipeoptim.checkpoint import find, load_stage

STEPS, EVERY = 14, 4


def train(folder: Path, until: int = STEPS, at: Callable[[po.Emulator, int], None] = lambda pipe, n: None) -> tuple[int, Any]:
    """Train with and without interruptions; ``at`` is called before mini-batch n. Returns where it began, and the states at the end."""
    torch.manual_seed(3)
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.BatchNorm1d(4)), nn.Linear(4, 4), nn.Linear(4, 1)]
    pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p, lr=0.01), nn.functional.mse_loss, seed=1)
    with po.Checkpointer(pipe, folder, every=EVERY) as checkpoints:
        start = checkpoints.resume()
        for n in range(start, until):
            at(pipe, n)
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(n))
            pipe.step(x, target=x[:, :1])
            if checkpoints.after_step(n + 1):
                break
        pipe.drain()
    return start, [pipe.stage_state_dict(k) for k in range(3)]


def cut_off(folder: Path) -> None:
    path = folder / "stage-1.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def make_nan(folder: Path) -> None:
    states = {k: load_stage(folder, k) for k in range(3)}
    states[2]["module"]["bias"].fill_(torch.nan)
    from pipeoptim.checkpoint import read_meta, save
    from pipeoptim.train.group import SingleProcessGroup

    meta = read_meta(folder)
    save(folder.parent, meta.step, states, config=meta.config, group=SingleProcessGroup(), keep=9, versions={})


def make_unreadable(folder: Path) -> None:
    (folder / "meta.json").write_text("{}")


@pytest.mark.parametrize("damage", [None, cut_off, make_nan, make_unreadable])
def test_an_interrupted_script_goes_on_bit_for_bit(
    damage: Callable[[Path], None] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(pipe: po.Emulator, n: int) -> None:
        if n == 10:
            raise OSError("the disk of the data is gone")

    _, whole = train(tmp_path / "whole")
    with pytest.raises(OSError, match="disk"):
        train(tmp_path / "halves", at=crash)
    newest = tmp_path / "halves" / "step-000008"
    if damage is not None:
        damage(newest)
    with caplog.at_level(logging.WARNING, "pipeoptim"):
        start, states = train(tmp_path / "halves")
    assert start == (8 if damage is None else 4)
    assert_equal(states, whole, "states")
    assert (damage is None) == (f"checkpoint {newest} is passed over" not in caplog.text)
    assert sorted(path.name for path in (tmp_path / "halves").iterdir()) == ["step-000008", "step-000012"]


def test_a_requested_stop_saves_and_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    def ask(pipe: po.Emulator, n: int) -> None:
        if n == 5:
            pipe.request_stop()

    def spoil(pipe: po.Emulator, n: int) -> None:
        if n == 10:
            pipe.drain()
            with torch.no_grad():
                pipe.stage_module(0)[0].weight[0, 0] = torch.inf

    train(tmp_path, at=ask)
    assert find(tmp_path).folder == tmp_path / "step-000006"
    with pytest.raises(po.DivergedError):
        train(tmp_path, at=spoil)
    assert find(tmp_path).folder == tmp_path / "step-000008"
    with pytest.raises(po.ConfigError, match="every is 0"):
        po.Checkpointer(po.Emulator([nn.Identity()], [None], nn.functional.mse_loss), tmp_path, every=0)
    with pytest.raises(po.ConfigError, match="has 3 stages, the pipeline 1"):
        po.Checkpointer(po.Emulator([nn.Identity()], [None], nn.functional.mse_loss), tmp_path, every=1).resume()


class Drawn:
    """Data that a script draws itself, whose next ones depend on those before."""

    def __init__(self) -> None:
        self.generator, self.seen = torch.Generator().manual_seed(5), [0.0]

    def next(self) -> torch.Tensor:
        x = torch.randn(8, 2, generator=self.generator)
        self.seen.append(float(x.sum()))
        return x

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.seen = state["seen"]


def small(folder: Path, **options: Any) -> po.Checkpointer:
    torch.manual_seed(3)
    stages = [nn.Linear(2, 4), nn.Linear(4, 1)]
    pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p, lr=0.01), nn.functional.mse_loss)
    return po.Checkpointer(pipe, folder, every=3, **options)


def test_state_of_the_script_goes_on_with_the_pipeline(tmp_path: Path) -> None:
    def trained(folder: Path, until: int) -> Any:
        data = Drawn()
        with small(folder, state={"data": data}) as checkpoints:
            for n in range(checkpoints.resume(), until):
                x = data.next()
                checkpoints.pipe.step(x, target=x[:, :1])
                checkpoints.after_step(n + 1)
            checkpoints.pipe.drain()
        return data.seen, [checkpoints.pipe.stage_state_dict(k) for k in range(2)]

    whole = trained(tmp_path / "whole", 11)
    trained(tmp_path / "halves", 8)  # two mini-batches after the checkpoint, which are drawn again
    assert_equal(trained(tmp_path / "halves", 11), whole, "data and states")
    with pytest.raises(po.ConfigError, match="holds a state 'data', and no such object is in state"):
        small(tmp_path / "whole").resume()
    with pytest.raises(po.ConfigError, match=r"state\['best'\] is not in checkpoint"):
        small(tmp_path / "whole", state={"data": Drawn(), "best": Drawn()}).resume()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([Drawn()], "state is a list, must be a dictionary"),
        ({1: Drawn()}, "state has the name 1, must be a string"),
        ({"best": 0.5}, r"state\['best'\] is a float without state_dict\(\)"),
        ({"best": torch.nn.Identity().state_dict}, r"without state_dict\(\)"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused_before_anything_runs(state: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(po.ConfigError, match=message):
        small(tmp_path, state=state)
    unsaved = Drawn()
    unsaved.seen = [object()]  # type: ignore[list-item]
    with pytest.raises(po.ConfigError, match="script/data/seen/0 is of the type object, which a checkpoint cannot hold"):
        small(tmp_path, state={"data": unsaved})


def test_a_folder_of_another_run_is_not_trained_over(tmp_path: Path) -> None:
    def checkpoints(*stages: nn.Module) -> po.Checkpointer:
        pipe = po.Emulator(list(stages), lambda p: torch.optim.SGD(p, lr=0.01), nn.functional.mse_loss)
        return po.Checkpointer(pipe, tmp_path, every=2)

    def linear(width: int = 4) -> nn.Module:
        return nn.Linear(4, width)

    with checkpoints(linear(), nn.Sequential(linear(), linear(1))) as first:
        for n in range(2):  # without resume(), in a folder that is empty
            first.pipe.step(torch.ones(2, 4), target=torch.ones(2, 1))
            assert not first.after_step(n + 1)
    with pytest.raises(po.ConfigError, match="has 2 stages, the pipeline 3"):  # more stages than it has files
        checkpoints(linear(), linear(), linear(1)).resume()
    with pytest.raises(po.ConfigError, match=r"stage 0 of checkpoint .*: only one of them has 'weight'.* pins="):
        checkpoints(nn.Sequential(linear(), linear()), linear(1)).resume()
    refused = checkpoints(linear(5), nn.Sequential(linear(), linear(1)))
    with pytest.raises(po.ConfigError, match="only one of them has 'weight', or has it in that shape"):
        refused.resume()
    with pytest.raises(po.ConfigError, match="which this run does not go on from"):  # by a script that has caught the refusal
        refused.after_step(2)
    again = checkpoints(linear(), nn.Sequential(linear(), linear(1)))
    again.pipe.step(torch.ones(2, 4), target=torch.ones(2, 1))
    with pytest.raises(
        po.ConfigError, match=r"holds checkpoints up to step-000002, which this run does not go on from; call resume\(\)"
    ):
        again.after_step(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
