"""The cost of a prediction relative to the step of its optimizer, for every rule: measured, and in passes over memory.

Both are bound by memory, so the figures are compared with the speed of a plain copy measured in the same
run. One pass reads or writes every weight once. The contenders take turns, repeat after repeat, on the same tensors; the
step that all are compared with is the fastest that torch has for this optimizer (fused, foreach or one by one). Each finds the same
in the caches, numbers that nobody needs and that are in memory already: else it would have to write back what the one before it left.

On a GPU the same is measured by the device's own events, and the prediction by other ways as well.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.optim import Optimizer

from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.bench.timer import WorkTimer, timer_of
from pipeoptim.errors import ConfigError
from pipeoptim.kernels import calls, triton_move
from pipeoptim.kernels.allocation import empty_like
from pipeoptim.kernels.library import available
from pipeoptim.rules import RULES, ClipEstimate, PartialGradient, Predictor
from pipeoptim.rules.entries import parameter_entries
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.rule_moves import predict_by_rule
from pipeoptim.weights import StorageLayout

STEPS = 3
FUSED = "fused step and"
IN_PROGRESS, CLIPPED = "predict in progress", "predict in progress, clipped"
IN_PROGRESS_TABLE = "in_progress"
"""Setting "table" of the rows of these two, which have a table of their own."""

DISPLACEMENT_PASSES = 5  # copy W before the step: 2; W_hat from both afterwards: 3


@dataclass(frozen=True)
class OptimizerSetting:
    """One optimizer with the options that are common in practice.

    Attributes:
        step: passes that its step needs at least: weights, gradient and states read, weights and states written.
        predict: passes of a prediction of its own: what it reads, and the result.
        fraction: of the number of weights asked for, where a step takes long.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    step: int = 7
    predict: int = 4
    fraction: float = 1.0

    @property
    def optimizer(self) -> type[Optimizer]:
        """The class."""
        cls: type[Optimizer] = getattr(torch.optim, self.name.split()[0])
        return cls

    @property
    def dry(self) -> int:
        """Passes of a dry step: what the step reads (weights, gradient, states), and the result; the step writes all but the gradient."""
        return (self.step + 3) // 2


SETTINGS = (
    OptimizerSetting("AdamW"),
    OptimizerSetting("Adam"),
    OptimizerSetting("SGD momentum", {"momentum": 0.9}, step=5, predict=3),
    OptimizerSetting("SGD", {}, step=3, predict=3),
    OptimizerSetting("SGD nesterov", {"momentum": 0.9, "nesterov": True}, step=5, predict=4),
    OptimizerSetting("NAdam", predict=5),
    OptimizerSetting("RAdam"),
    OptimizerSetting("Adamax"),
    OptimizerSetting("Adagrad", step=5),
    OptimizerSetting("Adadelta", predict=5),
    OptimizerSetting("RMSprop", step=5),
    OptimizerSetting("RMSprop momentum", {"momentum": 0.9}, predict=3),
    OptimizerSetting("Rprop", predict=5),
    OptimizerSetting("ASGD", step=4, predict=3),
    OptimizerSetting("Adafactor", step=3, predict=3),
    OptimizerSetting("Muon", step=5, predict=4, fraction=0.1),
)


