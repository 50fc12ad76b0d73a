"""Write every table in README.md and docs/ anew from the result files in benchmarks/results, and draw the schedules.

python benchmarks/render.py            writes them
python benchmarks/render.py --check    says whether they are up to date, and changes nothing
"""

import sys
from pathlib import Path

from pipeoptim.bench.tables import render_document
from pipeoptim.schedule import Program, to_svg

ROOT = Path(__file__).parents[1]


def documents() -> dict[Path, str]:
    """Every rendered file and what it should hold."""
    texts = {path: render_document(path, ROOT) for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
    texts[ROOT / "docs/async_1f1b.svg"] = to_svg(Program("async_1f1b", 4), 9, "PipeOptim: asynchronous 1F1B, no flush")
    texts[ROOT / "docs/1f1b.svg"] = to_svg(
        Program("1f1b", 4, 4), 2, "1F1B with a flush after every mini-batch of 4 micro-batches"
    )
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
