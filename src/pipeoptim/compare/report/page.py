"""Assembles a page: sections, style and scripts in one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from pipeoptim.version import __version__

#: The browser itself refuses whatever this page might fetch.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(title: str, body: Sequence[str], data: dict[str, Any] | None) -> str:
    """A complete HTML document; ``data`` of its charts, None where it has none and needs no script."""
    static = files("pipeoptim.compare.report")
    style, chart, script = ((static / name).read_text(encoding="utf-8") for name in ("style.css", "chart.js", "script.js"))
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts = f"""<script type="application/json" id="data">{text}</script>
<script>{chart}</script>
<script>{script}</script>
"""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{"".join(body)}
<footer class="quiet">pipeoptim {escape(__version__)}. This page is complete: it fetches nothing.</footer>
</main>
{"" if data is None else scripts}</body>
</html>
"""
