"""The sections of a plan's page: what it is, when its stages work, what they hold, and what else there would be. Texts are escaped here."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeoptim.errors import bytes_in_words, counted


def headline(plan: Mapping[str, Any], cost: Mapping[str, Any] | None) -> str:
    """What is planned, how fast it is, and the least that it costs."""
    best, run = plan["plan"], plan["plan"]["simulation"]
    rate = run["throughput"]["median"]
    told = [f"{1 / rate:.4g} s per mini-batch of {counted(run['rows'], 'row')}, {rate * run['rows']:.4g} rows/s."]
    if cost is not None:
        told.append(_cheapest(cost))
    source = "a transformer by formula: nothing of it is measured" if run["synthetic"] else f"the profile of {plan['model']}"
    devices = counted(best["devices"], "device")
    return (
        f"<header><h1>{escape(plan['model'])}: {escape(best['method'])} on {devices}</h1>"
        f"<p class=lead>{escape(' '.join(told))}</p>"
        f"<p class=quiet>Simulated from {escape(source)}. Nothing here was compared with GPUs, a cluster or an invoice.</p></header>"
    )


def known_totals(data: Mapping[str, Any]) -> dict[str, list[float]]:
    """Those of the places where the price of accelerators is known and the run ends."""
    totals = {name: place["total USD"] for name, place in data["places"].items()}
    return {name: found for name, found in totals.items() if found is not None and None not in found}


def _cheapest(cost: Mapping[str, Any]) -> str:
    totals = known_totals(cost)
    if not totals:
        return "No place is known where the run ends, and what accelerators cost there."
    name = min(totals, key=lambda one: totals[one][1])
    low, middle, high = (f"{value:,.0f}" for value in totals[name])
    rest = " and what is unknown" if cost["places"][name]["unknown"] else ""
    return f"{cost['run']['samples']['typical']:,.0f} samples cost least {name}: {middle} USD ({low} to {high}){rest}."


def plan(data: Mapping[str, Any]) -> str:
    """The plan in words, and the command that runs it."""
    best = data["plan"]
    rows = {
        "method": best["method"],
        "pipeline": f"{counted(best['stages'], 'stage')}, {counted(best['replicas'], 'replica')}",
        "blocks of each stage": ", ".join(map(str, best["cut"])),
        "mini-batch": f"{counted(best['microbatches'], 'micro-batch')}"
        + (f", slack {best['slack']:g}" if best["slack"] else ""),
        "recomputation": best["recompute"] or "none",
        "fullest device": bytes_in_words(best["bytes of the fullest device"]),
    }
    how = "" if best["runs as it is"] else "<p class=quiet>With a model and data of your own:</p>"
    told = best["findings"]
    if data["may gain"] is not None:
        told = [*told, f"The search ended before its end: another way may be better by up to {data['may gain']:.1%}."]
    findings = "".join(f"<li>{escape(one)}</li>" for one in told)
    return (
        f"<section><h2>Plan</h2><dl class=setup>{definitions(rows)}</dl><ul class=notes>{findings}</ul>"
        f"<h3>Command</h3>{how}<pre>{escape(best['command'])}</pre></section>"
    )


def definitions(rows: Mapping[str, str]) -> str:
    """Of a list of terms."""
    return "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in rows.items())


def timeline(data: Mapping[str, Any]) -> str:
    """Some mini-batches of the simulated run; as an image, in which nothing of a file from elsewhere can run."""
    drawing = data["plan"]["timeline"]
    if drawing is None:
        return "<section><h2>Simulated timeline</h2><p>Not drawn: too many stages or actions.</p></section>"
    picture = base64.b64encode(drawing.encode()).decode()
    return (
        "<section><h2>Simulated timeline</h2><figure class=schedule><div class=scroll tabindex=0 role=region aria-label=Timeline>"
        f'<img class=timeline alt="What each stage does when, in the simulated run and in the ideal schedule" '
        f'src="data:image/svg+xml;base64,{picture}"></div></figure></section>'
    )


def memory(data: Mapping[str, Any]) -> str:
    """What each stage holds at most, and what its time goes to."""
    stages = data["plan"]["simulation"]["stages"]
    most = max((one["memory"] or one["activations"] for one in stages), default=0.0) or 1.0
    body = "".join(_stage(one, most) for one in stages)
    head = ("stage", "blocks", "memory", "", "in flight", "gap", "copies", "busy", "waits")
    return (
        "<section><h2>Memory and time of each stage</h2>"
        "<p class=legend><span><i class=rest></i>weights, copies, gradient, optimizer</span>"
        "<span><i class=activations></i>activations in flight</span></p>"
        f"{table(head, body, 'Stages')}</section>"
    )


def _stage(one: Mapping[str, Any], most: float) -> str:
    held, waits = one["memory"], one["waits"]
    rest = max(0.0, (held or one["activations"]) - one["activations"])
    parts = bar([("rest", rest / most), ("activations", one["activations"] / most)])
    shares = {"activations": waits["activations"], "gradients": waits["gradients"], "replicas": waits["replicas"]}
    waiting = ", ".join(f"{share:.0%} for {what}" for what, share in shares.items() if share >= 0.005)
    cells = ["unknown" if held is None else bytes_in_words(held), parts, one["in_flight"], one["gap"], one["copies"] or "?"]
    cells += [f"{waits['busy']:.0%}", waiting or "none"]
    return f"<tr><th scope=row>{one['stage']}</th><td>{one['blocks']}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def alternatives(data: Mapping[str, Any]) -> str:
    """The nearest others, and what they would lose."""
    body = "".join(_alternative(name, one) for name, one in data["alternatives"].items())
    head = ("other", "loses", "method", "stages", "replicas", "M", "slack", "recomputation", "fullest device")
    return f"<section><h2>Alternatives</h2>{table(head, body, 'Alternatives')}</section>"


def _alternative(name: str, one: Mapping[str, Any] | None) -> str:
    if one is None:
        return (
            f"<tr><th scope=row>{escape(name)}</th><td colspan=8>none was asked for, fits, or was simulated in time</td></tr>"
        )
    cells = [f"{one['loss']:+.1%}", escape(one["method"]), one["stages"], one["replicas"], one["microbatches"]]
    cells += [f"{one['slack']:g}", escape(one["recompute"] or "none"), bytes_in_words(one["bytes of the fullest device"])]
    return f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def table(head: Sequence[str], body: str, label: str) -> str:
    """A table that scrolls where the screen is narrow."""
    cells = "".join(f"<th scope=col>{escape(text)}</th>" for text in head)
    return (
        f"<div class=scroll tabindex=0 role=region aria-label={label}><table><thead><tr>{cells}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def bar(parts: Sequence[tuple[str, float]]) -> str:
    """Pieces of a bar, each a class of the style sheet and its share of the width; an empty class is a gap."""
    pieces = "".join(f'<i class="{name}" style="width:{100 * share:.2f}%"></i>' for name, share in parts)
    return f'<span class=bar aria-hidden="true">{pieces}</span>'
