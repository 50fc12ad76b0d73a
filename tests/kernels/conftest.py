"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeoptim.kernels import library


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a process that has not asked for kernels yet, with an empty cache and no compiler but the one that CC names."""
    for name in ("CC", "LOCAL_RANK", "PIPEOPTIM_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIPEOPTIM_CACHE", str(tmp_path / "cache"))
    library.loaded_library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.loaded_library.cache_clear()
