"""What runs on one machine listens only there."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

import listening
import processes
from pipeoptim.bench.processes import run_on_processes

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
LOOPBACK = {"127.0.0.1"}


def test_the_reader_of_these_tests_sees_an_open_port() -> None:
    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0)):
        assert {"0.0.0.0", "127.0.0.1"} <= listening.addresses()


def test_launcher_and_workers_of_a_run_listen_on_the_loopback_interface(tmp_path: Path) -> None:
    found: dict[int, set[str]] = {}
    end = time.monotonic() + 150
    options = ("--recipe", "tiny:recipe", "--engine", "processes", "--name", "one", "--replicas", "2")
    with processes.train(tmp_path, *options) as command:
        while command.process.poll() is None:
            assert time.monotonic() < end
            for pid in listening.descendants(command.process.pid):
                found.setdefault(pid, set()).update(listening.addresses(pid))
            time.sleep(0.05)
        assert command.wait() == 0, command.err
    assert found[command.process.pid] == LOOPBACK, "the launcher has the store"
    assert sum(bool(where) for where in found.values()) >= 3, "and every worker its end of gloo"
    assert set.union(*found.values()) == LOOPBACK


def test_processes_of_a_benchmark_listen_on_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    before = listening.addresses()
    found = run_on_processes("listening:of_a_benchmark", {}, 2, 1, 120)
    assert [set(where) for where in found] == [LOOPBACK, LOOPBACK]
    assert listening.addresses() <= before | LOOPBACK
