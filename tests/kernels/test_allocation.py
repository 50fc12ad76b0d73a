"""Memory that a process frees stays with it, if it wants that and the user has not chosen otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from pipeoptim.cli.app import _run
from pipeoptim.compare import worker as comparison
from pipeoptim.kernels import allocation
from pipeoptim.train import worker

CODE = """
import resource, torch
from pipeoptim.kernels.allocation import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        parts = [torch.ones(1 << 20) for _ in range(20)] + [torch.ones(20 << 20)]  # 4 MB each, and 80 MB
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
usual = new_pages()
keep_freed_memory()
new_pages()
print(usual, new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_TOP_PAD_": "131072"}], ids=["default", "chosen by the user"])
def test_what_is_freed_is_kept_unless_the_user_chose_otherwise(chosen):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_") and key != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**environment, **chosen}, capture_output=True, text=True, timeout=120, check=True
    )
    usual, kept = map(int, done.stdout.split())
    assert (kept > usual / 2) if chosen else (kept < usual / 10), (usual, kept)


class Kept(Exception):
    pass


@pytest.mark.parametrize(
    "start",
    [lambda: _run(["plan"]), lambda: _run(["train"]), lambda: worker.main([], None), comparison.main],
    ids=["plan", "train", "worker", "comparison"],
)
def test_processes_of_our_own_that_measure_or_train_keep_it(start, monkeypatch):
    def kept():
        raise Kept

    monkeypatch.setattr(allocation, "keep_freed_memory", kept)
    with pytest.raises(Kept):
        start()
