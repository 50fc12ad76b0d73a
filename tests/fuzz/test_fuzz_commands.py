"""Whatever is typed after ``pipeoptim``: it works, or one sentence says why not; never a traceback, and never long.

Command lines are carried out in this process up to where work would begin that takes long by its nature: long runs, other
processes, benchmarks.
"""

from __future__ import annotations

import json
import random
import shutil
import traceback
from pathlib import Path

import pytest

from command_lines import CommandLines
from limits import TooSlowError, amount, bounded, seed
from pipeoptim.bench import efficiency, memory, predict, scaling, slack_model, throughput, transfer
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.cli.app import _run
from pipeoptim.cli.commands import watch as watch_command
from pipeoptim.compare import api as compare_api
from pipeoptim.compare.worker import OUTCOME, carry_out
from pipeoptim.faults import trial as fault_trial
from pipeoptim.train import api as train_api

COMMANDS, PARTS = 300, 6
SHORT = 8  # steps

GARBAGE = [
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[]",
    b"{}",
    b"3",
    b'{"recipe": 3}',
    b"[" * 100_000,
    b'{"a": NaN}',
    b'{"' + b"x" * 5000 + b'": {}}',
]


class WorkBegan(BaseException):
    """All checks have passed."""


def begin(*_: object, **__: object) -> None:
    raise WorkBegan


def short_session(directory, setup, *arguments):
    if setup.config.steps > SHORT:
        raise WorkBegan
    return TRAIN_SESSION(directory, setup, *arguments)


TRAIN_SESSION = train_api.run_session


def here(folder, runs, jobs, progress):
    for run in runs:
        outcome = carry_out(run.config, folder.run(run.name))
        (folder.run(run.name) / OUTCOME).write_text(json.dumps(outcome))


def garble(path: Path, rng: random.Random) -> None:
    """Damage one file below ``path``, as a full disk, an editor or another program would."""
    files = sorted(f for f in path.rglob("*") if f.is_file())
    victim = rng.choice(files)
    how = rng.choice(("cut", "garbage", "garbage", "remove", "folder", "flip"))
    content = victim.read_bytes()
    victim.unlink()
    if how == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        victim.write_bytes(rng.choice(GARBAGE))
    elif how == "folder":
        victim.mkdir()
    elif how == "flip":
        place = rng.randrange(len(content) or 1)
        victim.write_bytes(content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :])


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with a finished run, a trace, a comparison and a benchmark's result."""
    folder = tmp_path_factory.mktemp("scene")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setattr(compare_api, "do_runs", here)
        small = ["--recipe", "small_recipe:recipe", "--quiet"]
        assert _run(["train", *small, "--trace", "--name", "done"]) == 0
        assert _run(["compare", *small, "--methods", "1f1b,pipeoptim", "--steps", "3", "--out", "compared"]) == 0
        Record("throughput", "samples/s", {}, [ResultRow("a", [1.0, 2.0, 3.0], {})]).write(Path("result.json"))
    (folder / "garbage.json").write_bytes(b"\xff\xfe{")
    (folder / "file").write_text("in the way")
    return folder


@pytest.fixture
def stubbed(monkeypatch):
    """What takes long by its nature does not begin."""
    for module in (efficiency, scaling, throughput, transfer):
        monkeypatch.setattr(module, "run_on_processes", begin)
    for module, function in (
        (memory, "_rows"),
        (slack_model, "efficiency"),
        (predict, "_copy_row"),
        (scaling, "_pair"),
        (train_api, "launch"),
        (fault_trial, "_train"),
        (watch_command, "_by_ssh"),  # this process would become ssh
    ):
        monkeypatch.setattr(module, function, begin)
    monkeypatch.setattr(compare_api, "do_runs", begin)
    monkeypatch.setattr(train_api, "run_session", short_session)


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is wrong with how a command line ended; empty for nothing."""
    try:
        with bounded():
            code = _run(arguments)
    except WorkBegan:
        return ""
    except TooSlowError:
        return "took too long\n" + traceback.format_exc()
    except BaseException:
        return traceback.format_exc()
    finally:
        said = capsys.readouterr().err
    if code not in (0, 1, 2):
        return f"exit code {code}"
    lines = [line for line in said.splitlines() if line.startswith("pipeoptim: ")]
    if code and len(lines) != 1 and arguments[0] != "doctor":
        return f"exit code {code} and {len(lines)} sentences: {said}"
    return ""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_command_line_works_or_says_in_a_sentence_why_not(part, scene, stubbed, tmp_path, monkeypatch, capsys):
    rng = random.Random(1000 * seed() + part)
    folder = tmp_path / "here"
    shutil.copytree(scene, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    runs = ["done", "fresh", "nothing"]
    paths = [
        "out",
        "deep/er/out",
        "file",
        "file/x",
        "garbage.json",
        "result.json",
        ".",
        "runs/done",
        "runs/done/trace",
        "compared",
    ]
    for n in range(8):
        for whole in ("runs/done", "compared"):
            broken = Path(f"{whole}-broken-{n}")
            shutil.copytree(whole, broken)
            garble(broken, rng)
            paths += [str(broken), *([str(broken / "trace")] if (broken / "trace").is_dir() else [])]
        runs.append(f"done-broken-{n}")
        shutil.copy("result.json", f"result-broken-{n}.json")
        Path(f"result-broken-{n}.json").write_bytes(rng.choice(GARBAGE))
        paths.append(f"result-broken-{n}.json")
    lines = CommandLines(rng, paths, runs)
    wrong = []
    for _ in range(amount(COMMANDS) // PARTS):
        arguments = lines.draw()
        if found := complaint(arguments, capsys):
            wrong.append(f"pipeoptim {arguments}\n{found}")
    assert not wrong, f"{len(wrong)} command lines:\n" + "\n".join(wrong)
