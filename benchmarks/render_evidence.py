"""What `pipeoptim advise` cites, from the result files of comparisons and of the prototypes: src/pipeoptim/advise/evidence.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learning import CONTENDERS, RESULT, SEEDS, SETTINGS, Ledger
from render_learning import learned

from pipeoptim.methods import get_method

ROOT = Path(__file__).parents[1]
PROTOTYPES = ROOT / "benchmarks" / "results" / "prototypes.json"
EVIDENCE = ROOT / "src" / "pipeoptim" / "advise" / "evidence.json"
LEAST_GAP = 0.02
"""Smaller gaps between naive and synchronous training are of the size of differences between seeds."""


def evidence_json() -> str:
    """The text of the file; a row is an `Evidence`."""
    rows = [row for path in sorted(PROTOTYPES.parent.glob("compare-*.json")) for row in _compared(json.loads(path.read_text()))]
    rows += _learned()
    prototypes = json.loads(PROTOTYPES.read_text())["rows"]
    rows += [{"source": "a prototype, benchmarks/results/prototypes.json", **row} for row in prototypes]
    return "[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n"


def _learned() -> list[dict[str, Any]]:
    """The long runs: every contender whose seeds are all there, at its own learning rate."""
    ledger, rows = Ledger(RESULT), []
    for setting in {s.name: s for s in SETTINGS}.values():
        synchronous, naive = learned(ledger, setting, "1f1b"), learned(ledger, setting, "naive")
        if synchronous is None or naive is None:
            continue
        for name in setting.contenders:
            found, contender = learned(ledger, setting, name), CONTENDERS[name]
            if found is None or len(found.losses) < len(SEEDS) or "synchronous" in name:
                continue
            if get_method(contender.method).program(1, 1).flushes:
                continue
            rows.append(
                {
                    "source": f"{setting.task} in docs/results.md",
                    "depth": setting.depth,
                    "microbatches": setting.microbatches,
                    "optimizer": {"rotated": "rotated_adam"}.get(setting.optimizer, setting.optimizer),
                    "method": contender.method,
                    "prediction": contender.fields.get("prediction", "paper") if get_method(contender.method).predicts else "",
                    "seeds": len(found.losses),
                    "loss": round(found.mean, 4),
                    "synchronous": round(synchronous.mean, 4),
                    "without": round(naive.mean, 4),
                }
            )
    return rows


def _compared(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Every asynchronous line whose figures say something."""
    rows = []
    for comparison in data.get("comparisons", []):
        losses = {
            line["method"]: line["val_loss"]["mean"]
            for line in comparison["lines"]
            if line["val_loss"] and not line["diverged"]
        }
        if "naive" not in losses or "1f1b" not in losses or losses["naive"] - losses["1f1b"] < LEAST_GAP:
            continue
        for line in comparison["lines"]:
            if line["method"] not in losses or get_method(line["method"]).program(1, 1).flushes:
                continue
            rows.append(
                {
                    "source": f"{data['recipe']} in docs/results_short.md",
                    "depth": comparison["stages"],
                    "microbatches": comparison["microbatches"],
                    "optimizer": comparison["optimizer"],
                    "method": line["method"],
                    "prediction": (line.get("prediction") or data["prediction"]) if get_method(line["method"]).predicts else "",
                    "seeds": line["runs"],
                    "loss": round(losses[line["method"]], 4),
                    "synchronous": round(losses["1f1b"], 4),
                    "without": round(losses["naive"], 4),
                }
            )
    return rows
