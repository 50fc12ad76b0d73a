"""The pictures of docs/gallery.md, by the lines of the page itself: each block of code leaves its picture as ``figure``.

python benchmarks/draw_gallery.py [words of the names of some pictures]
"""

from __future__ import annotations

import re
import sys
from io import StringIO
from pathlib import Path

import matplotlib

DOCS = Path(__file__).parents[1] / "docs"
PART = re.compile(r"!\[[^]]*\]\((gallery_\w+\.svg)\)\n\n```python\n(.*?)```", re.DOTALL)
matplotlib.rcParams.update({"svg.hashsalt": "gallery", "axes.grid": True, "grid.alpha": 0.3, "savefig.facecolor": "white"})


def main() -> None:
    for name, code in PART.findall((DOCS / "gallery.md").read_text()):
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        made: dict[str, object] = {}
        exec(compile(code, name, "exec"), made)
        (DOCS / name).write_text(as_svg(made["figure"]))
        print(name)


def as_svg(figure: object) -> str:
    if isinstance(figure, str):
        return figure
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    main()
