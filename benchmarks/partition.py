"""Measure whether a partition keeps what it promises: its stages, each run on its own, beside the seconds that it predicted.

python benchmarks/partition.py    writes benchmarks/results/partition.json and the costs behind docs/partition.svg
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import pipeoptim as po
from pipeoptim.bench.record import Record, Row
from pipeoptim.partitioning import profile

RESULTS = Path(__file__).parent / "results"


def gpt2() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """A GPT-2 whose head is as heavy as several layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    config = GPT2Config(n_layer=8, n_embd=256, n_head=4, vocab_size=8192, n_positions=128, **off)
    return GPT2LMHeadModel(config), (torch.randint(8192, (8, 128)),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, args = gpt2()
    cut = po.partition(model, given.stages, args)
    rows = []
    for n in range(given.repeats):
        alone = profile(cut.stages, args, [str(k) for k in range(given.stages)], repeats=3)
        for k, cost in enumerate(alone):
            if n == 0:
                rows.append(Row(f"stage {k}, alone", [], {"predicted": cut.seconds[k] * 1e3, "blocks": cut.lengths[k]}))
            rows[k].samples.append(cost.seconds * 1e3)
    settings = {"model": "gpt2, 8 layers, width 256, vocabulary 8192", "batch": 8, "length": 128, "stages": given.stages}
    Record("partition", "ms", settings, rows).write(RESULTS / "partition.json")
    stages = {"lengths": cut.lengths, "seconds": cut.seconds, "memory_bytes": cut.memory_bytes}
    stages["costs"] = [asdict(cost) for cost in cut.costs]
    (RESULTS / "partition_costs.json").write_text(json.dumps(stages, indent=1) + "\n")
    print(cut.to_text())
    slowest = max(rows, key=lambda row: row.median)
    print(f"slowest stage: {slowest.median:.2f} ms alone, {max(cut.seconds) * 1e3:.2f} ms predicted")


if __name__ == "__main__":
    main()
