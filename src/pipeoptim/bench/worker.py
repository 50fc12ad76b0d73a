"""One process of a benchmark (see :mod:`.processes`): joins the group, calls the function, writes what it returns."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pipeoptim.bench.slow import register


def main() -> None:
    """Carry out the job in the folder given as the only argument."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    if job["slow"]:
        register()
    dist.init_process_group("slow" if job["slow"] else "gloo")
    module, function = job["target"].split(":")
    result = getattr(importlib.import_module(module), function)(**job["options"])
    (folder / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