def measure(
    weights: float = 100e6,
    threads: list[int] | None = None,
    repeats: int = 9,
    budget: float = 3.0,
    optimizers: list[str] | None = None,
    device: str = "cpu",
) -> Record:
    """Measure every rule, or some.

    Args:
        weights: how many, in the shapes of a GPT.
        threads: numbers of threads to measure with; by default 1 and all cores, for a GPU as many as there are now.
        repeats: turns per contender.
        budget: seconds per optimizer and number of threads, after which no more turns are taken (at least 3).
        optimizers: names of classes of ``torch.optim``; by default all that have a rule.
        device: "cpu", or a GPU.

    Raises:
        ConfigError: a name that is none of them, a device that is not there.
    """
    before = torch.get_num_threads()
    timer = timer_of(device)
    counts = threads or ([before] if timer.on_gpu else sorted({1, len(os.sched_getaffinity(0))}))
    rows: list[ResultRow] = []
    chosen = _settings(optimizers)
    try:
        copies = {}
        for count in counts:
            torch.set_num_threads(count)
            rows.append(_copy_row(int(weights), count, repeats, timer))
            copies[count] = rows[-1].settings["gigabytes_per_second"]
        for setting in chosen:
            bench = _Bench(setting, int(weights * setting.fraction), timer)
            for count in counts:
                torch.set_num_threads(count)
                rows += bench.rows(count, repeats, budget, copies[count])
    finally:
        torch.set_num_threads(before)
    settings = {"weights": weights, "steps": STEPS, "threads": counts, "kernels": available(), "repeats": repeats}
    if timer.on_gpu:
        settings |= {"device": device, "kernels": triton_move.available()}
    return Record("predict", "ms", settings, rows)


def _settings(optimizers: list[str] | None = None) -> list[OptimizerSetting]:
    """Every class that has a rule has a setting; those of the given classes."""
    covered = {setting.name.split()[0] for setting in SETTINGS}
    missing = {cls.__name__ for cls in RULES if cls.__module__.startswith("torch.optim")} - covered
    every = [*SETTINGS, *map(OptimizerSetting, sorted(missing))]
    if optimizers is None:
        return every
    names = {setting.name.split()[0].lower(): setting.name.split()[0] for setting in every}
    for wanted in optimizers:
        if wanted.lower() not in names:
            raise ConfigError(f"optimizer {wanted!r} is not measured here; choose of {', '.join(sorted(names.values()))}")
    return [setting for setting in every if setting.name.split()[0].lower() in {o.lower() for o in optimizers}]


def merged(old: Record, new: Record) -> Record:
    """The rows of ``new``, and those of ``old`` for what ``new`` did not measure: one table from several runs.

    Every ratio is of medians within one run all the same, for an optimizer's rows stay together.

    Raises:
        ConfigError: they were taken on different machines, versions or sizes.
    """
    if (old.machine, old.settings.get("weights"), old.benchmark) != (new.machine, new.settings["weights"], new.benchmark):
        raise ConfigError(
            "the figures in that file are of another machine, version or number of weights; write to another file"
        )
    if old.settings.get("device", "cpu") != new.settings.get("device", "cpu"):
        raise ConfigError(f"the figures in that file are of device {old.settings.get('device', 'cpu')}; write to another file")
    fresh = {_subject(row) for row in new.rows}
    rows = [row for row in old.rows if _subject(row) not in fresh] + new.rows
    order = {name: n for n, name in enumerate(dict.fromkeys([setting.name for setting in _settings()]))}
    rows.sort(key=lambda row: (order.get(row.settings.get("optimizer", ""), -1), row.settings["threads"]))
    counts = sorted({row.settings["threads"] for row in rows})
    return Record(new.benchmark, new.unit, {**new.settings, "threads": counts}, rows, new.machine)


def _subject(row: ResultRow) -> tuple[str, int]:
    """What is measured together; "" for the copy."""
    return row.settings.get("optimizer", ""), row.settings["threads"]


