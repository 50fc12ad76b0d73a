"""How wrong ``pipeoptim simulate`` is about machines that we never had: the measurements in the repository of vTrain.

git clone https://github.com/VIA-Research/vTrain && python benchmarks/outside.py vTrain     writes benchmarks/results/outside.json

Bang et al., "vTrain" (MICRO 2024, arXiv 2312.12391; MIT licence) published what an iteration of GPT models took under Megatron-DeepSpeed on
A100s: 1,440 points on one node and 109 on up to 64. Those with a pipeline are taken. Constants of the devices and links are fitted on one
half, drawn at random; the other half is predicted, by simulating the program of 1F1B with a flush on a profile made of them; then the
halves change places. All of it five times. vTrain's own errors, without fitting to whole iterations, are 8.37 % on one node and 14.73 % on
several.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.methods import get_method
from pipeoptim.simulate import Conditions, Profile, Scenario, simulate
from pipeoptim.simulate.profile import BlockProfile, LinkProfile, OptimizerProfile, PassCost

RESULTS = Path(__file__).parent / "results"
FILES = {"one node": "ground_truth_single.csv", "up to 64 nodes": "ground_truth_multi.csv"}
VTRAIN = {"one node": 0.0837, "up to 64 nodes": 0.1473}
REPEATS = 5
VOCABULARY = 51_200
BYTES = 2  # of a number

Row = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A measured iteration: mini-batch, rows of a micro-batch, sizes of the model, and how many ways each kind of parallelism goes."""

    batch: int
    rows: int
    width: int
    heads: int
    layers: int
    sequence: int
    tensor: int
    data: int
    stages: int
    seconds: float

    @property
    def microbatches(self) -> int:
        """Of a replica."""
        return self.batch // (self.rows * self.data)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.sequence

    @property
    def block_weights(self) -> float:
        """Numbers of a block on one device."""
        return 12 * self.width**2 / self.tensor

    @property
    def vocabulary_weights(self) -> float:
        """Of the embedding, and of the output as well."""
        return VOCABULARY * self.width / self.tensor


CONSTANTS = ("per FLOP", "per number", "per number of a part", "per score", "per block", "per reduced byte", "per reduction")
CONSTANTS += ("per logit", "per sent byte", "per message", "per averaged byte", "per weight", "per iteration")


def block(p: Point) -> Row:
    """How often each constant goes into F and B of a block: matrices, what is done number by number, attention, and tensor parallelism."""
    reduced = 4 * 2 * (p.tensor - 1) / p.tensor * p.tokens * p.width * BYTES
    flops = 3 * p.tokens * (24 * p.width**2 + 4 * p.width * p.sequence) / p.tensor
    numbers = p.tokens * p.width
    scores = p.rows * p.heads * p.sequence**2 / p.tensor
    return np.array([flops, numbers, numbers / p.tensor, scores, 1, reduced, 4.0 * (p.tensor > 1), 0, 0, 0, 0, 0, 0])


def logits(p: Point) -> Row:
    """The same of the output, which the last stage has besides its blocks."""
    found = np.zeros(len(CONSTANTS))
    found[[0, 4, 7]] = 6 * p.tokens * p.width * VOCABULARY / p.tensor, 1, p.tokens * VOCABULARY / p.tensor
    return found


def iteration(p: Point) -> Row:
    """The same of all: M - 1 micro-batches of the last stage, the way of one through all stages, averages, the update."""
    stage = p.layers / p.stages * block(p)
    found = (p.microbatches - 1) * (stage + logits(p)) + p.stages * stage + logits(p)
    weights = p.layers / p.stages * p.block_weights + p.vocabulary_weights
    messages = 2 * (p.microbatches - 1 + p.stages - 1)  # nothing else is in flight that would hide one
    found[8:10] += messages * p.tokens * p.width * BYTES, messages
    found[10:] += 2 * (p.data - 1) / p.data * weights * BYTES, weights, 1
    return found


def fitted(points: list[Point]) -> Row:
    """Constants of at least 0 with the least sum of squares of relative errors."""
    shares = np.array([iteration(p) / p.seconds for p in points])
    scale = np.maximum(shares.max(0), 1e-300)
    found: Row = nnls(shares / scale, np.ones(len(points)), maxiter=10_000)[0] / scale
    return found


def predicted(p: Point, constants: Row) -> float:
    """Seconds of an iteration, by simulation."""
    each, output = float(block(p) @ constants), float(logits(p) @ constants)
    sent = float(p.tokens * p.width * BYTES)

    def one(name: str, seconds: float, numbers: float) -> BlockProfile:
        return BlockProfile(name, (seconds / 3,), (2 * seconds / 3,), (sent,), (sent,), (0.0,), (0.0,), numbers * BYTES)

    blocks = [one(f"block {n}", each, p.block_weights) for n in range(p.layers)] + [one("output", output, p.vocabulary_weights)]
    no_pass = PassCost(0.0, 0.0)
    optimizer = OptimizerProfile("Adam", PassCost(constants[12], constants[11] / BYTES), no_pass, no_pass, 0.0)
    link = LinkProfile(constants[9], 1 / constants[8] if constants[8] else None)
    profile = Profile("gpt", False, p.batch, (p.rows,), tuple(blocks), optimizer, link)
    method, length = get_method("1f1b"), p.layers // p.stages
    lengths = (length,) * (p.stages - 1) + (length + 1,)
    average = LinkProfile(0.0, 1 / constants[10] if constants[10] else None)
    run = Scenario(
        profile,
        lengths,
        method,
        method.program(p.stages, p.microbatches),
        4,
        p.data,
        replica_link=average,
        conditions=Conditions(jitter=0.0),
    )
    return 1 / simulate(run).throughput.median


def read(path: Path) -> list[Point]:
    """The points of a file that have a pipeline."""
    names = ("global batch", "micro batch", "hidden size", "attention heads", "# layers", "sequence length")
    names += ("tensor parallelism", "data parallelism", "pipeline parallelism")
    with path.open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    points = [Point(*(int(row[name]) for name in names), float(row["iteration time (ms)"]) / 1e3) for row in rows]
    return [p for p in points if p.stages > 1 and p.layers % p.stages == 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a clone of the repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "outside.json")
    arguments = parser.parse_args()
    rows = []
    for name, file in FILES.items():
        points = read(arguments.folder / "data" / file)
        errors, means = [], []
        for seed in range(REPEATS):
            order = np.random.default_rng(seed).permutation(len(points))
            for known, others in (order[::2], order[1::2]), (order[1::2], order[::2]):
                constants = fitted([points[n] for n in known])
                found = [predicted(points[n], constants) / points[n].seconds - 1 for n in others]
                errors += [round(error, 5) for error in found] if seed == 0 else []
                means.append(round(float(np.mean(np.abs(found))), 5))
        print(
            f"{name}: {np.mean(means):.2%} of {len(points)} points, worst {np.max(np.abs(errors)):.1%}; halves: {means}",
            flush=True,
        )
        rows.append(ResultRow(name, errors, {"mean of each half": means, "vtrain": VTRAIN[name]}))
    Record("outside", "relative error", {"source": "github.com/VIA-Research/vTrain f8dda84"}, rows, {}).write(arguments.out)


if __name__ == "__main__":
    main()
