"""A storm of SIGKILLs on the processes of runs with ``--survive``; every run must end with the bits of an emulated one.

python benchmarks/storm.py --kills 1000    goes on with results/storm.json until so many processes were ended in all
python benchmarks/storm.py --emulated 60   emulated runs at D up to 16 that start again by themselves: results/storm_emulated.json
python benchmarks/storm.py --kills 1200 --aimed   the same, at the instants that `pipeoptim faults` can name
python benchmarks/storm.py --kills 100 --sites 20   on two network namespaces, 20 ms apart one way, a supervisor on each:
                                           results/storm_sites.json

Processes die at random instants of a training that validates every 10 and saves every 20 mini-batches: alone, two or all at once, while
they catch up, and now and then one is only stopped (SIGSTOP), which the supervisor takes for dead after 10 s. Emulated runs are hit by the
failures that `pipeoptim faults --storm` draws. docs/failures.md shows the results. A file of another machine or version is not continued.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from two_sites import SITES, Link, make_sites

from pipeoptim.bench.record import Record
from pipeoptim.faults import random_faults, try_faults
from pipeoptim.faults.same_end import end_of, same
from pipeoptim.faults.sentences import EVENTS
from pipeoptim.telemetry.metrics import read_rows
from pipeoptim.train.recipes import get_recipe

RESULTS = Path(__file__).parent / "results"
EVERY = 8  # mini-batches between images
PER_RUN = 60  # times that a run is hit
COMMON = ["--checkpoint-every", "20", "--eval-every", "10"]
VARIANTS = {
    "digits, D = 2, pipeoptim": ["--recipe", "digits", "--stages", "2", "--steps", "600"],
    "digits, D = 3, M = 4, pipeoptim_stash, clipped by the global norm": [
        *["--recipe", "digits", "--stages", "3", "--steps", "400", "--microbatches", "4"],
        *["--method", "pipeoptim_stash", "--clip", "1", "--clip-scope", "global"],
    ],
    "digits, D = 4, pipedream": ["--recipe", "digits", "--steps", "500", "--method", "pipedream"],
    "chars, D = 4, M = 4, in_progress, slack 1": ["--recipe", "chars", "--tiny", "--steps", "300", "--slack", "1"],
}
PER_EVENT = 5  # aimed kills of a run
DEPTHS, PER_EMULATED = (16, 8, 4), 5  # of emulated runs; failures in each
KINDS = {"one process": 60, "two neighbours at once": 20, "all at once": 10, "one again while it catches up": 8, "stopped": 2}


def train(folder: Path, name: str, options: Sequence[str], within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """``pipeoptim train`` in ``folder``; ``within``: a command that runs others."""
    command = [*within, sys.executable, "-m", "pipeoptim", "train", "--name", name, "--quiet", *COMMON, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


class TwoCommands:
    """``pipeoptim train`` on both sites, as if it were one process."""

    def __init__(self, folder: Path, name: str, options: Sequence[str]) -> None:
        nodes = ["--nnodes", "2", "--master-addr", next(iter(SITES.values()))]
        self._commands = [
            train(folder, name, [*options, *nodes, "--node-rank", str(rank)], ["ip", "netns", "exec", site])
            for rank, site in enumerate(SITES)
        ]

    def poll(self) -> int | None:
        """The greater exit code, when both have ended."""
        codes = [command.poll() for command in self._commands]
        return None if None in codes else max(map(abs, filter(None, codes)), default=0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def communicate(self) -> tuple[bytes, bytes]:
        """What both have said."""
        out, err = zip(*(command.communicate() for command in self._commands), strict=True)
        return b"".join(filter(None, out)), b"".join(err)


def listing(run: Path) -> dict[str, Any]:
    """What the supervisors say: who works, and who was replaced; empty before they have begun."""
    found: dict[str, Any] = {"processes": {}, "replaced": []}
    for folder in sorted(run.glob("logs/launch-*"))[-1:]:
        for file in sorted(folder.glob("processes*.json")):
            told = json.loads(file.read_text())
            found["processes"] |= told["processes"]
            found["replaced"] += told["replaced"]
    return found


def rows_of(run: Path) -> int:
    """How many figures the last stage has written: with the first one, all processes have begun."""
    path = run / "metrics.jsonl"
    return len(read_rows(path)) if path.exists() else 0


def caught_up(run: Path) -> bool:
    return all(one["seconds"] is not None for one in listing(run)["replaced"])


def hit(run: Path, kind: str, chance: random.Random) -> int:
    """End processes as ``kind`` says. Returns how many."""
    pids = list(listing(run)["processes"].values())
    first = chance.randrange(len(pids))
    chosen = {"all at once": pids, "two neighbours at once": pids[min(first, len(pids) - 2) :][:2]}.get(kind, [pids[first]])
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGSTOP if kind == "stopped" else signal.SIGKILL)
        except ProcessLookupError:  # the run has just ended
            return 0
    return len(chosen)


def storm(run: Path, command: subprocess.Popen[bytes] | TwoCommands, chance: random.Random) -> tuple[int, list[str]]:
    """Hit a run until it ends. Returns how many processes were ended, and the kind of each hit."""
    ended, kinds = 0, list[str]()
    while command.poll() is None:
        # Not before its processes have begun to train, and not all hits at its beginning.
        if len(kinds) < PER_RUN and rows_of(run):
            kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
            while kind != "one again while it catches up" and command.poll() is None and not caught_up(run):
                time.sleep(0.01)
            if command.poll() is None and (count := hit(run, kind, chance)):
                ended, kinds = ended + count, [*kinds, kind]
        # By progress and not by the clock: where the machine is busy, a storm in seconds would let no mini-batch pass.
        until = rows_of(run) + chance.randrange(5)
        while command.poll() is None and rows_of(run) < until:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.05))
    return ended, kinds


def left_behind(folder: Path) -> list[int]:
    """Processes that still run in ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def one_run(folder: Path, number: int, record: Record, on_sites: bool = False) -> None:
    """A run of the next variant; adds what came of it to ``record``."""
    variants = {name: options for name, options in VARIANTS.items() if not on_sites or "D = 3" not in name}
    name, options = list(variants.items())[number % len(variants)]
    if on_sites and "--clip" not in options:  # norms of all stages, which go another way between machines
        options = [*options, "--clip", "1"]
    whole = folder / "runs" / f"whole-{number % len(variants)}"
    if not whole.exists():
        undisturbed = train(folder, whole.name, options)
        assert undisturbed.wait() == 0, undisturbed.communicate()[1].decode()
    run = folder / "runs" / f"storm-{number}"
    options = [*options, "--engine", "processes", "--survive", str(EVERY)]
    command = TwoCommands(folder, run.name, options) if on_sites else train(folder, run.name, options)
    ended, kinds = storm(run, command, random.Random(number))
    error = command.communicate()[1].decode()
    equal = command.returncode == 0 and same(end_of(whole), end_of(run))
    left = left_behind(folder)
    print(f"{name}: {len(kinds)} hits, {ended} processes ended; equal: {equal}; left behind: {left}", flush=True)
    if not equal or left:
        print(error[-2000:], flush=True)
    settings = record.settings
    for key, more in {"runs": 1, "equal bit for bit": int(equal), "processes ended": ended, "left behind": len(left)}.items():
        settings[key] = settings.get(key, 0) + more
    for one in listing(run)["replaced"]:
        kind = "stopped for 10 s, then killed" if one["cause"].startswith("stood") else "killed"
        label = f"{name}: {kind}"
        if one["seconds"] is not None:  # else it was hit again before
            record.row_or_new(label).samples.append(round(one["seconds"], 4))