def shapes(weights: int, width: int = 768) -> list[tuple[int, ...]]:
    """Shapes of a GPT with about that many weights, a third of them in the embedding as in GPT-2.

    Example:
        >>> sum(torch.Size(s).numel() for s in shapes(100_000_000)) // 1_000_000
        97
    """
    found: list[tuple[int, ...]] = [(min(50257, max(1, weights // 3 // width)), width), (width,), (width,)]
    block: list[tuple[int, ...]] = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    size = sum(torch.Size(shape).numel() for shape in block)
    return found + block * max(1, round(weights * 2 / 3 / size))


Contenders = dict[str, tuple[int, Callable[[], Any]]]
"""What is measured: name -> passes of the model, and the work."""


class _Bench:
    """One optimizer on one set of weights, and the contenders."""

    def __init__(self, setting: OptimizerSetting, weights: int, timer: WorkTimer) -> None:
        self.setting, self.timer = setting, timer
        on = timer.device
        wanted = [shape for shape in shapes(weights) if setting.name != "Muon" or len(shape) == 2]
        if setting.name == "Muon":  # its cost is that of matrix products: a few square ones will do
            wanted = [(768, 768)] * max(1, weights // 768**2)
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.empty(shape, device=on).normal_(0, 0.02)) for shape in wanted]
        self._grads = [torch.empty_like(p).normal_(0, 0.02) for p in self.params]
        self._give_gradients()
        self.weights = sum(p.numel() for p in self.params)
        self.optimizer = setting.optimizer(self.params, **setting.options)  # type: ignore[call-arg]
        self.optimizer.step()
        self.variant = ""
        self.out = StorageLayout(self.params).copy().tensors
        self._noise = torch.zeros(timer.noise, device=on)

    def _fastest(self) -> str:
        """Which of torch's own ways to step is the fastest here; it stays switched on."""
        accepted = inspect.signature(self.setting.optimizer).parameters
        ways: dict[str, dict[str, Any]] = {"default": {}}
        if "fused" in accepted:
            ways["fused"] = {"fused": True, "foreach": False}
        if "foreach" in accepted:
            ways["foreach"] = {"fused": False, "foreach": True}
            ways["one by one"] = {"fused": False, "foreach": False}
        times: dict[str, float] = {}
        for turn in range(3 if self.setting.name != "Muon" else 1):
            for name, options in list(ways.items()):
                if turn and times[name] > 1.5 * min(times.values()):
                    continue  # no turn will make it the fastest
                try:
                    self._switch(options)
                except RuntimeError:  # torch has no such step for this device
                    del ways[name]
                    continue
                times[name] = min(times.get(name, math.inf), self.timer.seconds(self.optimizer.step))
        best = min(times, key=lambda name: times[name])
        self._switch(ways[best])
        return best

    def _switch(self, options: dict[str, Any]) -> None:
        for group in self.optimizer.param_groups:
            group.update({name: value for name, value in options.items() if name in group})
        if self.timer.on_gpu:  # where the step counts lie depends on the way to step
            self.optimizer.state.clear()
            self.optimizer.step()

    def contenders(self) -> Contenders:
        """Those that take turns."""
        step, own = self.setting.step, self.setting.predict
        rule = Predictor(self.optimizer, fused=False)
        moved = Predictor(self.optimizer, kind="displacement", fused=False)
        fused, moved_fused = Predictor(self.optimizer), Predictor(self.optimizer, kind="displacement")
        found: Contenders = {
            "step": (step, self.optimizer.step),
            "step, then predict": (step + own, lambda: self._both(rule)),
            "predict": (own, lambda: rule.predict_into(self.out, STEPS)),
            "step, displacement": (step + DISPLACEMENT_PASSES, lambda: self._both(moved)),
        }
        if fused.fuses and fused.fused_step(self.out, STEPS):
            found[f"{FUSED} predict"] = (step + 1, lambda: self._fused(fused))
            found[f"{FUSED} displacement"] = (step + 1, lambda: self._fused(moved_fused))
        dry = Predictor(self.optimizer, kind="in_progress")
        known = [PartialGradient(grad, 0.5) for grad in self._grads]
        found[IN_PROGRESS] = (self.setting.dry, lambda: dry.predict_into(self.out, 1, known))
        norm = self.setting.dry + (
            1 if self.setting.dry < 4 else 2
        )  # reads the gradient, and the mean of gradients where there is one
        found[CLIPPED] = (norm, lambda: dry.predict_into(self.out, 1, known, ClipEstimate(1.0)))
        if self.timer.on_gpu:
            found["predict, without Triton"] = (own, self._predict_by_foreach)
        return found

    @torch.no_grad()
    def _predict_by_foreach(self) -> None:
        horizon = Horizon(STEPS, next_rates(self.optimizer, None, STEPS))
        entries = parameter_entries(self.optimizer, "refined")
        predict_by_rule(entries, [p.grad for p in self.params], horizon, self.out, "foreach")

    def _give_gradients(self, own: bool = False) -> None:
        """The same in every turn; with ``own`` in memory that nobody else has, as a backward would leave them."""
        for p, grad in zip(self.params, self._grads, strict=True):
            p.grad = grad.clone() if own else grad

    def _fused(self, predictor: Predictor) -> None:
        """As an engine does with large stages."""
        if predictor.fused_step_over_gradients(STEPS) is None:
            predictor.fused_step(self.out, STEPS)

    def _both(self, predictor: Predictor) -> None:
        predictor.before_step(self.out)
        self.optimizer.step()
        predictor.after_step()
        predictor.predict_into(self.out, STEPS)

    def rows(self, threads: int, repeats: int, budget: float, copied: float) -> list[ResultRow]:
        """One row per contender, with its ratio to torch's step; ``copied`` GB/s is the speed of a copy in the same run."""
        self._give_gradients()  # the last contender of the turns before may have used them up
        self.variant = self._fastest()
        found = self.contenders()
        samples, queued = self._sampled(found, repeats, budget)
        if self.timer.on_gpu and self.variant == "fused":
            self._switch({"fused": False, "foreach": True})
            other = Predictor(self.optimizer, fused=False)
            other.after_step()
            more: Contenders = {
                "predict, counts on the host": (self.setting.predict, lambda: other.predict_into(self.out, STEPS))
            }
            more_samples, more_queued = self._sampled(more, repeats, budget)
            found, samples, queued = found | more, samples | more_samples, queued | more_queued
        base = median(samples["step"])
        rows = []
        for name, (passes, _) in found.items():
            middle = median(samples[name])
            settings = {
                "optimizer": self.setting.name,
                "what": name,
                "torch_step": self.variant,
                "threads": threads,
                "weights": self.weights,
                "passes": passes,
                "model_ratio": passes / self.setting.step,
                "ratio": middle / base,
                "gigabytes_per_second": 4e-6 * passes * self.weights / middle,
                "copy_gigabytes_per_second": copied,
            }
            if name in (IN_PROGRESS, CLIPPED):
                settings["table"] = IN_PROGRESS_TABLE
            if self.timer.on_gpu:
                settings["host_ms"], settings["late"] = queued[name]
            rows.append(ResultRow(f"{self.setting.name}, {name}, threads {threads}", samples[name], settings))
        return rows

    def _sampled(
        self, found: Contenders, repeats: int, budget: float
    ) -> tuple[dict[str, list[float]], dict[str, tuple[float, bool]]]:
        """Milliseconds of each in turn; and those of the host for the last call, and whether the device ever waited for it."""
        samples: dict[str, list[float]] = {name: [] for name in found}
        queued: dict[str, tuple[float, bool]] = dict.fromkeys(found, (0.0, False))
        if self.timer.on_gpu:
            for _, work in found.values():
                work()  # kernels are compiled at first use
        end = time.perf_counter() + budget
        first = samples[next(iter(found))]
        while len(first) < 3 or (len(first) < repeats and time.perf_counter() < end):
            for name, (_, work) in found.items():
                self._give_gradients(own=name.startswith(FUSED))
                self._noise.sum()
                samples[name].append(1e3 * self.timer.seconds(work))
                queued[name] = (1e3 * self.timer.host, queued[name][1] or self.timer.late)
        return samples, queued


def _copy_row(weights: int, threads: int, repeats: int, timer: WorkTimer) -> ResultRow:
    """A copy of as many weights, the faster of torch's and ours: two passes."""
    source = torch.zeros(weights, device=timer.device)
    target = empty_like(source).zero_()
    ways: list[Callable[[], Any]] = [lambda: target.copy_(source)]
    if available() and not timer.on_gpu:
        ways.append(lambda: calls.copy_tensors([source], [target]))
    samples = min(([1e3 * timer.seconds(way) for _ in range(repeats)] for way in ways), key=median)
    settings = {"what": "copy", "threads": threads, "weights": weights, "passes": 2}
    settings["gigabytes_per_second"] = round(8e-6 * weights / median(samples), 1)
    return ResultRow(f"copy, threads {threads}", samples, settings)


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: one line per optimizer and number of threads, ratios to torch's own fastest step."""
    if record.settings.get("table") == IN_PROGRESS_TABLE:
        return _dry_columns(record)
    if record.settings.get("device", "cpu") != "cpu":
        return _device_columns(record)
    head = ["optimizer", "threads", "million weights", "torch's step", "fused", "by passes", "step, then predict", "by passes"]
    head += ["displacement", "by passes", "prediction alone"]
    body = []
    for (name, threads), rows in _lines(record).items():
        step, alone = rows["step"], rows["predict"]
        cells = [name, str(threads), f"{step.settings['weights'] / 1e6:.0f}"]
        cells.append(f"{step.median:.3g} ms ({step.settings['torch_step']})")
        cells += _ratios(rows.get("fused step and predict")) + _ratios(rows["step, then predict"])
        displacement = min(
            (rows[w] for w in ("fused step and displacement", "step, displacement") if w in rows),
            key=lambda r: r.settings["ratio"],
        )
        cells += _ratios(displacement)
        body.append([*cells, _speed(alone)])
    return head, body


def _device_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Those of a GPU: the prediction alone by its kernel, by torch's operations, and with step counts that are not on the device."""
    head = ["optimizer", "million weights", "torch's step", "step, then predict", "by passes", "displacement", "by passes"]
    head += ["prediction alone", "host for it", "without Triton", "counts on the host"]
    body = []
    for (name, _), rows in _lines(record).items():
        step, alone = rows["step"], rows["predict"]
        cells = [name, f"{step.settings['weights'] / 1e6:.0f}", f"{step.median:.3g} ms ({step.settings['torch_step']})"]
        cells += _ratios(rows["step, then predict"]) + _ratios(rows["step, displacement"])
        cells += [_speed(alone), f"{alone.settings['host_ms']:.2g} ms"]
        others = (rows.get("predict, without Triton"), rows.get("predict, counts on the host"))
        body.append(cells + ["" if row is None else _speed(row) for row in others])
    return head, body


def _lines(record: Record) -> dict[tuple[str, int], dict[str, ResultRow]]:
    """Of each optimizer and number of threads what was measured."""
    lines: dict[tuple[str, int], dict[str, ResultRow]] = {}
    for row in record.rows:
        if row.settings["what"] != "copy":
            lines.setdefault((row.settings["optimizer"], row.settings["threads"]), {})[row.settings["what"]] = row
    return lines


def _speed(row: ResultRow) -> str:
    speed, copied = row.settings["gigabytes_per_second"], row.settings.get("copy_gigabytes_per_second")  # older files have none
    late = ", with waiting for Python" if row.settings.get("late") else ""
    return f"{speed:.0f} GB/s" + (f", {speed / copied:.0%} of a copy" if copied else "") + late


def _dry_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Those of dry steps: alone, and clipped by the norm of their estimates; ratios to torch's own fastest step."""
    head = ["optimizer", "threads", "million weights", "dry step", "by passes", "its speed", "clipped", "by passes"]
    body = []
    for (name, threads), rows in _lines(record).items():
        dry = rows[IN_PROGRESS]
        cells = [name, str(threads), f"{dry.settings['weights'] / 1e6:.0f}", *_ratios(dry), _speed(dry)]
        body.append(cells + _ratios(rows.get(CLIPPED)))
    return head, body


def _ratios(row: ResultRow | None) -> list[str]:
    if row is None:
        return ["", ""]
    return [f"{row.settings['ratio']:.2f}", f"{row.settings['model_ratio']:.2f}"]


__all__ = ["OptimizerSetting", "columns", "measure", "merged", "shapes"]
