"""What the commands of two nodes tell each other, without processes: both are in this one, the other node in a thread."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from pipeoptim.cli.app import _run
from pipeoptim.errors import ConfigError, DivergedError, PipeOptimError, StageFailure
from pipeoptim.train import Node, run, supervised
from pipeoptim.train.node_link import NodeLink, as_error, told
from pipeoptim.train.nodes import AnotherNode, Attempt, FirstNode
from pipeoptim.train.rundir import RunDir
from pipeoptim.train.signals import AbortedError, StopSignals, exit_code
from test_run_nodes import free_port

CONFIG = replace(tiny.recipe(), engine="processes", survive=4)
ATTEMPT = Attempt(("127.0.0.1", "127.0.0.1"), 1, "", "launch-1", "digest")
SECONDS = 30.0


def stop_signals() -> StopSignals:
    return StopSignals((signal.SIGTERM,), grace=SECONDS)


@contextmanager
def nodes(
    other: Callable[[AnotherNode], Any], liveness: float = 10.0, name: str = "run"
) -> Iterator[tuple[FirstNode, Future[Any]]]:
    """Node 0, and what node 1, whose run is called ``name``, returns from ``other``."""
    port = free_port()

    def another() -> Any:
        with AnotherNode(Node(1, 2, "127.0.0.1", port), name, CONFIG, stop_signals(), lambda _: None, liveness) as node:
            return other(node)

    with ThreadPoolExecutor(1) as pool:
        with FirstNode(Node(0, 2, "127.0.0.1", port), "run", CONFIG, stop_signals(), lambda _: None, liveness) as first:
            yield first, pool.submit(another)


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def carry_out(first: FirstNode) -> None:
    """An attempt without processes, until another node has ended it."""
    with first.attempt():
        first.begin(ATTEMPT)
        until(first.look)


def test_a_signal_to_another_node_is_heard_before_the_processes_start() -> None:
    """While node 0 builds the model, and looks at nobody, it waits in the connection."""

    def stopped(node: AnotherNode) -> object:
        node.stop.hear(signal.SIGTERM)
        return node.next_attempt()

    with nodes(stopped) as (first, other):
        first.gather()
        until(lambda: first.gather() or first.stop.wanted)
        assert first.stop.name == "SIGTERM"
    assert other.result(SECONDS) is None


def test_a_node_that_waits_for_the_shared_folder_is_not_taken_for_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "_SHARED", 4.0)

    def not_shared(node: AnotherNode) -> None:
        attempt = node.next_attempt()
        assert attempt is not None
        with node.attempt():
            supervised.check_shared(RunDir(tmp_path / "run"), attempt, node)

    with nodes(not_shared, liveness=2.0) as (first, other):
        first.gather()
        with pytest.raises(ConfigError, match=r"node 1 .*: there is no run in .* on node 1, but node 0 has"):
            carry_out(first)
    with pytest.raises(ConfigError, match="there is no run in"):
        other.result(SECONDS)


def test_ctrl_c_while_node_0_waits_for_a_node_that_was_gone_ends_the_wait() -> None:
    def gone(node: AnotherNode) -> None:
        assert node.next_attempt() is not None  # and its connection ends

    with pytest.raises(AbortedError, match="SIGINT came while waiting for node 1"), nodes(gone) as (first, _):  # noqa: PT012
        first.gather()
        with pytest.raises(StageFailure, match="node 1 .* is gone"):
            carry_out(first)
        with first.attempt():
            first.stop.hear(signal.SIGINT)
            first.gather()


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_twice_while_nodes_wait_for_each_other_is_told_in_words(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FirstNode, "_wait", interrupted)
    monkeypatch.setattr(AnotherNode, "_wait", interrupted)
    with pytest.raises(AbortedError, match="aborted by Ctrl-C; "):
        run(CONFIG, tmp_path / "run", progress=False, node=Node(rank, 2, "127.0.0.1", free_port()))


def test_a_node_that_has_another_run_in_mind_is_refused_and_node_0_waits_on() -> None:
    """As --new does where it is given again after a node has gone."""
    with nodes(lambda _: None, name="run-2") as (first, other):
        until(lambda: first._all_here() or other.done())
        with pytest.raises(ConfigError, match="called run-2, and run on node 0; give --name run here, and no --new"):
            other.result(SECONDS)
        assert not first._all_here()


def test_a_node_that_is_there_already_is_refused() -> None:
    def twice(node: AnotherNode) -> None:
        with pytest.raises(ConfigError, match="node_rank is 1, but the machine .* is that node already"), node:
            pass  # entered again: it calls once more

    with nodes(twice) as (first, other):
        until(lambda: first._meet_callers() or other.done())
    other.result(SECONDS)


def test_several_machines_do_not_cut_a_run_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each would, into one directory."""
    RunDir(tmp_path / "run").create(CONFIG)
    where = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1"]
    assert _run(["train", "--resume", "--name", "run", "--out", str(tmp_path), "--stages", "4", *where]) == 2
    assert "nnodes is 2, and a run is cut anew on one machine only" in capsys.readouterr().err
    assert [folder.name for folder in tmp_path.iterdir()] == ["run"]


def test_a_machine_that_has_lost_its_power_is_missed_although_signs_of_life_are_on_their_way() -> None:
    """The kernel sends them again until this time-out, and probes nothing meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        link = NodeLink(connection)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25_000
        link.close()


def test_what_only_linux_knows_of_sockets_is_not_needed_to_train_elsewhere() -> None:
    """macOS has no such names."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import socket; del socket.TCP_KEEPIDLE, socket.TCP_USER_TIMEOUT; import pipeoptim.train.node_link",
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS * 4,
    )
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DivergedError("the loss is nan"), DivergedError, "the loss is nan"),
        (KeyboardInterrupt(), AbortedError, "aborted by Ctrl-C"),
        (OSError(28, "No space left on device", "runs/x"), StageFailure, "no space left on device: runs/x"),
        (KeyError("weights"), StageFailure, "KeyError: 'weights'"),
        (StageFailure(), StageFailure, "StageFailure: no reason given"),
    ],
)
def test_every_error_is_told_in_words(error: BaseException, kind: type[PipeOptimError], text: str) -> None:
    heard = as_error(told(error))
    assert type(heard) is kind
    assert heard.args == (text,)
    if isinstance(heard, AbortedError):
        assert exit_code(heard.number) == 130
