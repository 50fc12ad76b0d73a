"""The example of a layout runs under torchrun and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples/data_parallel.py"


def test_two_pipelines_side_by_side():
    assert len(SCRIPT.read_text().splitlines()) < 80
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(SCRIPT)]
    env = {**os.environ, "STEPS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    assert "version gap of stage 0: 1" in done.stdout
