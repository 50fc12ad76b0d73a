"""Write every table in README.md and docs/ anew from the result files in benchmarks/results, and draw the schedules.

python benchmarks/render.py            writes them
python benchmarks/render.py --check    says whether they are up to date, and changes nothing
"""

import json
import re
import sys
from pathlib import Path

import render_learning
from draw_architecture import architecture_svg
from render_evidence import EVIDENCE, evidence_json

from pipeoptim.advise import to_mermaid
from pipeoptim.bench.plot import growth_bars, throughput_bars
from pipeoptim.bench.record import Record
from pipeoptim.bench.tables import render_document
from pipeoptim.partitioning import BlockCost, Partition
from pipeoptim.rules import KINDS, RULES, Rule
from pipeoptim.schedule import Program, to_svg

ROOT = Path(__file__).parents[1]


def tables(text: str) -> str:
    """What the code itself says: kinds of prediction, when each rule is exact, and the decision between methods."""
    kinds = ["| kind | what it computes | exact for | order in lr | order in s |", "|---|---|---|---|---|"]
    kinds += [
        f"| `{name}` | {_cell(k.formula)} | {_cell(k.exact)} | {k.lr_order} | {k.steps_order} |" for name, k in KINDS.items()
    ]
    rules = [
        "| optimizer | exact | `decayed` | `in_progress`: dry step; micro-batches to come | source |",
        "|---|---|---|---|---|",
    ]
    own = ("torch.optim", "pipeoptim.optim")
    for cls in sorted((c for c in RULES if c.__module__.startswith(own)), key=lambda c: c.__name__):
        rule = RULES[cls]
        cells = [cls.__name__, rule.exact, rule.no_decayed or "offered", _in_progress(rule), rule.source]
        rules.append(f"| {' | '.join(map(_cell, cells))} |")
    choice = ["```mermaid", to_mermaid(), "```"]
    for name, lines in (("kinds", kinds), ("rules", rules), ("choice", choice)):
        mark = re.compile(f"<!-- {name} -->\n.*?<!-- end of {name} -->", re.DOTALL)
        found = "\n".join([f"<!-- {name} -->", *lines, f"<!-- end of {name} -->"])
        text = mark.sub(lambda _, found=found: found, text)
    return text


def _in_progress(rule: Rule) -> str:
    """How a rule predicts from the mini-batch in progress."""
    step = "by rule" if rule.steps_dry else "the optimizer's step on copies"
    return f"{step}; {'its momentum, if any' if rule.keeps_momentum else 'the shrunk mean of those so far'}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def documents() -> dict[Path, str]:
    """Every rendered file and what it should hold."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {path: tables(render_document(path, ROOT)) for path in pages}
    texts = {path: render_learning.render(text) for path, text in texts.items()}
    texts[EVIDENCE] = evidence_json()
    texts[ROOT / "docs/async_1f1b.svg"] = to_svg(Program("async_1f1b", 4), 9, "PipeOptim: asynchronous 1F1B, no flush")
    texts[ROOT / "docs/slack.svg"] = to_svg(
        Program("async_1f1b", 4, slack=1), 11, "Slack 1: one more micro-batch in flight per boundary"
    )
    texts[ROOT / "docs/1f1b.svg"] = to_svg(
        Program("1f1b", 4, 4), 2, "1F1B with a flush after every mini-batch of 4 micro-batches"
    )
    texts[ROOT / "docs/architecture.svg"] = architecture_svg()
    stages = json.loads((ROOT / "benchmarks/results/partition_costs.json").read_text())
    stages["costs"] = [BlockCost(**cost) for cost in stages["costs"]]
    texts[ROOT / "docs/partition.svg"] = Partition([], **stages).to_svg()
    speed = Record.read(ROOT / "benchmarks/results/throughput.json")
    texts[ROOT / "docs/throughput.svg"] = throughput_bars(speed, "mlp", 64)
    texts[ROOT / "docs/scaling.svg"] = growth_bars(Record.read(ROOT / "benchmarks/results/scaling.json"), "D")
    return texts


def main() -> int:
    stale = {path: text for path, text in documents().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is not up to date; run python benchmarks/render.py")
        else:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return len(stale) if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
