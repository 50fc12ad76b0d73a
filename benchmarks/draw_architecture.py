"""The picture of docs/architecture.md: the files that one micro-batch passes on its stage, from `step` to the optimizer's kernel.

``python benchmarks/render.py`` writes it; tests/test_architecture.py checks the files against a step under a profiler.
"""

from __future__ import annotations

from html import escape

PATH = (
    "engine/pipeline.py",
    "engine/runner.py",
    "engine/stage/update.py",
    "weights/store.py",
    "rules/predictor.py",
    "rules/fused/step.py",
)
"""The calls between ``Schedule.step`` and the kernel, outermost first."""

KERNEL = "kernels/calls.py"

_INK, _QUIET, _MAIN, _SIDE = "#222222", "#666666", "#dbe7f3", "#f4f4f4"
_F, _B, _U = "#4c78a8", "#f58518", "#54a24b"
_WIDTH, _HEIGHT = 980, 560


def architecture_svg() -> str:
    """The whole picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        'aria-label="The files that a micro-batch passes, from step to the kernel" font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" markerUnits="userSpaceOnUse" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{_INK}"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        *_text(490, 20, "schedule.step(x, target=y)", anchor="middle", family="monospace"),
        *_arrow([(490, 26), (490, 42)]),
    ]
    parts += _box(
        180, 44, 620, 52, PATH[0], "splits the mini-batch; runs the actions that the program lists: F3 B2 U2", number=1
    )
    parts += _arrow([(490, 96), (490, 122)])
    parts += _text(500, 113, "one action of one stage", colour=_QUIET)
    parts += _box(180, 124, 620, 66, PATH[1], "receives, lets the stage compute, sends", number=2)
    parts += _neighbours()
    parts += _arrow([(385, 190), (385, 212)])
    parts += _arrow([(701, 190), (701, 212)], _U)
    parts += _box(180, 214, 410, 52, "engine/stage/worker.py", "the numerics of the stage")
    parts += _box(602, 214, 198, 52, PATH[2], "completes the gradients", number=3)
    for x, letter, what, colour in ((280, "F", "forward", _F), (490, "B", "backward", _B), (700, "U", "update", _U)):
        parts += _arrow([(x, 266), (x, 304)], colour)
        parts += _text(x + 10, 289, f"{letter}: {what}", colour=colour, bold=True)
    parts += _forward(182) + _backward(392) + _update(602)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _neighbours() -> list[str]:
    parts: list[str] = []
    for x, name in ((8, "stage k-1"), (872, "stage k+1")):
        parts.append(
            f'<rect x="{x}" y="124" width="100" height="66" rx="4" fill="none" stroke="{_QUIET}" stroke-dasharray="4 3"/>'
        )
        parts += _text(x + 50, 161, name, anchor="middle", colour=_QUIET)
    for left, right in ((108, 180), (800, 872)):
        parts += _arrow([(left, 143), (right, 143)], _F)
        parts += _arrow([(right, 171), (left, 171)], _B)
        middle = (left + right) / 2
        parts += _text(middle, 138, "activation", anchor="middle", colour=_F, size=11)
        parts += _text(middle, 185, "gradient", anchor="middle", colour=_B, size=11)
    parts += _text(8, 208, "engine/transport/link.py", colour=_QUIET, family="monospace", size=11)
    return parts


def _forward(x: int) -> list[str]:
    return [
        *_box(x, 306, 196, 52, "weights/sources.py", "predicted, latest or stashed?", side=True),
        *_arrow([(x + 98, 358), (x + 98, 374)], _F),
        *_box(x, 376, 196, 52, "weights/swap.py", "puts them into the module", side=True),
        *_arrow([(x + 98, 428), (x + 98, 444)], _F),
        *_box(x, 446, 196, 52, "weights/saved.py", "records what autograd saves", side=True),
    ]


def _backward(x: int) -> list[str]:
    return [
        *_box(x, 306, 196, 52, "weights/sources.py", "latest or stashed?", side=True),
        *_arrow([(x + 98, 358), (x + 98, 444)], _B),
        *_box(x, 446, 196, 52, "weights/saved.py", "looks it up in those weights", side=True),
    ]


def _update(x: int) -> list[str]:
    rows = (
        (PATH[3], "memory for the prediction", 4),
        (PATH[4], "learning rates, gap", 5),
        (PATH[5], "which tensors, which numbers", 6),
    )
    parts: list[str] = []
    for n, (file, what, number) in enumerate(rows):
        y = 306 + 62 * n
        parts += _box(x, y, 196, 46, file, what, number)
        parts += _arrow([(x + 98, y + 46), (x + 98, y + 60)], _U)
    parts += _box(x, 492, 196, 46, KERNEL, "optim.c: step and prediction")
    return parts


def _box(x: float, y: float, w: float, h: float, file: str, what: str, number: int = 0, side: bool = False) -> list[str]:
    fill, stroke = (_SIDE, "#bbbbbb") if side else (_MAIN, "#8aa4bf")
    parts = [f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="{stroke}"/>']
    middle = y + h / 2
    parts += _text(x + w / 2, middle - 4, file, anchor="middle", family="monospace", bold=not side)
    parts += _text(x + w / 2, middle + 14, what, anchor="middle", colour=_QUIET, size=11)
    if number:
        parts.append(f'<circle cx="{x}" cy="{middle}" r="10" fill="{_INK}"/>')
        parts += _text(x, middle + 4, str(number), anchor="middle", colour="#ffffff", bold=True)
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    colour: str = _INK,
    family: str = "sans-serif",
    size: int = 12,
    bold: bool = False,
) -> list[str]:
    weight = ' font-weight="bold"' if bold else ""
    return [
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-family="{family}" font-size="{size}" fill="{colour}"{weight}>'
        f"{escape(text)}</text>"
    ]


def _arrow(points: list[tuple[float, float]], colour: str = _INK) -> list[str]:
    line = " ".join(f"{x:g},{y:g}" for x, y in points)
    return [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#tip)"/>']
