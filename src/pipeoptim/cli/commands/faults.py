"""``pipeoptim faults``: failures on purpose in a run of yours, and whether it ended as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeoptim.config import TrainConfig
    from pipeoptim.faults import FaultRow

_OWN = ("--name", "--out", "--new", "--resume", "--print-config", "--quiet", "--help")
_NODES = ("--nnodes", "--node-rank", "--master-addr", "--master-port")


def faults(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="SENTENCE... -- TRAIN-OPTIONS", help="What fails, and the run: options as pipeoptim train takes them."
        ),
    ] = None,
    storm: Annotated[int, Option(help="So many random failures instead of sentences.")] = 0,
    seed: Annotated[int, Option(help="Of the storm: the same seed, the same failures.")] = 0,
    out: Annotated[
        Path | None, Option(help="Folder of both runs, which must not exist; by default runs/faults, runs/faults-2, ...")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Let a run fail on purpose, and see whether it ends as if nothing had happened.

    The run is trained twice: undisturbed, and with the failures. The table says of each failure whether the run survived it, whether
    weights, optimizer states and losses at the end equal those of the undisturbed run bit for bit, how long it took until new work was
    done, and how many mini-batches were trained again. Exit code 0: all was kept that these settings promise (--survive and
    --max-restarts: the same bits; --on-bad skip or rollback: goes on), and everything that was asked for happened. 1 if not.

    \b
    Sentences (stages and mini-batches are counted from 0, validations, checkpoints and images from 1):
      kill stage 2 at forward 130               SIGKILL for the process of stage 2 before its F of mini-batch 130
      freeze stage 1 for 20 s at update 40      it stands still; after 10 s it counts as dead
      flip a bit in stage 0's gradient at 77    in the update of mini-batch 77
      flip a bit in stage 0's weights at 77     while that update is made: --audit N finds it in every N-th
      disk full at checkpoint 3                 a file of the third checkpoint cannot be written
      make the loss nan at 12                   that of mini-batch 12
    At: forward N, backward N, update N, send N (its result is there, and no neighbour has it), validation N, checkpoint N, image N (with
    --survive: the process has just been forked, and the image has not said so).

    \b
    Examples:
      pipeoptim faults "kill stage 1 at update 40" -- --recipe digits --steps 100 --engine processes --survive 16
          One stage is replaced while the others wait.
      pipeoptim faults "kill stage 0 at forward 50" "disk full at checkpoint 2" -- --recipe digits --steps 100 --checkpoint-every 20
        --max-restarts 3
          An emulated run in a process that is started again.
      pipeoptim faults --storm 20 --seed 1 -- --config run.toml --engine processes --survive 8
          Twenty random failures in a run of yours.
    """
    from pipeoptim.faults import random_faults, read_fault, try_faults

    if "RANK" in os.environ:
        raise ConfigError("pipeoptim faults starts the processes of its runs itself; call it without torchrun")
    words = words or []
    split = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    planned = [read_fault(sentence) for sentence in words[:split]]
    if bool(planned) == bool(storm):
        raise ConfigError('say what fails, for example "kill stage 1 at update 40", or ask for a --storm; one of both')
    if storm < 0:
        raise ConfigError(f"storm is {storm}, must be the number of failures, at least 1")
    if seed and not storm:
        raise ConfigError(f"seed is {seed}, but sentences leave nothing to chance; leave --seed out, or ask for a --storm")
    config = _config(words[split:])
    if storm:
        planned = random_faults(config, storm, seed)
    folder = _new_folder(out)
    rows = try_faults(config, planned, folder, lambda text: print(f"faults: {text}", file=sys.stderr, flush=True))
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in rows], indent=2))
    else:
        _show(rows, folder)
    if not all(row.kept for row in rows):
        raise typer.Exit(1)


def _config(options: Sequence[str]) -> TrainConfig:
    """The run that ``pipeoptim train`` would begin with these options, after its own checks."""
    from pipeoptim.cli.app import build
    from pipeoptim.train.api import check_possible
    from pipeoptim.train.config_file import chosen_run

    for option in options:
        if option.partition("=")[0] in _NODES:
            raise ConfigError(f"{option} is not for pipeoptim faults, whose runs are on this machine alone; leave it out")
        if option.partition("=")[0] in _OWN:
            raise ConfigError(
                f"{option} is not for pipeoptim faults, which names and shows its runs itself; leave it out, and see --out before -- and "
                "pipeoptim train --help"
            )
    printed = io.StringIO()
    with redirect_stdout(printed):
        build()(args=["train", *options, "--print-config"], prog_name="pipeoptim", standalone_mode=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_text(printed.getvalue())
        config, _ = chosen_run(None, False, path, None, None, "")
    check_possible(config)
    return config


def _new_folder(out: Path | None) -> Path:
    if out is None:
        names = (Path("runs") / ("faults" if n == 1 else f"faults-{n}") for n in count(1))
        return next(path for path in names if not path.exists())
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out, or leave it out")
    return out


def _show(rows: Sequence[FaultRow], folder: Path) -> None:
    from rich.table import Table

    from pipeoptim.faults.promise import Promise
    from pipeoptim.telemetry.console import table_console

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("fault", "survived", "bit-equal", "seconds to recover", "lost work"):
        table.add_column(heading, justify="left" if heading == "fault" else "right", no_wrap=heading != "fault")
    for row in rows:
        if not row.fired:
            table.add_row(row.fault, "never happened", "", "", "")
            continue
        survived = "yes" if row.survived else "no" if row.promised is not Promise.NOTHING else "no (not promised)"
        seconds = "" if row.seconds is None else f"{row.seconds:.2f}"
        repeated = "" if row.repeated is None else str(row.repeated)
        table.add_row(row.fault, survived, "yes" if row.bit_equal else "no", seconds, repeated)
    console = table_console()
    console.print(table)
    console.print("Lost work: mini-batches that were trained again.")
    kept = sum(row.kept for row in rows)
    console.print(f"{kept} of {len(rows)} as promised; both runs are in {folder}")
