"""``pipeoptim watch``: a run, live, in the terminal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.telemetry.watched_run import WatchedRun


def watch(
    run: Annotated[str, Argument(help="Folder of the run, for example runs/chars-pipeoptim; or host:folder, by ssh.")],
    every: Annotated[float, Option(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, Option("--once", help="Show it once, and end.")] = False,
    remote: Annotated[str, Option(help="With host:folder: the command there.")] = "pipeoptim",
) -> None:
    """Watch a run: loss, validation, speed, time left, and for each stage its gap, its times and its prediction error.

    Reads the run's files only, so that it disturbs nothing and works from any machine that sees them. Ends with the run, or with Ctrl-C,
    which leaves the run alone. Times of stages are measured every 50 mini-batches; prediction errors with --monitor-every.

    \b
    Examples:
      pipeoptim watch runs/chars-pipeoptim
          In a second terminal, while it trains.
      pipeoptim watch me@cluster:work/runs/chars-pipeoptim
          From another machine: the same command there, through ssh.
      pipeoptim watch runs/chars-pipeoptim --once
          How it stands, for a script or a mail.
    """
    if not 0.05 <= every <= 3600:
        raise ConfigError(f"every is {every:g}, must be a number of seconds from 0.05 to 3600")
    elsewhere = re.fullmatch(r"([^/:\s-][^/:\s]*):(.+)", run)
    if elsewhere and not Path(run).exists():
        _by_ssh(elsewhere[1], [remote, "watch", elsewhere[2], "--every", f"{every:g}", *(["--once"] if once else [])])
    _watch_here(Path(run), every, once)


def _by_ssh(host: str, command: list[str]) -> None:
    """Become ``ssh``, with a terminal there."""
    ssh = shutil.which("ssh")
    if ssh is None:
        raise ConfigError(
            f"{host} would be reached by ssh, which is not installed; install it, or watch a folder of this machine"
        )
    # The host's shell reads the command, except for the name of the program, which may be several words.
    told = " ".join([command[0], *map(shlex.quote, command[1:])])
    os.execv(ssh, ["ssh", *([] if "--once" in command else ["-t"]), "--", host, told])


def _watch_here(folder: Path, every: float, once: bool) -> None:
    from rich.live import Live

    from pipeoptim.telemetry.console import table_console
    from pipeoptim.telemetry.watch_view import picture
    from pipeoptim.telemetry.watched_run import WatchedRun

    watched, console = WatchedRun(folder), table_console()
    gaps = _gaps(watched)
    watched.look()
    if once or not console.is_terminal:
        console.print(picture(watched, gaps, min(console.width, 100)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            ended = watched.ended  # before the look, which then sees all that was written
            watched.look()
            live.update(picture(watched, gaps, min(console.width, 100)), refresh=True)
            if ended:
                return
            time.sleep(every)


def _gaps(watched: WatchedRun) -> list[int | None]:
    """Of every stage; unknown where the method is code of somebody's own, which a look does not run."""
    from pipeoptim.methods import get_method
    from pipeoptim.methods.facts import gap
    from pipeoptim.train.checks import program
    from pipeoptim.train.rundir import RunDir

    config = RunDir(watched.folder).read_config()
    if ":" in config.method:
        return [None] * config.stages
    method, made = get_method(config.method), program(config)
    return [gap(method, config.stages, config.microbatches, k, program=made) for k in range(config.stages)]
