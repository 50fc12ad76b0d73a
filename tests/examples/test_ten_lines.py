"""The README's change of ten lines: both scripts run under torchrun, learn the same task, and differ as little as claimed."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEFORE, AFTER = ROOT / "examples/ten_lines_before.py", ROOT / "examples/ten_lines_after.py"


def torchrun(script, steps):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "STEPS": str(steps), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]


def test_both_scripts_run_and_learn():
    before, after = torchrun(BEFORE, 200), torchrun(AFTER, 200)
    assert len(before) == len(after) == 4
    assert before[-1] < 0.8 * before[0]
    assert after[-1] < 0.8 * after[0]
    assert abs(after[-1] / before[-1] - 1) < 0.05


def changed(text_before, text_after):
    body = [t[t.index("import os") :].splitlines() for t in (text_before, text_after)]
    lines = [d for d in difflib.ndiff(*body) if d[0] in "+-" and d[1:].strip()]
    return [d for d in lines if d[0] == "-"], [d for d in lines if d[0] == "+"]


def test_the_change_is_ten_lines():
    removed, added = changed(BEFORE.read_text(), AFTER.read_text())
    assert len(removed) <= 10
    assert len(added) <= 10
    assert not any("optimizer.step" in line for line in AFTER.read_text().splitlines())


def test_the_readme_shows_the_change():
    readme = (ROOT / "README.md").read_text()
    removed, added = changed(BEFORE.read_text(), AFTER.read_text())
    for line in removed + added:
        assert f"{line[0]} {line[1:].strip()}" in readme, f"README.md lacks {line!r}"
