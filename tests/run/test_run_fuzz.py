"""Random command lines, seeded: each does what it says or is refused in one line, within seconds."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from pipeoptim.cli.app import _run, build

MOST_SECONDS = 10
LINES = 150

WORDS = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "99",
    "1000000",
    "1" * 40,
    "2.5",
    "nan",
    "inf",
    "1e400",
    "true",
    "",
    "x",
    ",",
    "a,b",
    "../x",
    "a=b",
]
WORDS += [
    "lr=nan",
    "ndim=2",
    "none",
    "paper",
    "sgd",
    "adamw",
    "gpipe",
    "bf16",
    "é",
    "\x00",
    "--",
    "tiny:recipe",
    "os:getcwd",
    "{}",
]

#: What a command needs to be over at once where nothing is wrong with it. Benchmarks have a test of their own.
SMALL = {
    "train": ["--recipe", "tiny:recipe", "--steps", "2", "--quiet"],
    "compare": ["--recipe", "tiny:recipe", "--steps", "2", "--quiet", "--methods", "gpipe,none"],
    "plan": ["--recipe", "none"],
    "methods": [],
    "report": [],
}


def commands() -> Iterator[tuple[str, list[Any]]]:
    group: Any = typer.main.get_command(build())
    for name, small in SMALL.items():
        yield name, [p for p in group.commands[name].params if p.name != "help" and p.opts[0] not in small]


def line(rng: random.Random, name: str, parameters: list[Any]) -> list[str]:
    arguments = [name, *SMALL[name]]
    for parameter in rng.sample(parameters, min(len(parameters), rng.choice([1, 1, 2, 3]))):
        if parameter.param_type_name == "option":
            arguments.append(parameter.opts[0])
        if not getattr(parameter, "is_flag", False):
            arguments.append(rng.choice(WORDS))
    return arguments


@pytest.mark.parametrize("seed", range(2))
def test_a_command_line_works_or_is_refused_in_one_line(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng, every, codes = random.Random(seed), list(commands()), set()
    for _ in range(LINES):
        arguments = line(rng, *rng.choice(every))
        began = time.process_time()  # of this process: others may be busy
        code = _run(arguments)
        assert time.process_time() - began < MOST_SECONDS, arguments
        err = capsys.readouterr().err
        assert code in (0, 2), (arguments, err)
        assert code == 0 or (len(err.splitlines()) == 1 and err.startswith("pipeoptim: ")), (arguments, err)
        codes.add(code)
    assert codes == {0, 2}
