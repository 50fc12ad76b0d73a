"""Which stages send from their device's memory and which copy to the host's first; the links themselves are in test_link."""

import pytest
import torch

from pipeoptim.engine.transport import backend
from pipeoptim.engine.transport.staged_link import SideStreams, side_streams


@pytest.mark.parametrize(
    ("backends", "device", "expected"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", True),
        ("cpu:gloo,cuda:gloo", "cuda", True),
        ("cpu:gloo,cuda:gloo", "xpu", True),  # which has no backend
        ("cpu:gloo,cuda:nccl", "cpu", True),
        ("cpu:gloo,cuda:nccl", "cuda", False),
        ("cuda:nccl", "cuda", False),
        ("cuda:nccl", "cpu", False),
        ("cpu:slow", "cpu", False),
        ("cpu:mpi,cuda:mpi", "cuda", False),
    ],
)
def test_what_goes_through_gloo(backends, device, expected, monkeypatch):
    monkeypatch.setattr(backend.dist, "get_backend_config", lambda: backends)
    assert backend.uses_gloo(device) is expected


def test_a_stage_on_a_cpu_copies_nothing_first():
    assert side_streams(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
def test_copies_to_and_from_a_device_wait_for_each_other_and_nobody_else():
    device = torch.accelerator.current_accelerator()
    streams = SideStreams(device)
    busy = torch.randn(3000, 3000, device=device)
    torch.accelerator.synchronize()
    for n in range(20):
        there, host, back = streams.empty(1 << 20), streams.pinned(1 << 20), streams.empty(1 << 20)
        free = streams.now()
        for _ in range(10):
            busy = torch.tanh(busy @ busy)
        there.fill_(n)
        out = streams.copy_out(host, there, streams.now())
        assert not out.query(), "the program waited for the device"
        out.synchronize()
        streams.compute_after(streams.copy_in(back, host, free))
        assert back.unique().tolist() == [n]
