"""The sections of a page, each a function that returns HTML. Every figure is read or computed; texts are escaped here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from pipeoptim.compare import facts
from pipeoptim.compare.outcome import Outcome
from pipeoptim.compare.report.series import Series
from pipeoptim.compare.summary import Comparison
from pipeoptim.compare.table import columns, setting, size
from pipeoptim.compare.table import notes as table_notes
from pipeoptim.config import TrainConfig
from pipeoptim.errors import counted
from pipeoptim.files import read_object
from pipeoptim.methods import get_method, refresh_every
from pipeoptim.schedule import Slack, slack_at_first, to_svg
from pipeoptim.telemetry.trace import merge_trace
from pipeoptim.train.change_method import with_method
from pipeoptim.train.rundir import RunDir

#: A schedule's drawing is not made smaller than this share of its size: its text has 11 pixels.
LEGIBLE = 0.8


def headline(comparison: Comparison) -> str:
    """What was compared, and the result in one sentence."""
    config = comparison.settings.config
    seeds = len(comparison.settings.seeds)
    return (
        f"<header><h1>{escape(config.recipe)}: {len(comparison.methods)} methods compared</h1>"
        f'<p class="lead">{escape(_result(comparison))}</p>'
        f"<p class=quiet>{escape(setting(config))}, {seeds} seed{'s' * (seeds != 1)} per method</p></header>"
    )


def _result(comparison: Comparison) -> str:
    """The best asynchronous method beside the synchronous one."""
    ended = [line for line in comparison.lines() if line.val_loss is not None]
    flushing = {line.method for line in ended if get_method(line.method).program(1, 1).flushes}
    losses = {line.method: line.val_loss.mean for line in ended if line.val_loss is not None}
    rest = {name: loss for name, loss in losses.items() if name not in flushing}
    parts = []
    if comparison.synchronous in losses:
        parts.append(
            f"Synchronous training ({comparison.synchronous}) ends at validation loss {losses[comparison.synchronous]:.4f}"
        )
    if rest:
        best = min(rest, key=lambda name: rest[name])
        others = f", the worst, {max(rest, key=lambda name: rest[name])}, at {max(rest.values()):.4f}" if len(rest) > 1 else ""
        parts.append(f"the best asynchronous method, {best}, ends at {rest[best]:.4f}{others}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else "No run has finished."


def run_headline(run: Outcome, config: TrainConfig) -> str:
    """What was trained, and how it ended."""
    figures = [f"train loss {run.train_loss:.4f}"] if run.train_loss is not None else []
    figures += [f"validation loss {run.val_loss:.4f}"] if run.val_loss is not None else []
    figures += [f"{name.removeprefix('val_')} {value:.4f}" for name, value in run.metrics.items()]
    ended = f"Step {run.steps:,} of {config.steps:,}" + (f": {', '.join(figures)}." if figures else ".")
    return (
        f"<header><h1>{escape(config.recipe)} with {escape(config.method)}</h1>"
        f'<p class="lead">{escape(ended)}{" " + escape(run.reason) if run.reason else ""}</p>'
        f"<p class=quiet>{escape(setting(config))}, seed {config.seed}, engine {escape(config.engine)}</p></header>"
    )


def charts(series: Sequence[Series], seeds: int = 1) -> str:
    """Two charts, the switches of the methods and axes, and what lies above the charts. The script draws them."""
    chips = "".join(
        f'<button type=button class=chip aria-pressed=true data-method="{escape(one.name)}">'
        f'<svg width=22 height=8 aria-hidden=true><line x1=0 y1=4 x2=22 y2=4 stroke="var({one.colour})" stroke-width=3 '
        f'stroke-dasharray="{one.dash}"/></svg>{escape(one.name)}</button>'
        for one in series
    )
    timed = any(one.seconds is not None for one in series)
    axis = (
        "<fieldset class=axis><legend>over</legend>"
        "<label><input type=radio name=axis value=steps checked> steps</label>"
        "<label><input type=radio name=axis value=seconds> seconds</label></fieldset>"
        if timed
        else ""
    )
    logs = (
        "<fieldset class=axis><legend>logarithmic</legend><label><input type=checkbox name=log-y> loss</label>"
        "<label><input type=checkbox name=log-x> steps</label></fieldset>"
    )
    points = max((len(line.x) for one in series for line in one.train), default=1)
    slider = (
        f"<label class=slider>smoothing <input type=range name=smoothing min=1 max={max(1, points // 4)} value=1>"
        "<output id=smoothed></output></label>"
        if points > 1
        else ""
    )
    hint = "Click a method to hide it, double-click to see it alone." if len(series) > 1 else ""
    band = " Bands reach from the lowest to the highest seed." if seeds > 1 else ""
    return (
        "<section><h2>Loss</h2>"
        f"<div class=switches>{f'<div class=chips>{chips}</div>' if len(series) > 1 else ''}"
        f"<div class=axes>{axis}{logs}{slider}</div></div>"
        "<div class=charts><figure><figcaption>Training</figcaption><div id=train class=chart></div>"
        "<p class=cut id=train-cut></p></figure>"
        "<figure><figcaption>Validation</figcaption><div id=validation class=chart></div>"
        "<p class=cut id=validation-cut></p></figure></div>"
        f"<p class=quiet>{hint}{band} A cross marks where a run was lost. The steep beginning may be above the top. Draw a frame "
        "with the mouse to look closer; a double click leads back, and another one shows all.</p></section>"
    )


def table(comparison: Comparison) -> str:
    """The table, a click on a heading sorts it."""
    found = columns(comparison)
    head = "".join(
        f'<th scope=col><button type=button title="{escape(c.meaning)}">{escape(c.heading)}</button></th>' for c in found
    )
    rows = []
    for line in comparison.lines():
        cells = []
        for n, column in enumerate(found):
            key = column.key(line)
            value = "" if key is None else f' data-key="{key!r}"'
            tag = "th scope=row" if n == 0 else "td"
            cells.append(f"<{tag}{value}>{escape(column.cell(line))}</{tag.split()[0]}>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    legend = "".join(f"<div><dt>{escape(c.heading)}</dt><dd>{escape(c.meaning)}</dd></div>" for c in found[1:] if c.meaning)
    return (
        "<section><h2>Figures</h2><div class=scroll tabindex=0 role=region aria-label=Figures><table class=sortable>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<details><summary>What the columns mean</summary><dl>{legend}</dl>"
        "<p class=quiet>± is the standard deviation over the seeds.</p></details></section>"
    )


def notes(comparison: Comparison) -> str:
    """The reservations that must accompany the figures."""
    items = "".join(f"<li>{escape(note)}</li>" for note in table_notes(comparison))
    return f"<section><h2>Notes</h2><ul class=notes>{items}</ul></section>" if items else ""


def methods(names: Sequence[str], config: TrainConfig, series: Sequence[Series]) -> str:
    """One drawing per schedule, and below it the methods that run it: how each works, and what follows from its table."""
    colours = {one.name: one.colour for one in series}
    groups: dict[str, list[str]] = {}
    for name in names:
        if facts.refusal(name, config.stages, config.microbatches, _slack(name, config)) is None:
            groups.setdefault(get_method(name).order, []).append(name)
    out = []
    for members in groups.values():
        slack = _slack(members[0], config)
        program = get_method(members[0]).program(config.stages, config.microbatches, slack=slack)
        drawing = to_svg(program, facts.minibatches(program), title=facts.order_name(program.order))
        items = "".join(_method(name, config, colours.get(name)) for name in members)
        out.append(
            f"<figure class=schedule><div class=scroll tabindex=0 role=region aria-label=Schedule>{_shrinking(drawing)}</div></figure>"
            f"<ul class=methods>{items}</ul>"
        )
    return f"<section><h2>How {'they work' if len(names) > 1 else 'it works'}</h2>{''.join(out)}</section>"


def _slack(name: str, config: TrainConfig) -> Slack:
    """0 for a method that flushes, which runs without."""
    return slack_at_first(with_method(config, name).slack)


def _shrinking(drawing: str) -> str:
    """An SVG that a narrower page makes smaller, as long as it stays legible; beyond that it scrolls."""

    def with_limit(tag: re.Match[str]) -> str:
        return f'{tag[1]} style="min-width:{LEGIBLE * float(tag[2]):.0f}px"'

    return re.sub(r'(<svg [^>]*? width="([\d.]+)")', with_limit, drawing, count=1)


def _method(name: str, config: TrainConfig, colour: str | None) -> str:
    method, own = get_method(name), with_method(config, name)
    refresh = refresh_every(own.prediction, own.refresh or None)
    found = facts.facts(name, config.stages, config.microbatches, _slack(name, config), refresh)
    dot = f'<i style="background:var({colour})"></i>' if colour else ""
    more = "".join(f"<p>{escape(text)}</p>" for text in (method.source, method.deviations) if text)
    return (
        f"<li><h3>{dot}{escape(name)}</h3><p>{escape(method.summary[:1].upper() + method.summary[1:])}.</p>"
        f"<p class=quiet>gap by stage {_numbers(found.gaps)}; copies of the weights {_numbers(found.copies)}; "
        f"idle in steady state {found.bubble:.0%}</p>"
        f"<details><summary>Source and deviations</summary>{more}</details></li>"
    )


def _numbers(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def sortable_heads(texts: Sequence[str]) -> str:
    """Of a table that a click sorts."""
    return "".join(f"<th scope=col><button type=button>{escape(text)}</button></th>" for text in texts)


def stages(path: Path) -> str:
    """What each stage of a run held."""
    if not (path / "result.json").exists():
        return ""
    rows = read_object(path / "result.json")["stages"]
    head = ("stage", "weights", "version gap", "copies", "weight memory", "updates")
    body = "".join(
        f"<tr><th scope=row>{row['stage']}</th><td>{row['parameters']:,}</td><td>{row['gap']}</td>"
        f"<td>{row['weight_copies']}</td><td>{size(row['weight_bytes'])}</td><td>{row['updates']:,}</td></tr>"
        for row in rows
    )
    cells = sortable_heads(head)
    return (
        "<section><h2>Stages</h2><div class=scroll tabindex=0 role=region aria-label=Stages>"
        f"<table class=sortable><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def trace(path: Path) -> str:
    """Where the time of a traced run went: shares by stage, and some mini-batches beside the ideal schedule."""
    folder = RunDir(path).trace
    if not (folder / "stage-0.json").exists():
        return ""
    merged = merge_trace(folder)
    names = {
        "compute": "computing",
        "communication": "messages",
        "waiting": "waiting",
        "turns": "other stages' turn",
        "other": "other work",
        "idle": "idle",
        "ideal_idle": "idle in the ideal schedule",
    }
    if not merged.emulated:
        del names["turns"]
    body = "".join(
        f"<tr><th scope=row>{one.stage}</th>{''.join(f'<td>{getattr(one, name):.1%}</td>' for name in names)}</tr>"
        for one in merged.shares
    )
    cells = sortable_heads(("stage", *names.values()))
    taking = "All stages ran in one process and took turns. " if merged.emulated else ""
    return (
        "<section><h2>Where the time went</h2><div class=scroll tabindex=0 role=region aria-label=Shares>"
        f"<table class=sortable><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p class=quiet>{taking}Idle is waiting and other work. In the ideal schedule the same actions take the median of "
        "their kind on their stage, and messages take no time.</p>"
        "<figure class=schedule><label class=slider>zoom <input type=range name=zoom min=1 max=10 step=0.25 value=1></label>"
        "<div class=scroll tabindex=0 role=region aria-label=Trace>"
        f"{_shrinking(merged.picture.read_text(encoding='utf-8'))}</div></figure>"
        f"<p class=quiet>All of it: open {escape(str(merged.path.relative_to(path)))} with https://ui.perfetto.dev.</p></section>"
    )


def setup(
    config: TrainConfig,
    machine: Mapping[str, Any],
    command: str,
    comparison: Comparison | None,
    versions: Mapping[str, str] | None = None,
    data: str = "",
) -> str:
    """Everything that is needed to reproduce it."""
    outcomes = comparison.outcomes if comparison else []
    data = data or next((o.data for o in outcomes if o.data), "")
    pairs = {
        "data": data,
        "optimizer": _component(asdict(config.optimizer)),
        "schedule": _component(asdict(config.lr_schedule)),
    }
    pairs |= {"prediction": config.prediction, "engine": config.engine}
    pairs |= {"seeds": ", ".join(map(str, comparison.settings.seeds))} if comparison else {"seed": str(config.seed)}
    if machine:
        gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
        pairs["hardware"] = f"{counted(machine['cores'], 'core')} of {machine['processor']}{gpus}; {machine['system']}"
    versions = versions or {key: machine[key] for key in ("pipeoptim", "torch", "python") if key in machine}
    pairs["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs.items() if v)
    told = f"<h3>Command</h3><pre>{escape(command)}</pre>" if command else ""
    whole = f"<details><summary>Whole configuration</summary><pre>{escape(config.to_json())}</pre></details>"
    return f"<section><h2>Set-up</h2><dl class=setup>{rows}</dl>{told}{whole}</section>"


def _component(data: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in data["options"].items())
    return f"{data['target']}({options})"
