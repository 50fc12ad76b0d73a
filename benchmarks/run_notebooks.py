"""Run the notebooks of examples/ and keep what their cells print and draw in them, as Jupyter does.

python benchmarks/run_notebooks.py
"""

from __future__ import annotations

import base64
import json
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def outputs_of(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Of one cell, which is run."""
    told = StringIO()
    plt.show = lambda: None  # figures are looked at below
    with redirect_stdout(told):
        exec(source, names)
    outputs: list[dict[str, Any]] = []
    if told.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": told.getvalue().splitlines(keepends=True)})
    for number in plt.get_fignums():
        picture = BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80, metadata={"Software": None})
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def main() -> None:
    for path in sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb")):
        notebook, names = json.loads(path.read_text()), {}
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for count, cell in enumerate(cells, start=1):
            cell["outputs"], cell["execution_count"] = outputs_of("".join(cell["source"]), names), count
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main()
