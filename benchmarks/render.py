"""Write every table in README.md and docs/ anew from the result files in benchmarks/results.

python benchmarks/render.py            writes them
python benchmarks/render.py --check    says whether they are up to date, and changes nothing
"""

import sys
from pathlib import Path

from pipeoptim.bench.tables import render_document

ROOT = Path(__file__).parents[1]


def main() -> int:
    stale = 0
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = render_document(path, ROOT)
        if text == path.read_text():
            continue
        stale += 1
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is not up to date; run python benchmarks/render.py")
        else:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
