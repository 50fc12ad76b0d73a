"""Measure whether a partition keeps what it promises: the slowest stage, run on its own, beside the optimum predicted, and beside
the slowest stage of every cut that has one border moved by a block.

python benchmarks/partition.py gpt2        adds that model to benchmarks/results/partition.json; then resnet101, gnmt8
python benchmarks/partition.py gnmt8 --memory returned

Profiles and stages take turns, since a machine is not equally fast all day. With ``--memory kept`` glibc gives no memory back to the
system (the script starts itself again with the environment for that): else a mini-batch pays for the pages that the last one gave
back, which costs more at some times than at others. ``returned`` is glibc's own way.
"""

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from torch.utils._pytree import tree_map

import pipeoptim as po
from pipeoptim.bench.record import Record, ResultRow, merged
from pipeoptim.engine.transport.pytree import as_args, differentiable
from pipeoptim.partitioning import BlockCost

RESULTS = Path(__file__).parent / "results"
KEPT = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
Range = tuple[int, int]


def gpt2() -> tuple[nn.Module, tuple[Any, ...], str]:
    """Of Hugging Face, with a head that costs as much as several layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    config = GPT2Config(n_layer=8, n_embd=256, n_head=4, vocab_size=8192, n_positions=128, **off)
    return GPT2LMHeadModel(config), (torch.randint(8192, (8, 128)),), "8 layers, width 256, vocabulary 8192, 8 x 128 tokens"


def resnet101() -> tuple[nn.Module, tuple[Any, ...], str]:
    """An ``nn.Sequential`` of 34 blocks."""
    from pipeoptim_zoo.models.resnet import resnet101 as build

    return build(32, 100, 0.5), (torch.randn(16, 3, 32, 32),), "half the channels, 16 images of 32 x 32"


def gnmt8() -> tuple[nn.Module, tuple[Any, ...], str]:
    """Blocks that hand on several tensors."""
    from pipeoptim_zoo.models.gnmt import gnmt8 as build

    return build(2000, 24, 256, dropout=0.0), (torch.randint(1, 2000, (32, 48)),), "width 256, vocabulary 2000, 32 x 48 tokens"


MODELS = {model.__name__: model for model in (gpt2, resnet101, gnmt8)}


class Bench:
    """Stages of one model by their range of blocks, with what they receive, and the milliseconds that they took."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], costs: list[BlockCost]) -> None:
        self.model, self.args, self.costs = model, args, costs
        self.stages: dict[Range, tuple[nn.Module, Any]] = {}
        self.samples: dict[Range, list[float]] = {}

    def add(self, lengths: list[int]) -> list[Range]:
        """The ranges of a cut, each ready to be measured."""
        ends = list(accumulate(lengths))
        cut = po.partition(self.model, len(lengths), self.args, costs=self.costs, pins=ends[:-1])
        ranges, value = list(pairwise([0, *ends])), self.args
        for where, stage in zip(ranges, cut.stages, strict=True):
            self.stages.setdefault(where, (stage, value))
            value = tree_map(_cut_off, as_args(stage(*value)))
        return ranges

    def measure(self) -> None:
        """One more sample of every stage: the median of three mini-batches after one that does not count."""
        for where, (stage, value) in self.stages.items():
            took = [_minibatch(stage, value) for _ in range(4)]
            self.samples.setdefault(where, []).append(1e3 * median(took[1:]))

    def slowest(self, ranges: list[Range]) -> list[float]:
        """Of a cut, per sample."""
        return [max(each) for each in zip(*(self.samples[where] for where in ranges), strict=True)]


def _cut_off(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _minibatch(stage: nn.Module, value: Any) -> float:
    """Seconds of F and B."""
    stage.zero_grad(set_to_none=True)
    args = tree_map(_cut_off, value)
    start = time.perf_counter()
    out = stage(*args)
    middle = time.perf_counter()
    roots = differentiable(as_args(out))
    gradients = [torch.ones_like(root) for root in roots]
    turn = time.perf_counter()
    torch.autograd.backward(roots, gradients)
    return middle - start + time.perf_counter() - turn


def neighbours(lengths: list[int]) -> list[list[int]]:
    """Cuts with one border moved by a block."""
    found = []
    for border in range(len(lengths) - 1):
        for by in (1, -1):
            moved = list(lengths)
            moved[border] += by
            moved[border + 1] -= by
            found += [moved] if min(moved) > 0 else []
    return found


def run(name: str, memory: str, repeats: int, moved: bool) -> list[ResultRow]:
    """One row per depth."""
    model, args, what = MODELS[name]()
    costs = po.partition(model, 2, args).costs
    bench, depths = Bench(model, args, costs), (2, 3, 4)
    cuts = {depth: po.partition(model, depth, args, costs=costs).lengths for depth in depths}
    others = {depth: neighbours(cuts[depth]) if moved else [] for depth in depths}
    ranges = {tuple(lengths): bench.add(lengths) for depth in depths for lengths in (cuts[depth], *others[depth])}
    optima: dict[int, list[float]] = {depth: [] for depth in depths}
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        now = po.partition(model, 2, args).costs
        for depth in depths:
            optima[depth].append(1e3 * max(po.partition(model, depth, args, costs=now).seconds))
        bench.measure()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    rows = []
    for depth in depths:
        own = ranges[tuple(cuts[depth])]
        settings = {
            "model": name,
            "what": what,
            "memory": memory,
            "stages": depth,
            "lengths": cuts[depth],
            "page_faults": faults,
        }
        settings["predicted"] = optima[depth]
        settings["each"] = [bench.samples[where] for where in own]
        settings["moved"] = {"-".join(map(str, other)): bench.slowest(ranges[tuple(other)]) for other in others[depth]}
        title = f"{name}, {depth} stages" + ("" if memory == "kept" else ", memory returned")
        rows.append(ResultRow(title, bench.slowest(own), settings))
    if (name, memory) == ("gpt2", "kept"):
        picture(po.partition(model, depths[-1], args, costs=costs))
    return rows


def picture(cut: po.Partition) -> None:
    """The costs behind docs/partition.svg."""
    stages = {"lengths": cut.lengths, "seconds": cut.seconds, "memory_bytes": cut.memory_bytes}
    stages["costs"] = [asdict(cost) for cost in cut.costs]
    (RESULTS / "partition_costs.json").write_text(json.dumps(stages, indent=1) + "\n")
    print(cut.to_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--memory", choices=("kept", "returned"), default="kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-neighbours", action="store_true")
    given = parser.parse_args()
    if given.memory == "kept" and any(os.environ.get(key) != value for key, value in KEPT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = run(given.model, given.memory, given.repeats, not given.no_neighbours)
    record = Record("partition", "ms", {"threads": 1}, rows)
    path = RESULTS / "partition.json"
    record = merged(Record.read(path), record) if path.exists() else record
    print(f"written to {record.write(path)}")
    for row in rows:
        ratios = [a / b for a, b in zip(row.samples, row.settings["predicted"], strict=True)]
        print(
            f"{row.name:40} {row.median:7.1f} ms, {median(ratios):.3f} of the optimum predicted", [f"{r:.2f}" for r in ratios]
        )
        for other, samples in row.settings["moved"].items():
            print(f"    {other:12} {median(a / b for a, b in zip(samples, row.samples, strict=True)):.3f} times as slow")


if __name__ == "__main__":
    main()
