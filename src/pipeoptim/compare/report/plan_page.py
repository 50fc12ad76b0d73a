"""One page for a plan: what it is, its simulated timeline, the memory of its stages, alternatives, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeoptim.compare.folder import write_text
from pipeoptim.compare.report import cost_sections, plan_sections
from pipeoptim.compare.report.page import page
from pipeoptim.errors import ConfigError
from pipeoptim.files import cause_of, read_object, reading


def write_plan_report(path: Path, cost: Path | None = None) -> Path:
    """The page of the plan in ``path``, beside it.

    Args:
        path: a file of ``pipeoptim plan --objective ... --out``.
        cost: a file of ``pipeoptim cost --out`` for that plan.

    Raises:
        ConfigError: a file is none of these, damaged, or of another plan.
    """
    plan = _read(path, "plan", "pipeoptim plan --objective ... --out")
    money = None if cost is None else _read(cost, "places", "pipeoptim cost --out")
    if money is not None and cost is not None:
        with reading(cost):
            _check_same(plan, money, path, cost)
    with reading(path):
        body = [plan_sections.headline(plan, money), plan_sections.plan(plan), plan_sections.timeline(plan)]
        body += [plan_sections.memory(plan), plan_sections.alternatives(plan)]
    if money is not None and cost is not None:
        with reading(cost):
            body += [
                part(money) for part in (cost_sections.cost, cost_sections.totals, cost_sections.hangs_on, cost_sections.terms)
            ]
    out = path.with_suffix(".html")
    write_text(out, page(f"{plan['model']}: plan", body, None))
    return out


def _read(path: Path, has: str, how: str) -> dict[str, Any]:
    try:
        data = read_object(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({cause_of(error)}); make it with {how} {path}") from error
    if data.get("format") != 1 or not isinstance(data.get(has), dict):
        raise ConfigError(f"{path} is no file of {how}; make it anew")
    return data


def _check_same(plan: dict[str, Any], money: dict[str, Any], path: Path, cost: Path) -> None:
    """Raises ConfigError where the estimate is of another plan."""
    ours = (plan["model"], *(plan["plan"][name] for name in ("method", "stages", "replicas")))
    theirs = tuple(money["run"][name] for name in ("model", "method", "stages", "replicas"))
    if ours != theirs:
        raise ConfigError(
            f"{cost} is an estimate for {theirs[0]} with {theirs[1]} on {theirs[2]} x {theirs[3]} devices, {path} a plan for {ours[0]} "
            f"with {ours[1]} on {ours[2]} x {ours[3]}; make it anew with pipeoptim cost --plan {path}"
        )
