"""The command line trains what lies in the present folder: models, data, optimizers and recipes of the user's own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import own_code
from pipeoptim.cli.app import _run
from pipeoptim.cli.commands.compare import _config
from pipeoptim.errors import ConfigError
from pipeoptim.train.cut import cut_between_layers
from pipeoptim.train.recipes import chosen_config
from pipeoptim.user_code import import_target

COMMAND = Path(sys.executable).with_name("pipeoptim")  # as installed: its own folder is on the path, the present one is not
OWN = ("--model", "mine:net", "--data", "mine.py:task", "--optimizer", "mine:Opt", "--lr", "0.01", "--stages", "2", "--quiet")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The present folder, with the user's file in it; leaves nothing of it behind in this process."""
    shutil.copy(own_code.__file__, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another test's file
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path
    for name in [name for name in sys.modules if name == "mine" or name.startswith("pipeoptim_user_mine")]:
        del sys.modules[name]


def result(folder, name):
    return json.loads((folder / "runs" / name / "result.json").read_text())


def test_a_model_data_and_an_optimizer_in_the_folder_train_on_both_engines_and_resume(folder):
    command = [COMMAND, "train", *OWN, "--steps", "6", "--engine", "processes", "--name", "processes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _run(["train", *OWN, "--steps", "6"]) == 0
    assert result(folder, "mine-pipeoptim")["val_loss"] == result(folder, "processes")["val_loss"]
    # Signed when it began, so that nothing need be named again; cut anew, between other layers.
    assert _run(["train", "--resume", "--name", "mine-pipeoptim", "--stages", "3", "--steps", "8", "--quiet"]) == 0
    assert result(folder, "mine-pipeoptim-3-stages")["step"] == 8


def test_a_recipe_in_a_file_and_names_that_are_wrong(folder, capsys):
    assert _run(["train", "--recipe", "mine.py:recipe", "--quiet"]) == 0
    assert result(folder, "own-pipeoptim")["step"] == 4
    assert _run(["train", "--model", "mine:nett", "--data", "mine:task"]) == 2
    assert "model 'mine:nett': mine has no 'nett'" in capsys.readouterr().err
    assert _run(["plan", "--model", "mine:net", "--data", "mine:task", "--stages", "2"]) == 0
    assert "tied: embed.weight = head.weight, on stages 0, 1" in capsys.readouterr().out


def test_comparisons_take_them_alike():
    config = _config(chosen_config(None, False, "mine:net", "mine.py:task", "chars"), {"steps": 4}, None, 0.1)
    assert (config.recipe, config.model.target, config.data.target, config.steps) == ("mine", "mine:net", "mine.py:task", 4)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_cut_between_layers_is_balanced_or_as_given_and_refused_in_a_sentence():
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert cut_between_layers(own_code.net(), 2, ids).lengths == [2, 3]
    given = cut_between_layers(own_code.net(), 2, ids, (3, 2))
    assert given.lengths == [3, 2] and len(given.tied) == 1
    with pytest.raises(ConfigError, match="cut is 3,3, must have a number of blocks for each of 2 stages, 5 in all"):
        cut_between_layers(own_code.net(), 2, ids, (3, 3))
    with pytest.raises(ConfigError, match="the Net cannot be cut into 9 stages: it has 5 blocks, and 4 places"):
        cut_between_layers(own_code.net(), 9, ids)
    with pytest.raises(ConfigError, match=r"the Residual cannot be cut into 4 stages: .* \(a residual\) into the layers"):
        cut_between_layers(Residual(), 4, torch.ones(2, 4))


def test_targets_are_found_in_the_folder_once_and_shadow_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (tmp_path / "math.py").write_text("pi = 3")
    (tmp_path / "found_here.py").write_text("class Own: pass")
    assert import_target("math:pi") > 3
    assert import_target("math.py:pi") == 3
    assert import_target("found_here.py:Own") is import_target(f"{tmp_path}/found_here.py:Own")
    assert import_target("found_here:Own").__module__ == "found_here"
    for wrong, error in {
        "nowhere:f": ImportError,
        "nowhere.py:f": OSError,
        "found_here:Other": AttributeError,
        "found_here": ValueError,
        ":f": ValueError,
    }.items():
        with pytest.raises(error):
            import_target(wrong)


def test_a_model_and_data_need_no_recipe_and_change_one():
    own = chosen_config(None, False, "a.b:net", "some/mine.py:task", "chars")
    assert (own.recipe, own.model.target, own.data.target) == ("a", "a.b:net", "some/mine.py:task")
    changed = chosen_config("digits", True, None, "mine:task", "chars")
    assert changed.recipe == "digits-tiny" and changed.data.target == "mine:task" and changed.data.options == {}
    with pytest.raises(ConfigError, match="--tiny belongs to a recipe"):
        chosen_config(None, True, "mine:net", "mine:task", "chars")
