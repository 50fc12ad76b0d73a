"""Commands on several machines carry out one run that survives: here "machines" are commands that share no memory, and speak over TCP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import dying
import processes
import tiny
from compare import assert_equal_to_undisturbed
from pipeoptim.errors import ConfigError
from pipeoptim.train import Node, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="survive is for Linux")

SECONDS = 150


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def node(folder: Path, rank: int, port: int, *arguments: str, nodes: int = 2) -> processes.Command:
    """The command of one machine; its output is in a folder of its own."""
    outputs = folder / f"node-{rank}"
    outputs.mkdir(exist_ok=True)
    where = ["--nnodes", str(nodes), "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    common = ["--engine", "processes", "--survive", "4", "--name", "both"]
    return processes.Command([*processes.TRAIN, *common, *where, *arguments], folder, outputs)


@contextmanager
def both(folder: Path, *arguments: str, port: int = 0) -> Iterator[tuple[processes.Command, processes.Command]]:
    port = port or free_port()
    with ExitStack() as stack:
        first, second = (stack.enter_context(node(folder, rank, port, *arguments)) for rank in (0, 1))
        yield first, second


def listed(folder: Path) -> dict[str, int]:
    """The process of each stage, as the supervisors say."""
    launches = sorted((folder / "runs" / "both" / "logs").glob("launch-*"))
    found: dict[str, int] = {}
    for listing in launches[-1].glob("processes*.json") if launches else ():
        found |= json.loads(listing.read_text())["processes"]
    return found


def rows(folder: Path) -> int:
    file = folder / "runs" / "both" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


ENDLESS = ("--recipe", "tiny:slow", "--steps", "3000", "--checkpoint-every", "20")


def test_processes_killed_on_three_nodes_are_replaced_there_and_the_bits_are_those_of_one_machine(tmp_path: Path) -> None:
    """With norms that all stages exchange."""
    port = free_port()
    with ExitStack() as stack:
        commands = [stack.enter_context(node(tmp_path, k, port, "--recipe", "dying:recipe", nodes=3)) for k in range(3)]
        for command in commands:
            assert command.wait(SECONDS) == 0, [other.err for other in commands]
        killed = [re.findall(r"(stage \d) was killed by SIGKILL; process", command.err) for command in commands]
    assert killed == [["stage 0"], ["stage 1"], ["stage 2", "stage 2"]]
    died = {path.name.removeprefix("died-") for path in tmp_path.glob("died-*")}
    assert died == {"forward", "backward", "update", "evaluation"}
    for process in listed(tmp_path).values():
        assert not Path(f"/proc/{process}").exists()
    where = tmp_path / "runs" / "both"
    assert_equal_to_undisturbed(where, dying.recipe(), tmp_path / "whole")


def test_a_signal_to_one_command_stops_and_saves_the_run_on_both(tmp_path: Path) -> None:
    with both(tmp_path, *ENDLESS) as (first, second):
        first.wait_for(lambda: rows(tmp_path) > 10, SECONDS)
        second.process.send_signal(signal.SIGTERM)
        assert second.wait(SECONDS) == 143, second.err
        assert first.wait(30) == 143, first.err
    result = json.loads((tmp_path / "runs" / "both" / "result.json").read_text())
    assert result["status"] == "stopped"
    assert (tmp_path / "runs" / "both" / "checkpoints" / f"step-{result['step']:06d}").is_dir()


def test_a_node_that_is_gone_is_named_waited_for_and_taken_in_again(tmp_path: Path) -> None:
    port, arguments = free_port(), ("--recipe", "tiny:slow", "--max-restarts", "1")
    with both(tmp_path, *arguments, port=port) as (first, second):
        first.wait_for(lambda: rows(tmp_path) > 50, SECONDS)
        processes_of = listed(tmp_path)
        second.process.kill()  # as where the machine is gone: its processes end with it
        first.wait_for(lambda: "restart 1 of 1, from step" in first.err, SECONDS)
        assert re.search(r"node 1 \(.*127\.0\.0\.1\) is gone: its command has ended, or cannot be reached", first.err)
        first.wait_for(lambda: "waiting for node 1 to call at 127.0.0.1" in first.err, SECONDS)
        assert not any(processes.alive(pid) for pid in processes_of.values())
        with node(tmp_path, 1, port, *arguments) as again:
            assert again.wait(SECONDS) == 0, again.err
            assert first.wait(30) == 0, first.err
    where = tmp_path / "runs" / "both"
    assert_equal_to_undisturbed(where, tiny.slow(), tmp_path / "whole")


def test_the_others_end_with_node_0(tmp_path: Path) -> None:
    with both(tmp_path, *ENDLESS) as (first, second):
        second.wait_for(lambda: rows(tmp_path) > 5, SECONDS)
        pids = listed(tmp_path)
        first.process.kill()
        assert second.wait(SECONDS) == 1
        assert "node 0 (127.0.0.1:" in second.err
        assert "is gone: its command has ended" in second.err
        time.sleep(0.2)
        assert len(pids) == 2
        assert not any(processes.alive(pid) for pid in pids.values())


def test_an_error_of_a_stage_ends_the_run_on_all_nodes_and_is_told_on_all(tmp_path: Path) -> None:
    os.environ["TINY_CRASH_AT"] = "7"
    try:
        with both(tmp_path, "--recipe", "tiny:recipe") as (first, second):
            assert first.wait(SECONDS) == 1
            assert second.wait(30) == 1
            for command in (first, second):
                assert re.search(r"stage [01] failed: OSError: the disk of the data is gone at step 7", command.err), (
                    command.err
                )
    finally:
        del os.environ["TINY_CRASH_AT"]


def test_nodes_with_other_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    port = free_port()
    with (
        node(tmp_path, 0, port, "--recipe", "tiny:recipe") as first,
        node(tmp_path, 1, port, "--recipe", "tiny:recipe", "--batch-size", "4") as second,
    ):
        assert second.wait(SECONDS) == 2
        assert "batch_size is 4, and 8 on node 0; give the same command on all nodes" in second.err
        first.wait_for(lambda: "waiting for node 1 to call" in first.err, SECONDS)
        first.interrupt()
        assert first.wait(30) == 130, first.err
        assert "SIGINT came while waiting for node 1" in first.err
    assert not (tmp_path / "runs").exists()


def test_strangers_who_call_node_0_are_not_taken_for_a_node(tmp_path: Path) -> None:
    port = free_port()
    with node(tmp_path, 0, port, "--recipe", "tiny:recipe") as first:
        first.wait_for(lambda: "waiting for node 1" in first.err, SECONDS)
        for words in (
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"rank": 7}\n',
            b"[1]\n",
            b'{"rank": "1", "config": 3}\n',
            b"\xff" * 100 + b"\n",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
                stranger.sendall(words)
                while stranger.recv(4096):  # until node 0 hangs up
                    pass
        with node(tmp_path, 1, port, "--recipe", "tiny:recipe") as second:
            assert second.wait(SECONDS) == 0, second.err
            assert first.wait(30) == 0, first.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--nnodes 2 --node-rank 2 --master-addr 10.0.0.1", "node_rank is 2, must be from 0 to 1 where nnodes is 2"),
        ("--nnodes 1 --node-rank 0 --master-addr 10.0.0.1", "nnodes is 1, must be at least 2"),
        ("--nnodes 2 --node-rank 1", "--nnodes is 2, and --master-addr is missing"),
        ("--master-port 29500", "--master-port is 29500, and --nnodes is missing"),
        ("--nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 0", "master_port is 0, must be from 1 to 65535"),
        ("--nnodes 2 --node-rank 0 --master-addr 192.0.2.1", "node 0 cannot listen at 192.0.2.1:29500"),
        ("--nnodes 3 --node-rank 0 --master-addr 127.0.0.1", "nnodes is 3, which does not divide the 2 stages"),
        ("--nnodes 2 --node-rank 0 --master-addr no.such.invalid", "master_addr is 'no.such.invalid', which has no IP address"),
        ("--nnodes 2 --node-rank 0 --master-addr 127.0.0.1 --survive 0", "nnodes is 2 without survive; start a run on several"),
    ],
)
def test_impossible_nodes_are_refused(tmp_path: Path, arguments: str, reason: str) -> None:
    given = ["--recipe", "tiny:recipe", "--engine", "processes", "--survive", "4", *arguments.split()]
    path = os.pathsep.join(filter(None, [str(processes.HERE), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path}
    told = subprocess.run([*processes.TRAIN, *given], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert told.returncode == 2, told.stderr
    assert reason in told.stderr
    assert not any(tmp_path.iterdir())


def test_under_torchrun_nodes_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = replace(tiny.recipe(), engine="processes", survive=8)
    with pytest.raises(ConfigError, match="nnodes is 2, but torchrun started this process"):
        run(config, tmp_path / "run", progress=False, node=Node(0, 2, "127.0.0.1", 29500))
