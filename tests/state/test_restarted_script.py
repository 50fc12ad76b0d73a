"""A script of one's own that torchrun starts again meets as if nobody had died before, and ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeoptim.engine.init_group import init_process_group
from pipeoptim.engine.processes.fresh_store import fresh_store, refuse_kept_store
from pipeoptim.errors import ConfigError, StageFailure
from stage_processes import slowness

HERE = Path(__file__).parent


def test_a_script_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "engine")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    started = subprocess.run(
        [*torchrun, "--monitor-interval", "0.05", str(HERE / "restarted_worker.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90 * slowness(),
        check=False,
    )
    assert started.returncode == 0, started.stderr[-3000:]
    assert {path.name: path.read_text() for path in tmp_path.glob("begun-*")} == {
        "begun-0-0": "0",
        "begun-0-1": "0",
        "begun-1-0": "4",
        "begun-1-1": "4",
    }


def test_each_attempt_has_a_part_of_the_store_of_its_own() -> None:
    """Also where a process begins before the first one, so that it reads the call of an attempt that has ended."""
    store, world = dist.HashStore(), 3
    for attempt in range(4):
        parts: dict[int, dist.Store] = {}

        def meet(rank: int, parts: dict[int, dist.Store] = parts) -> None:
            parts[rank] = fresh_store(store, rank, world, 20)

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(world)]
        for thread in threads if attempt % 2 else reversed(threads):
            thread.start()
            thread.join(0.05)
        for thread in threads:
            thread.join()
        assert not parts[0].check(["said"])
        parts[0].set("said", str(attempt))
        assert {parts[rank].get("said").decode() for rank in range(world)} == {str(attempt)}


@pytest.mark.parametrize(("rank", "missing"), [(0, "process 1"), (1, "process 0")])
def test_who_does_not_come_is_named(rank: int, missing: str) -> None:
    with pytest.raises(StageFailure, match=missing):
        fresh_store(dist.HashStore(), rank, 2, 0.05)


def test_a_script_whose_neighbours_do_not_come_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StageFailure, match=r"did not meet at 127.0.0.1:0 \(Timed out .* 1/2 clients joined"):
        init_process_group("gloo", timeout=0.1)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match=r"do not know of each other .*'first'"):
        init_process_group("gloo")


def test_a_group_that_could_not_be_made_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    by_torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "1"}
    by_torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in by_torchrun.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo")
    try:
        with pytest.raises(ConfigError, match=r"up to 3 times.* call pipeoptim.init_process_group\(\)"):
            refuse_kept_store()
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
        refuse_kept_store()
    finally:
        dist.destroy_process_group()
