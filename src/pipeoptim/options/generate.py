"""Writes what type checkers need beside the table: the keyword arguments of pipelines, and the options of a training run.

They read neither metadata nor functions that make types, so the types are written out, here and not by hand::

    options/table.py --+--> options/keywords.py      what Emulator and Schedule take
    (one entry each)   +--> options/run_options.py   what a TrainConfig has of it

``python -m pipeoptim.options.generate`` writes both; with ``--check`` it says which are not current. A test asks that.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from pipeoptim.options import table
from pipeoptim.options.runs import RUN_SETTINGS
from pipeoptim.options.table import PROCESS_OPTIONS, RENAMED, PipelineOptions, about

NOTE = "Written by ``python -m pipeoptim.options.generate`` from ``table.py``: change that, and run it again."

KEYWORDS = '''"""The keyword arguments of pipelines by the types in which users give them, for type checkers and signatures.

{note}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

{imports}


class OptionKeywords(TypedDict, total=False):
    """Keyword arguments of every pipeline."""

{shared}


class ProcessKeywords(OptionKeywords, total=False):
    """Those of pipelines whose stages live in several processes."""

{between_processes}
'''

RUN_OPTIONS = '''"""The options of a pipeline that a training run has.

{note}
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeoptim.options.runs import run_setting


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Fields that every :class:`~pipeoptim.config.TrainConfig` has."""

{fields}
'''


def files() -> dict[Path, str]:
    """path -> what must be in it."""
    given = {f.name: about(f).given or str(f.type) for f in fields(PipelineOptions) if f.name in PROCESS_OPTIONS}
    given |= {old: given[new] for old, new in RENAMED.items()}
    apart = {f.name for f in fields(PipelineOptions) if about(f).between_processes}
    keywords = KEYWORDS.format(
        note=NOTE,
        imports=_lines(_imports(given.values())),
        shared=_lines(f"{name}: {type}" for name, type in given.items() if RENAMED.get(name, name) not in apart),
        between_processes=_lines(f"{name}: {type}" for name, type in given.items() if RENAMED.get(name, name) in apart),
    )
    found = (f'{name}: {known.type_name} = run_setting("{name}")' for name, known in RUN_SETTINGS.items())
    folder = Path(__file__).parent
    return {folder / "keywords.py": keywords, folder / "run_options.py": RUN_OPTIONS.format(note=NOTE, fields=_lines(found))}


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line}" if line else line for line in lines)


def _imports(types: Iterable[str]) -> Iterator[str]:
    """The imports of the table, as far as ``types`` need them: those of torch, then the package's own."""
    words = set(re.findall(r"\w+", " ".join(types))) - {"Callable", "Sequence"}
    found: list[str] = []
    for node in ast.walk(ast.parse(Path(table.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [alias for alias in node.names if alias.name in words]
            found += [ast.unparse(node)] if node.names else []
    own = sorted(line for line in found if "pipeoptim" in line)
    yield from [line for line in found if line not in own]
    yield ""
    yield from own


def main(arguments: list[str]) -> int:
    """Write the files; with ``--check``, only say which are not current."""
    stale = [path for path, text in files().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in arguments:
            print(f"{path} is not current; run python -m pipeoptim.options.generate")
        else:
            path.write_text(files()[path], encoding="utf-8")
            print(f"{path} written")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
