"""Memory of every stage under every method, measured and compared with what is promised: weights, and activations between F and B.

All stages run in this process on the engine's own per-stage code. Activations of a stage are the storages that its forwards
received or made and that are still alive when an action is over, whoever holds them: they are found by watching every operation,
not computed from shapes. Not counted are single numbers such as losses, buffers of messages, gradients and the optimizer's state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.bench.live import LiveStorages
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.engine import Emulator
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.errors import ConfigError
from pipeoptim.methods import METHODS


def measure(
    depths: list[int] | None = None,
    methods: list[str] | None = None,
    microbatches: list[int] | None = None,
    width: int = 64,
    batch: int = 64,
    slack: float = 0.0,
) -> Record:
    """Measure every stage.

    Args:
        depths: numbers of stages.
        methods: names in ``METHODS``; by default all.
        microbatches: M; 0 stands for M = D.
        width, batch: of the layers and the mini-batch, a multiple of M.
        slack: x micro-batches more in flight per boundary; methods that refuse it are left out where ``methods`` names none.

    Returns:
        A row per method, depth, M and stage, in bytes: the most weights, and in the settings the most activations.

    Raises:
        ConfigError: a batch that M does not divide, a method that is not known, or one that is named and refuses slack.
    """
    rows = []
    for name in methods or METHODS:
        if name not in METHODS:
            raise ConfigError(f"method {name!r} is not known; methods: {', '.join(METHODS)}")
        for depth in depths or list(range(2, 9)):
            for m in sorted({m or depth for m in microbatches or [1, 0]}):
                if m >= depth or not METHODS[name].at_least_depth_microbatches:
                    try:
                        rows += _rows(name, depth, m, width, batch, slack)
                    except ConfigError:
                        if methods or not slack:
                            raise
    return Record("memory", "bytes", {"optimizer": "AdamW", "width": width, "rows per micro-batch": batch}, rows)


def _rows(name: str, depth: int, m: int, width: int, batch: int, slack: float) -> list[ResultRow]:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
    pipe = Emulator(stages, lambda p: torch.optim.AdamW(p, lr=1e-3), _loss, name, m, slack=slack)
    x, y = torch.randn(batch * m, width), torch.randn(batch * m, width)
    with LiveStorages() as live:
        watches = [StageWatch(live, pipe._worker(k), [x, y]) for k in range(depth)]
        # The very first shows whether modules change their inputs, which takes a copy.
        for minibatches in (1, 2 * pipe.program.in_flight(0) + 2):
            for watch in watches:
                watch.one = watch.activations = 0
            for _ in range(minibatches):
                pipe.step(x, target=y)
            pipe.drain()
    rows, after = [], f" slack {slack:g}" if slack else ""
    for k, (stage, watch) in enumerate(zip(stages, watches, strict=True)):
        own = sum(p.untyped_storage().nbytes() for p in stage.parameters())
        settings = {
            "method": name,
            "depth": depth,
            "microbatches": m,
            "stage": k,
            "slack": slack,
            "weights": own,
            "weight_copies_promised": pipe.weight_copies(k),
            "weight_copies": watch.weights / own,
            "activations": watch.activations,
            "activations_of_one": watch.one,
            "in_flight_promised": pipe.program.in_flight(k),
            "in_flight": watch.activations / watch.one,
        }
        rows.append(ResultRow(f"{name} D={depth} M={m}{after} stage {k}", [float(watch.weights)], settings))
    return rows


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """Not torch's mse_loss, whose result, one number, keeps the memory of all squares."""
    return (output - target).square().mean()


class StageWatch:
    """Looks at one stage after each of its actions.

    Attributes:
        one: bytes of activations after the first forward.
        weights, activations, total: the most so far; total of weights, gradients, the optimizer's state and activations together.
    """

    def __init__(self, live: LiveStorages, worker: StageWorker, batch: list[Tensor]) -> None:
        self.live, self.worker, self.batch = live, worker, batch
        self.weights = self.activations = self.one = self.total = 0
        forward, backward, finish = worker.forward, worker.backward, worker.finish_update
        worker.forward = self._in_forward(forward)  # type: ignore[method-assign]
        worker.backward = self._after(backward)  # type: ignore[method-assign]
        worker.finish_update = self._after(finish)  # type: ignore[method-assign]

    def _in_forward(self, forward: Any) -> Any:
        def watched(i: int, args: tuple[Any, ...], *rest: Any) -> Any:
            self.worker.prepare(i)  # predicted weights are no activations
            if self.worker.k > 0:  # the first stage's input is the user's own
                self.live.note(self.worker.k, [a for a in args if isinstance(a, Tensor)])
            self.live.owner = self.worker.k
            try:
                result = forward(i, args, *rest)
            finally:
                self.live.owner = None
            self._look()
            self.one = self.one or self._now()
            return result

        return watched

    def _after(self, action: Any) -> Any:
        def watched(*args: Any) -> Any:
            result = action(*args)
            self._look()
            return result

        return watched

    def _look(self) -> None:
        if self.live.owner is None:  # not in the middle of a forward
            activations, weights = self._now(), self.worker.weight_bytes()
            self.activations = max(self.activations, activations)
            self.weights = max(self.weights, weights)
            self.total = max(self.total, activations + weights + self._gradients_and_state())

    def _gradients_and_state(self) -> int:
        gradients = sum(p.grad.nbytes for p in self.worker.parameters if p.grad is not None)
        state = self.worker.optimizer.state.values() if self.worker.optimizer is not None else ()
        return gradients + sum(t.nbytes for own in state for t in own.values() if isinstance(t, Tensor) and t.dim())

    def _now(self) -> int:
        worker = self.worker
        copies = [tensor for copy in worker.weights._copies for tensor in copy.bases]
        return self.live.live(worker.k, [*self.batch, *worker.module.parameters(), *worker.module.buffers(), *copies], least=64)


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line per method, depth, M and slack, the stage with the most weights and all stages' activations."""
    head = [
        "method",
        "D",
        "M",
        "slack",
        "weights: most copies of a stage",
        "promised",
        "activations of stages 0 .. D-1, in micro-batches",
        "promised",
    ]
    groups: dict[tuple[str, int, int, float], list[dict[str, Any]]] = {}
    for row in record.rows:
        s = row.settings
        groups.setdefault((s["method"], s["depth"], s["microbatches"], s["slack"]), []).append(s)
    body = []
    for (name, depth, m, slack), stages in groups.items():
        cells = [name, str(depth), str(m), f"{slack:g}", f"{max(s['weight_copies'] for s in stages):.2f}"]
        cells.append(str(max(s["weight_copies_promised"] for s in stages)))
        cells.append(" ".join(f"{s['in_flight']:.3g}" for s in stages))
        body.append([*cells, " ".join(str(s["in_flight_promised"]) for s in stages)])
    return head, body