def storms(kills: int) -> None:
    """Until so many processes were ended, in this and earlier calls."""
    path = RESULTS / "storm.json"
    record = Record.continued(path, "s from death to new work", {"survive": EVERY})
    with tempfile.TemporaryDirectory() as folder:
        while record.settings.get("processes ended", 0) < kills:
            one_run(Path(folder), record.settings.get("runs", 0), record)
            record.write(path)


def sites(kills: int, milliseconds: float) -> None:
    """As ``storms``, on two namespaces so many ms apart."""
    path = RESULTS / "storm_sites.json"
    record = Record.continued(path, "s from death to new work", {"survive": EVERY, "ms one way": milliseconds})
    with ExitStack() as stack:
        try:
            ends = make_sites(stack)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"skipped: no network namespaces with a TUN device can be made here ({error})")
            return
        stack.callback(Link(ends, milliseconds / 1e3, 0.0, 0.0, 0.0).close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        while record.settings.get("processes ended", 0) < kills:
            one_run(folder, record.settings.get("runs", 0), record, on_sites=True)
            record.write(path)


def emulated(kills: int) -> None:
    """Until so many failures have hit emulated runs of each depth in turn, in this and earlier calls."""
    path = RESULTS / "storm_emulated.json"
    record = Record.continued(path, "s from death to new work", {"runs": 0, "equal bit for bit": 0, "failures": 0})
    settings = record.settings
    while settings["failures"] < kills:
        depth = DEPTHS[settings["runs"] % len(DEPTHS)]
        chars = get_recipe("chars", tiny=True)
        model = chars.model.with_options(layers=16, width=32)
        config = replace(chars, model=model, stages=depth, batch_size=4, steps=60, checkpoint_every=10, eval_every=25)
        config = replace(config, max_restarts=PER_EMULATED)
        faults = random_faults(config, PER_EMULATED, seed=settings["runs"])
        with tempfile.TemporaryDirectory() as folder:
            rows = try_faults(config, faults, Path(folder) / "hit", lambda text: print(text, flush=True))
        for key, more in {
            "runs": 1,
            "equal bit for bit": int(rows[0].bit_equal),
            "failures": sum(row.fired for row in rows),
        }.items():
            settings[key] += more
        label = f"emulator, D = {depth}: killed, restarted from a checkpoint"
        killed = [row.seconds for row in rows if row.fault.startswith("kill") and row.seconds is not None]
        record.row_or_new(label).samples.extend(round(seconds, 3) for seconds in killed)
        record.write(path)
        print(f"D = {depth}: {len(rows)} failures; equal: {rows[0].bit_equal}", flush=True)


def aimed(kills: int) -> None:
    """As ``storms``, by ``pipeoptim faults``: kills at named instants, of random stages and numbers, as many of each."""
    path = RESULTS / "storm.json"
    record = Record.continued(path, "s from death to new work", {"survive": EVERY})
    settings = record.settings
    while settings.get("processes ended", 0) < kills:
        number = settings.get("runs", 0)
        name, options = list(VARIANTS.items())[number % len(VARIANTS)]
        with tempfile.TemporaryDirectory() as folder:
            rows = hit_at_instants(Path(folder), options, random.Random(number))
            left = left_behind(Path(folder))
        equal = all(row["kept"] for row in rows)
        print(f"{name}: {len(rows)} aimed; as promised: {equal}; left behind: {left}", flush=True)
        fired = [row for row in rows if row["fired"]]
        counts = {"runs": 1, "equal bit for bit": int(equal), "processes ended": len(fired), "left behind": len(left)}
        for row in fired:
            instant = f"killed at {row['fault'].split()[-2]}"
            counts[instant] = counts.get(instant, 0) + 1
            if row["seconds"] is not None:
                label = f"aimed by pipeoptim faults: {instant}"
                record.row_or_new(label).samples.append(round(row["seconds"], 4))
        for key, more in counts.items():
            settings[key] = settings.get(key, 0) + more
        record.write(path)


def hit_at_instants(folder: Path, options: Sequence[str], chance: random.Random) -> list[dict[str, Any]]:
    """``pipeoptim faults`` in ``folder``; what it says of each kill."""
    stages, steps = (int(options[options.index(name) + 1]) if name in options else 4 for name in ("--stages", "--steps"))
    every = {"image": EVERY, "validation": 10, "checkpoint": 20}
    sentences = list[str]()
    for event in (event for event in EVENTS for _ in range(PER_EVENT)):
        step, period = chance.randrange(EVERY, steps - 1), every.get(event, 1)
        sentences.append(f"kill stage {chance.randrange(stages)} at {event} {step // period or 1}")
    command = [sys.executable, "-m", "pipeoptim", "faults", "--json", "--out", "hit", *dict.fromkeys(sentences), "--", *options]
    command += [*COMMON, "--engine", "processes", "--survive", str(EVERY)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(done.stderr[-3000:])
    if done.returncode:
        print(done.stdout, done.stderr[-3000:], flush=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--emulated", type=int, default=0, metavar="FAILURES")
    parser.add_argument("--aimed", action="store_true")
    parser.add_argument("--sites", type=float, default=-1.0, metavar="MS")
    given = parser.parse_args()
    if given.emulated:
        emulated(given.emulated)
    elif given.aimed:
        aimed(given.kills)
    elif given.sites >= 0:
        sites(given.kills, given.sites)
    else:
        storms(given.kills)
