"""A run directory may come from anybody: what its ``config.json`` names is called only if this user or an entry point named it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import tiny
from pipeoptim.cli.app import _run
from pipeoptim.train import recut, run
from pipeoptim.train.rundir import RunDir

RUN = Path("runs/tiny-pipeoptim")
RESUME = ["train", "--resume", "--name", "tiny-pipeoptim", "--quiet"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))


def stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> None:
    """A run of a recipe of one's own that can be resumed."""
    with monkeypatch.context() as patch:
        patch.setenv("TINY_CRASH_AT", "20")
        assert _run(["train", "--recipe", "tiny:recipe", "--quiet", *options]) == 1
    capsys.readouterr()


def change(what: str, target: str, options: dict[str, object]) -> None:
    data = json.loads((RUN / "config.json").read_text())
    data[what] = target if what == "method" else {"target": target, "options": options}
    (RUN / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize("recipe", ["tiny", "chars", "tiny:recipe"])
@pytest.mark.parametrize(
    ("what", "target", "options"),
    [
        ("model", "os:system", {"command": "touch called"}),
        ("data", "os:system", {"command": "touch called"}),
        ("lr_schedule", "os:system", {"command": "touch called"}),
        ("optimizer", "adamw, os:system", {"command": "touch called"}),
        ("model", "this_module_writes:something", {}),
        ("model", "tiny:plain", {}),
        ("method", "this_module_writes:METHOD", {}),
        ("method", "this_module_writes.py:METHOD", {}),
    ],
)
def test_what_nobody_named_is_not_called(
    recipe: str,
    what: str,
    target: str,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped(monkeypatch, capsys)
    Path("this_module_writes.py").write_text("open('called', 'w')")
    monkeypatch.syspath_prepend(os.getcwd())
    change(what, target, options)
    if recipe != "tiny":
        data = json.loads((RUN / "config.json").read_text())
        (RUN / "config.json").write_text(json.dumps({**data, "recipe": recipe}))
    for more in ([], ["--stages", "3"]):
        assert _run([*RESUME, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"has {what} " in line or "has model 'tiny:model'" in line
        assert "neither this command line nor a registered recipe names" in line
    assert not Path("called").exists()


def test_a_recipe_of_ones_own_resumes_where_it_was_begun_and_elsewhere_when_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stopped(monkeypatch, capsys)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    assert _run(RESUME) == 2
    assert "--recipe" in capsys.readouterr().err
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert _run([*RESUME, "--steps", "24"]) == 0  # what is not called may be others
    key = tmp_path / "state" / "pipeoptim" / "run-key"
    assert key.stat().st_mode & 0o777 == 0o600
    (RUN / "result.json").unlink()
    key.chmod(0o644)  # everybody may have read it
    assert _run(RESUME) == 2
    assert _run([*RESUME, "--recipe", "tiny:recipe"]) == 0


def test_a_callback_of_ones_own_is_called_elsewhere_when_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(monkeypatch, capsys, "--callbacks", "noting:Note")
    (RUN / "config.sig").unlink()
    again = [*RESUME, "--recipe", "tiny:recipe", "--callbacks"]
    for other in ("early_stopping", "noting:Memory"):
        assert _run([*again, other]) == 2
        assert "has callbacks 'noting:Note', which neither this command line" in capsys.readouterr().err
    assert _run([*again, "noting:Note"]) == 0, capsys.readouterr().err


def test_the_command_that_began_it_needs_no_signature(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(monkeypatch, capsys)
    (RUN / "config.sig").unlink()
    assert _run(["train", "--recipe", "tiny:recipe", "--quiet"]) == 0


def test_a_registered_recipe_needs_no_signature(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--recipe", "digits", "--tiny", "--steps", "4", "--quiet"]
    assert _run(command) == 0
    (where,) = Path("runs").iterdir()
    for path in (where / "config.sig", where / "result.json"):
        path.unlink(missing_ok=True)
    assert _run(["train", "--resume", "--name", where.name, "--quiet"]) == 0


def test_a_run_is_cut_anew_with_what_its_caller_names_only(tmp_path: Path) -> None:
    config = tiny.recipe()
    run(config, "runs/one", progress=False)
    text = (Path("runs/one") / "config.json").read_text()
    (Path("runs/one") / "config.json").write_text(text.replace("tiny:model", "tiny:plain"))
    with pytest.raises(ValueError, match="has model 'tiny:plain', not 'tiny:model'"):
        recut(RunDir(Path("runs/one")), config)
