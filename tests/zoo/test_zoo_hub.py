"""Where the hub does not answer, its cache alone is asked, and what is not there is told in a sentence, in seconds."""

import socket
import time

import pytest

from pipeoptim.errors import ConfigError
from pipeoptim_zoo import hub

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def nobody():
    """The address of a server that does not run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_does_not_answer(nobody, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{nobody}")
    with hub.from_hub("source", "in-the-cache"):
        assert constants.HF_HUB_OFFLINE, "its cache alone"
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(
        ConfigError, match=f"source 'owner/name' is neither here nor in .*, which .*: no connection to {nobody} \\(.*; name a"
    ):
        with hub.from_hub("source", "owner/name"):
            raise OSError("not in the cache")
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(OSError, match="damaged"), hub.from_hub("source", tmp_path):
        raise OSError("damaged")  # what is here is not the hub's


def test_an_address_that_takes_long_to_find(monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    monkeypatch.setattr(hub.socket, "create_connection", lambda *_, **__: time.sleep(1) or socket.socket())
    assert hub._silence() == "no connection to huggingface.co:443 (no answer within 0.1 s)"


def test_a_proxy_is_asked_in_its_place(nobody, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{server.getsockname()[1]}")
        assert hub._silence() is None
        monkeypatch.setattr(hub, "proxy_bypass", lambda _: False)
        monkeypatch.setattr(hub, "getproxies", lambda: {"http": f"http://{nobody}"})
        assert "no connection to the proxy " + nobody in str(hub._silence())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub._silence() == "HF_HUB_OFFLINE is set"
