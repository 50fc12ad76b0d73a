"""What is to be paid for: a plan of ``pipeoptim plan``, carried out for so many samples."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.files import read_object
from pipeoptim.money.triangular import Triangular

FORMAT = 1

MOST_SECONDS = 3.2e10
"""Of a run: a thousand years."""


@dataclass(frozen=True)
class PricedRun:
    """A run that is planned.

    Attributes:
        model, method, stages, replicas: of the plan.
        samples: rows that it trains on.
        rows: of a mini-batch.
        seconds: of a mini-batch, from the simulation.
        idle: share of their time in which its devices wait, the mean over them.
        checkpoint_bytes: of weights and optimizer.
        sent_bytes: over each boundary between stages in a mini-batch.
    """

    model: str
    method: str
    stages: int
    replicas: int
    samples: Triangular
    rows: int
    seconds: Triangular
    idle: float
    checkpoint_bytes: float
    sent_bytes: tuple[float, ...]

    @property
    def devices(self) -> int:
        """All of them."""
        return self.stages * self.replicas

    @property
    def minibatches(self) -> Triangular:
        """That the samples make."""
        low, typical, high = (float(ceil(n / self.rows)) for n in (self.samples.low, self.samples.typical, self.samples.high))
        return Triangular(low, typical, high)


def read_plan(path: Path, samples: Triangular) -> PricedRun:
    """The plan in a file of ``pipeoptim plan --objective ... --out``, for so many samples.

    Raises:
        ConfigError: there is no such file, it is damaged, of another format, or holds a figure that cannot be.
    """
    if not 1 <= samples.low <= samples.high <= 1e18:
        raise ConfigError(f"samples is {samples.typical:g}, must be at least 1 and at most 1e18")
    try:
        data = read_object(path)
    except OSError as error:
        raise ConfigError(
            f"the plan {path} cannot be read ({error.strerror}); make it with pipeoptim plan --objective cost --out {path}"
        ) from error
    if data.get("format") != FORMAT or "plan" not in data:
        raise ConfigError(
            f"{path} is no plan of format {FORMAT} (it says {data.get('format')!r}); make it anew with pipeoptim plan --objective ... --out"
        )
    if isinstance(data["plan"], str):
        raise ConfigError(f"{path} is an estimate of the plan {data['plan']}, and no plan; give --plan {data['plan']}")
    try:
        found = _priced_run(data, samples)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(
            f"the plan {path} is damaged or of another version ({type(error).__name__}: {error}); make it anew with pipeoptim plan"
        ) from error
    seconds = found.minibatches.high * found.seconds.high
    if not 0 < seconds <= MOST_SECONDS:
        raise ConfigError(
            f"the run of {path} would take {seconds:g} s, must be above 0 and at most a thousand years; check --samples"
        )
    return found


def _priced_run(data: dict[str, Any], samples: Triangular) -> PricedRun:
    plan = data["plan"]
    run, sizes = plan["simulation"], plan["bytes"]
    rates = [_number(run["throughput"][name]) for name in ("high", "median", "low")]
    idle = [_number(stage["idle"], least=0.0, most=1.0) for stage in run["stages"]]
    if len(idle) != plan["stages"] or len(sizes["sent"]) != plan["stages"] - 1:
        raise ValueError(f"{plan['stages']} stages with figures of {len(idle)}")
    return PricedRun(
        model=str(data["model"]),
        method=str(plan["method"]),
        stages=_count(plan["stages"]),
        replicas=_count(plan["replicas"]),
        samples=samples,
        rows=_count(run["rows"]),
        seconds=Triangular(*(1 / rate for rate in rates)),
        idle=sum(idle) / len(idle),
        checkpoint_bytes=_number(sizes["weights"], least=0.0) + _number(sizes["state"], least=0.0),
        sent_bytes=tuple(_number(one, least=0.0) for one in sizes["sent"]),
    )


def _number(value: Any, least: float = 1e-30, most: float = 1e30) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{value!r} where a number from {least:g} to {most:g} must be")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
        raise ValueError(f"{value!r} where a whole number from 1 must be")
    return value
