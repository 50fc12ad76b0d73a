"""A supervisor says who failed, and leaves nobody behind; its processes here are small programs that speak to it as stages do."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

import processes
from pipeoptim.train.signals import StopSignals
from pipeoptim.train.supervisor import Supervisor

SLEEPS_OR_FAILS = """
import os, time
print(os.getpid(), flush=True)
time.sleep(60 if os.environ["RANK"] == "0" else 0)
os._exit(3)
"""

#: Its image is stopped when it fails.
LEAVES_A_STOPPED_IMAGE = """
import os, signal, socket, struct
control = socket.socket(fileno=int(os.environ["PIPEOPTIM_CONTROL"]))
own, theirs = socket.socketpair()
socket.send_fds(control, [struct.pack("<cq", b"i", 0)], [theirs.fileno()])
theirs.close()
image = os.fork()
if not image:
    own.sendall(struct.pack("<cq", b"r", os.getpid()))
    own.recv(1)
    os._exit(0)
own.close()
print(image, flush=True)
assert control.recv(1) == b"s"
os.kill(image, signal.SIGSTOP)
os._exit(3)
"""


#: Stage 1 dies when all is written; its image, which does the last mini-batches again, would wait for stage 0, which ends well.
DIES_AFTER_THE_LAST_MEETING = """
import os, signal, socket, struct, time
woken = os.environ["WOKEN"]
if os.environ["RANK"] == "0":
    while not os.path.exists(woken):
        time.sleep(0.01)
    os._exit(0)
control = socket.socket(fileno=int(os.environ["PIPEOPTIM_CONTROL"]))
own, theirs = socket.socketpair()
socket.send_fds(control, [struct.pack("<cq", b"i", 0)], [theirs.fileno()])
theirs.close()
if not os.fork():
    own.sendall(struct.pack("<cq", b"r", os.getpid()))
    assert own.recv(17, socket.MSG_WAITALL)[:1] == b"t"
    open(woken, "w").close()
    time.sleep(100)
    os._exit(5)
own.close()
assert control.recv(1) == b"s"
os.kill(os.getpid(), signal.SIGKILL)
"""


def outputs(folder: Path, count: int) -> dict[int, str]:
    return {rank: str(folder / f"{rank}.out") for rank in range(count)}


def started(supervisor: Supervisor, script: str, outs: dict[int, str]) -> None:
    supervisor.start(["-c", script], {rank: {"RANK": str(rank)} for rank in outs}, outs, dict.fromkeys(outs, ""))


def told(path: str) -> int:
    """The process id in a file that is being written."""
    end = time.monotonic() + 20
    while not (text := Path(path).read_text()).endswith("\n"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return int(text)


def test_those_that_are_ended_with_one_that_failed_have_not_failed(tmp_path: Path) -> None:
    outs = outputs(tmp_path, 2)
    with Supervisor(["stage 0", "stage 1"], tmp_path / "processes.json") as supervisor:
        started(supervisor, SLEEPS_OR_FAILS, outs)
        sleeps = told(outs[0])
        assert supervisor.run(StopSignals((), 0)) == {1: 3}
    assert not processes.alive(sleeps)


def test_those_that_were_started_end_where_another_cannot_be(tmp_path: Path) -> None:
    outs = {0: str(tmp_path / "0.out"), 1: str(tmp_path / "missing" / "1.out")}
    first = list[int]()

    def supervise() -> None:
        with Supervisor(["stage 0", "stage 1"], tmp_path / "processes.json") as supervisor:
            try:
                started(supervisor, SLEEPS_OR_FAILS, outs)
            finally:
                first.append(told(outs[0]))

    with pytest.raises(FileNotFoundError):
        supervise()
    assert not processes.alive(first[0])


def test_an_image_that_is_stopped_ends_with_the_others(tmp_path: Path) -> None:
    outs = outputs(tmp_path, 1)

    def supervise() -> None:
        with Supervisor(["stage 0"], tmp_path / "processes.json") as supervisor:
            started(supervisor, LEAVES_A_STOPPED_IMAGE, outs)
            supervisor.run(StopSignals((), 0))

    thread = threading.Thread(target=supervise, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert not processes.alive(told(outs[0]))


def test_a_process_that_dies_when_all_is_written_has_ended_well_and_its_image_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WOKEN", str(tmp_path / "woken"))
    began = time.monotonic()
    with Supervisor(["stage 0", "stage 1"], tmp_path / "processes.json") as supervisor:
        started(supervisor, DIES_AFTER_THE_LAST_MEETING, outputs(tmp_path, 2))
        assert supervisor.run(StopSignals((), 0)) == {}
    assert (tmp_path / "woken").exists()
    assert time.monotonic() - began < 80  # the image would have slept for longer


def test_a_signal_that_comes_when_the_work_is_done_ends_nobody() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with StopSignals((signal.SIGUSR1,), 30.0) as stop:
            stop.ignore_from_now()
            signal.raise_signal(signal.SIGUSR1)
            assert not stop.wanted
        signal.raise_signal(signal.SIGUSR1)  # its default action would end this process
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
