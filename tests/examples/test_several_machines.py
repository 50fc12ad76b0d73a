"""The script of docs/multi_node.md: two agents of one node each, which go on from a checkpoint, bit for bit as one process would."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

import pipeoptim as po
from stage_processes import free_port

SCRIPT = Path(__file__).parents[2] / "examples/several_machines.py"


def emulated(example, steps):
    stages = [example.build_stage(k, 2) for k in range(2)]
    pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p, lr=1e-3), torch.nn.functional.mse_loss, microbatches=2)
    train(pipe, example, range(steps))
    return pipe


def train(pipe, example, steps):
    for step in steps:
        x, y = example.batch(step)
        pipe.step(x, target=y)
    pipe.drain()


def test_two_agents_go_on_from_a_checkpoint(tmp_path):
    spec = importlib.util.spec_from_file_location("several_machines", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    pipe = emulated(example, 6)
    po.save_sharded(pipe, tmp_path / "step-6")
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
    ]
    agent += ["--master-port", str(free_port()), "--node-rank"]
    environment = {**os.environ, "STEPS": "12", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [
        subprocess.Popen(
            [*agent, str(n), str(SCRIPT), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        ended = [one.communicate(timeout=150) for one in agents]
    finally:
        for one in agents:
            one.kill()
    assert [one.returncode for one in agents] == [0, 0], ended
    assert "step 12: loss" in ended[1][0] and "step" not in ended[0][0]
    other = emulated(example, 1)
    po.load_sharded(other, tmp_path / "step-12")
    train(pipe, example, range(6, 12))
    for k in range(2):
        pairs = zip(pipe.stage_module(k).parameters(), other.stage_module(k).parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
