"""The map of CONTRIBUTING.md, enforced: which room may import which, no circles, and no two classes of one name.

Imports inside functions and for annotations count as well: who names a type knows it.
"""

import ast
import importlib
import importlib.util
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pipeoptim

SOURCE = Path(pipeoptim.__path__[0]).parent

#: room -> rooms that it may import besides itself. A room is a folder, or a module that lies beside the folders.
MAY_IMPORT = {
    "explained": "",
    "messages": "",
    "errors": "explained",
    "version": "",
    "files": "errors",
    "user_code": "",
    "named_calls": "errors",
    "schedule": "errors",
    "kernels": "errors",
    "optim": "errors",
    "rules": "errors kernels optim",
    "weights": "errors kernels schedule",
    "methods": "errors user_code schedule optim rules weights",
    "stability": "errors schedule weights methods",
    "advise": "errors schedule methods",
    "engine/transport": "errors",
    "engine/processes": "errors engine/transport",
    "engine/stage": "errors schedule kernels optim rules weights methods options engine/transport engine/processes",
    "engine/replicas": "errors weights engine/transport engine/processes engine/stage",
    "engine": "errors files advise schedule methods options engine/transport engine/processes engine/stage engine/replicas",
    "options": "errors schedule methods",
    "checkpoint": "errors version files options rules engine engine/processes engine/stage",
    "telemetry": "errors files schedule engine",
    "partitioning": "errors schedule methods checkpoint engine engine/processes engine/stage engine/transport",
    "config": "errors named_calls options",
    "testing": "rules",
    "diagnosis": "errors version kernels rules",
    "failures": "errors",
    "simulate": "errors files version failures schedule methods partitioning telemetry",
    "money": "errors files failures",
    "train": "errors files user_code named_calls version config options advise schedule kernels optim rules methods engine "
    "engine/processes engine/stage partitioning checkpoint telemetry",
    "bench": "errors files version kernels schedule rules weights methods stability engine engine/transport engine/processes "
    "engine/stage partitioning simulate train",
    "compare": "errors files version config options schedule kernels weights methods checkpoint telemetry train bench",
    "faults": "errors config schedule checkpoint telemetry engine engine/stage train",
    "cli": "errors explained messages files version config options advise diagnosis schedule kernels methods stability engine "
    "engine/transport partitioning telemetry simulate money train bench compare faults",
}

#: Rooms whose types a room may name in annotations, without importing them when it runs.
MAY_NAME = {"options": "engine engine/stage engine/transport"}


def modules():
    """name -> path of every module of the package."""
    for path in sorted((SOURCE / "pipeoptim").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports_of(tree):
    """Modules of the package that ``tree`` imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found = f"{node.module}.{alias.name}"
                yield found if found in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def for_annotations(tree):
    """Modules that are imported for annotations only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports_of(node)


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
IMPORTS = {
    name: {other for other in imports_of(tree) if other in MODULES} - {name, "pipeoptim"} for name, tree in TREES.items()
}
ROOMED = sorted(name for name in MODULES if name not in ("pipeoptim", "pipeoptim.__main__"))


def room(name):
    _, first, *rest = name.split(".")
    return f"{first}/{rest[0]}" if rest and f"{first}/{rest[0]}" in MAY_IMPORT else first


@pytest.mark.parametrize("own", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_it_may_know(own):
    allowed = {own, *MAY_IMPORT[own].split()}
    assert allowed <= set(MAY_IMPORT), "the table names a room that is not in it"
    names = [name for name in ROOMED if room(name) == own]
    assert names, f"there is no room {own}"
    forbidden = set()
    for name in names:
        named = {o for o in for_annotations(TREES[name]) if o in MODULES and room(o) in MAY_NAME.get(own, "").split()}
        forbidden |= {(name, other) for other in IMPORTS[name] - named if room(other) not in allowed}
    assert forbidden == set(), "change the import or, where the map is wrong, this table and CONTRIBUTING.md"


def test_every_module_is_in_a_room_and_none_knows_the_zoo():
    assert {room(name) for name in ROOMED} == set(MAY_IMPORT)
    assert [name for name, tree in TREES.items() if any(other.startswith("pipeoptim_zoo") for other in imports_of(tree))] == []


def cycle_in(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_neither_rooms_nor_modules_import_in_circles():
    assert cycle_in({own: allowed.split() for own, allowed in MAY_IMPORT.items()}) == []
    graph = {name: IMPORTS[name] for name in ROOMED}
    assert cycle_in(graph) == []


def test_no_two_classes_share_a_name():
    where = defaultdict(list)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(name)
    assert {name: found for name, found in where.items() if len(found) > 1} == {}


def test_the_map_of_contributing_says_the_same():
    page = (SOURCE.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `([a-z/]+)` \|[^|]*\|([^|]*)\|[^|]*\|$", page, re.MULTILINE)
    shown = {own: set(re.findall(r"`([a-z/]+)`", allowed)) for own, allowed in rows}
    assert shown == {
        own: set(allowed.split()) - {"errors", "files", "version", "user_code", "named_calls"}
        for own, allowed in MAY_IMPORT.items()
        if own in shown
    }
    folders = {own for own in MAY_IMPORT if (SOURCE / "pipeoptim" / own / "__init__.py").exists()}
    assert set(shown) == folders
    assert all(f"`{own}`" in page for own in set(MAY_IMPORT) - folders)


@pytest.mark.parametrize("script", sorted(SOURCE.parent.glob("benchmarks/*.py")), ids=lambda path: path.name)
def test_what_benchmarks_import_exists(script):
    """They run for hours, so no test runs them."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipeoptim"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                found = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}") is not None
                assert found, f"{node.module} has no {name}"
