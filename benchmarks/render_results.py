"""Write the tables, numbers and figure of docs/results_short.md anew from benchmarks/results/compare-*.json.

    python benchmarks/render_results.py            writes them
    python benchmarks/render_results.py --check    says whether the page is up to date, and changes nothing

The page is prose with marks. ``<!-- comparison: chars D4 M1 -->`` is followed by that table, and
``<!-- number: chars adamw D4 M1 pipeoptim share -->`` by one number (share, loss, lr, diverged or accuracy): no figure is
typed by hand. ``adamw/quarter`` is AdamW at a quarter of its best learning rate.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pipeoptim.methods import get_method

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results_short.md"
FIGURE = ROOT / "docs" / "results_short.svg"
NAMES = {"adamw": "AdamW", "sgd": "SGD with momentum", "rmsprop": "RMSprop"}

_TABLE = re.compile(r"(<!-- comparison: (?P<what>[^>]*?) -->\n).*?(\n<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"(<!-- number: (?P<what>[^>]*?) -->).*?(<!-- end -->)", re.DOTALL)
_ABOUT = re.compile(r"(<!-- about: (?P<what>[^>]*?) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def load() -> dict[str, dict[str, Any]]:
    """recipe -> its result file."""
    files = sorted(RESULTS.glob("compare-*.json"))
    return {data["recipe"]: data for data in (json.loads(file.read_text()) for file in files)}


def found(data: dict[str, Any], depth: int, m: int) -> dict[str, dict[str, Any]]:
    """Optimizer -> comparison, at one depth and number of micro-batches."""
    return {c["optimizer"]: c for c in data["comparisons"] if (c["stages"], c["microbatches"]) == (depth, m)}


def line(comparison: dict[str, Any], method: str) -> dict[str, Any] | None:
    return next((entry for entry in comparison["lines"] if entry["method"] == method), None)


def share(entry: dict[str, Any]) -> str:
    value = entry["share"]
    return "" if value is None else f"{100 * value:.0f} %" if value >= -1 else "below -100 %"


def loss(entry: dict[str, Any]) -> str:
    value = entry["val_loss"]
    if value is None or entry["diverged"]:
        return f"{entry['diverged']} of {entry['runs']} diverged"
    return f"{value['mean']:.3f} ±{value['deviation']:.3f}"


def is_synchronous(method: str) -> bool:
    return get_method(method).program(1, 1).flushes


def table(data: dict[str, Any], depth: int, m: int) -> str:
    """Final validation loss of each method under each optimizer, and the share of the gap that it closes."""
    comparisons = found(data, depth, m)
    methods = list(dict.fromkeys(entry["method"] for c in comparisons.values() for entry in c["lines"]))
    methods.sort(key=lambda name: not is_synchronous(name))
    best = {optimizer: lowest(c) for optimizer, c in comparisons.items()}
    head = [f"{NAMES.get(c['optimizer'], c['optimizer'])}, lr {c['lr']:g}" for c in comparisons.values()]
    rows = ["| method | copies | " + " | ".join(head) + " |", "|---|---|" + "---|" * len(head)]
    for method in methods:
        entries = {name: line(c, method) for name, c in comparisons.items()}
        copies = next(entry["weight_copies"] for entry in entries.values() if entry)
        cells = [cell(entry, best[name] == method) for name, entry in entries.items()]
        rows.append(f"| {method} | {copies} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def lowest(comparison: dict[str, Any]) -> str:
    """The best asynchronous method."""
    ended = [e for e in comparison["lines"] if e["val_loss"] and not e["diverged"] and not is_synchronous(e["method"])]
    return str(min(ended, key=lambda entry: entry["val_loss"]["mean"])["method"])


def cell(entry: dict[str, Any] | None, is_best: bool) -> str:
    if entry is None:
        return ""
    text = f"**{loss(entry)}**" if is_best else loss(entry)
    return (
        text
        if is_synchronous(entry["method"]) or entry["method"] == "naive" or not share(entry)
        else f"{text} ({share(entry)})"
    )


def number(everything: dict[str, dict[str, Any]], what: str) -> str:
    """One number in a sentence."""
    recipe, optimizer, depth, m, method, kind = what.split()
    comparison = found(everything[recipe], int(depth[1:]), int(m[1:]))[optimizer]
    entry = line(comparison, method)
    assert entry is not None, what
    if kind == "lr":
        return f"{comparison['lr']:g}"
    if kind == "diverged":
        return str(entry["diverged"])
    if kind == "share":
        return share(entry) or "none"
    value = entry["val_loss"] if kind == "loss" else entry["metrics"][kind]
    return f"{value['mean']:.3f}" if kind == "loss" else f"{100 * value['mean']:.1f} %"


def about(data: dict[str, Any]) -> str:
    """What was trained, with which learning rates, on what."""
    tried: dict[str, str] = {}
    for c in data["comparisons"]:
        values = ", ".join(
            f"{rate} ({value:.3f})" if value is not None else f"{rate} (diverged)" for rate, value in c["lr_tried"].items()
        )
        tried[c["optimizer"]] = f"{NAMES.get(c['optimizer'], c['optimizer'])}: {values}"
    machine = data["machine"]
    seeds = {c["seeds"] for c in data["comparisons"]}
    return (
        f"{data['about']} {data['steps']} updates of {data['batch_size']} samples, {' or '.join(map(str, sorted(seeds)))} seeds, "
        f"prediction `{data['prediction']}`. Learning rates tried, and the final validation loss of 1f1b with seed 0: "
        f"{'; '.join(tried.values())}. {machine['processor']}, torch {machine['torch']}, Python {machine['python']}, "
        f"pipeoptim {machine['pipeoptim']}."
    )


def render(text: str, everything: dict[str, dict[str, Any]]) -> str:
    """``text`` with everything behind its marks written anew."""

    def tables(match: re.Match[str]) -> str:
        recipe, depth, m = match["what"].split()
        return match[1] + table(everything[recipe], int(depth[1:]), int(m[1:])) + match[3]

    text = _TABLE.sub(tables, text)
    text = _NUMBER.sub(lambda match: match[1] + number(everything, match["what"]) + match[3], text)
    return _ABOUT.sub(lambda match: match[1] + about(everything[match["what"]]) + match[3], text)


def figure(everything: dict[str, dict[str, Any]]) -> None:
    """Final validation loss under AdamW: one panel per recipe, depth and regime, a dot per method, a bar over its seeds."""
    import matplotlib

    matplotlib.rcParams.update(
        {"svg.hashsalt": "pipeoptim", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    )
    from matplotlib.figure import Figure

    panels = [(4, 1), (4, 4), (8, 1), (8, 8)]
    canvas = Figure(figsize=(11, 3.1 * len(everything)), layout="constrained")
    axes = canvas.subplots(len(everything), len(panels), squeeze=False)
    for row, (recipe, data) in zip(axes, everything.items(), strict=True):
        order = [entry["method"] for entry in found(data, 4, 4)["adamw"]["lines"]][::-1]
        for ax, (depth, m) in zip(row, panels, strict=True):
            comparison = found(data, depth, m).get("adamw")
            if comparison is None:
                continue
            draw(ax, comparison, order, f"{recipe}, D = {depth}, M = {m}")
            ax.set_yticks(range(len(order)), [name.split("(")[0] for name in order] if ax is row[0] else [""] * len(order))
    canvas.savefig(FIGURE, metadata={"Date": None})
    FIGURE.write_text("\n".join(text.rstrip() for text in FIGURE.read_text().splitlines()) + "\n")


def draw(ax: Any, comparison: dict[str, Any], order: list[str], title: str) -> None:
    """One panel; the dashed line is the synchronous loss."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    base = line(comparison, "1f1b")
    assert base is not None
    ax.axvline(base["val_loss"]["mean"], color="0.5", linestyle="--", linewidth=1)
    for y, method in enumerate(order):
        entry = line(comparison, method)
        if entry is None or entry["val_loss"] is None:
            continue
        value = entry["val_loss"]
        colour = "0.35" if is_synchronous(method) else "tab:orange" if method.startswith("pipeoptim") else "tab:blue"
        ax.plot([value["low"], value["high"]], [y, y], color=colour, linewidth=2, alpha=0.4)
        ax.plot(value["mean"], y, "o", color=colour, markersize=5)
    ax.set_title(title, fontsize=9)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 3 * low else MaxNLocator(5))
    ax.xaxis.set_major_formatter("{x:.3g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="both", labelsize=7, rotation=45)
    ax.grid(axis="y", alpha=0.2)
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.spines[["top", "right"]].set_visible(False)


def main() -> int:
    everything = load()
    before = PAGE.read_text()
    after = render(before, everything)
    if "--check" in sys.argv:
        if after != before:
            print(f"{PAGE.relative_to(ROOT)} is not up to date; run python benchmarks/render_results.py")
        return int(after != before)
    PAGE.write_text(after)
    figure(everything)
    print(f"wrote {PAGE.relative_to(ROOT)} and {FIGURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
