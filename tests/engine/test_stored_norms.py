"""Norms that stages on several machines exchange through a store: in order, again for one that goes back, and no wait without end."""

from __future__ import annotations

import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from pipeoptim.engine.processes.loopback import loopback_store
from pipeoptim.engine.processes.nodes import Nodes
from pipeoptim.engine.processes.stored_norms import StoredNorms
from pipeoptim.errors import StageFailure


def ends(depth: int, kept: int = 8, timeout: float = 20.0, looks: list[int] | None = None) -> list[StoredNorms]:
    store = HashStore()
    seen = [] if looks is None else looks
    return [StoredNorms(store, k, depth, timeout, kept, lambda: seen.append(1)) for k in range(depth)]


def test_every_stage_reads_what_all_have_written_in_every_turn() -> None:
    looks: list[int] = []
    stages = ends(3, looks=looks)
    values = [0.0, -0.0, 1 / 3, math.inf, -math.inf, 5e-324, 1.7e308, math.nan]
    for turn in range(30):  # more than are kept
        told = [values[(turn + k) % len(values)] for k in range(3)]
        for stage, value in zip(stages, told, strict=True):
            stage.send(turn, value)
        for stage in stages:
            assert list(map(repr, stage.receive(turn))) == list(map(repr, told))
    assert not looks


def test_a_stage_that_goes_back_reads_the_same_again() -> None:
    first, second = ends(2)
    for turn in range(8):
        first.send(turn, turn / 3)
        second.send(turn, turn / 7)
    for turn in range(4, 8):
        second.send(turn, turn / 7)  # as it did before
        assert second.receive(turn) == [turn / 3, turn / 7]


def test_numbers_of_an_earlier_turn_in_the_same_place_are_none_and_others_are_looked_after_meanwhile() -> None:
    looks: list[int] = []
    first, second = ends(2, kept=2, looks=looks)
    first.send(0, 1.0)
    first.send(2, 3.0)
    second.send(0, 5.0)  # in the place of turn 2
    threading.Timer(0.2, second.send, (2, 7.0)).start()
    assert first.receive(2) == [3.0, 7.0]
    assert looks


def test_a_stage_that_writes_nothing_is_named() -> None:
    first, _, third = ends(3, timeout=0.05)
    first.send(0, 1.0)
    third.send(0, 1.0)
    with pytest.raises(StageFailure, match=r"stage 1 did not send the norm of its gradients within 0.05 s"):
        first.receive(0)


def test_a_wait_that_is_interrupted_ends() -> None:
    first, _ = ends(2)
    began = time.monotonic()
    threading.Timer(0.1, first.interrupt).start()
    with pytest.raises(StageFailure, match="the wait for the norm of stage 0 was interrupted"):
        first.receive(0)
    assert time.monotonic() - began < 15


def test_the_store_of_a_run_carries_them() -> None:
    store = loopback_store()
    first, second = (StoredNorms(store, k, 2, 20.0, 8, lambda: None) for k in range(2))
    first.send(0, 0.1)
    second.send(0, 0.2)
    assert first.receive(0) == second.receive(0) == [0.1, 0.2]


@given(st.integers(1, 5), st.integers(1, 6))
def test_nodes_hold_equally_many_stages_in_order(nodes: int, each: int) -> None:
    depth = nodes * each
    places = Nodes(tuple(f"10.0.0.{n}" for n in range(nodes)), depth)
    assert [places.node(k) for k in range(depth)] == [k // each for k in range(depth)]
    for k in range(1, depth):
        assert places.host(k, towards=k - 1) == ("" if k % each else f"10.0.0.{k // each}")


def test_without_a_word_of_the_supervisor_there_is_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPEOPTIM_NODES", raising=False)
    assert not Nodes.of_this_run(4).several
    monkeypatch.setenv("PIPEOPTIM_NODES", "10.0.0.1,10.0.0.2")
    assert Nodes.of_this_run(4).several
