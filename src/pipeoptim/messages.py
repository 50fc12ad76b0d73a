"""Every message of bad input, read from the source: its words, the module that tells it, and the page that this module's subject is on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGES = ("pipeoptim", "pipeoptim_zoo")
_ERRORS = ("ConfigError", "FinishedError")
_UNKNOWN = "unknown_name"

#: The page of ``docs/`` that the modules below a name are about; the longest name decides.
PAGES = {
    "": "command_line.md",
    "advise": "choosing.md",
    "bench": "performance.md",
    "checkpoint": "checkpoints.md",
    "checkpoint.checkpointer": "failures.md",
    "cli.commands.cost": "cost.md",
    "cli.commands.faults": "failures.md",
    "cli.commands.plan": "simulate.md",
    "cli.commands.profile": "simulate.md",
    "cli.commands.simulate": "simulate.md",
    "cli.commands.stability": "theory.md",
    "cli.plan_options": "simulate.md",
    "cli.simulations": "simulate.md",
    "engine": "concepts.md",
    "engine.marks": "inputs.md",
    "engine.microbatches": "inputs.md",
    "engine.per_stage": "inputs.md",
    "engine.processes": "multi_node.md",
    "engine.replicas": "layouts.md",
    "engine.splitting": "inputs.md",
    "engine.stage.adagc": "optimizers.md",
    "engine.stage.audit": "failures.md",
    "engine.stage.clip": "optimizers.md",
    "engine.stage.clipping": "optimizers.md",
    "engine.stage.losses": "inputs.md",
    "engine.stage.script_calls": "porting.md",
    "engine.stage.tied_weights": "inputs.md",
    "engine.step_loss": "porting.md",
    "engine.survival": "failures.md",
    "engine.trace": "traces.md",
    "engine.transport": "multi_node.md",
    "failures": "simulate.md",
    "faults": "failures.md",
    "files": "checkpoints.md",
    "kernels": "performance.md",
    "methods": "choosing.md",
    "money": "cost.md",
    "optim": "delay.md",
    "options": "concepts.md",
    "partitioning": "partition.md",
    "rules": "optimizers.md",
    "schedule": "concepts.md",
    "simulate": "simulate.md",
    "stability": "theory.md",
    "telemetry": "traces.md",
    "telemetry.loggers": "integrations.md",
    "train.callbacks": "integrations.md",
    "weights": "concepts.md",
    "zoo.data.text": "language_models.md",
    "zoo.models.causal_lm": "language_models.md",
}


@dataclass(frozen=True)
class Refusal:
    """What one place in the source says of bad input.

    Attributes:
        topic: the module, without the package's name: what :attr:`pipeoptim.ConfigError.topic` names.
        line: where in it.
        parts: its words, and between them, as every second entry, the names of what is filled in.
    """

    topic: str
    line: int
    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        """Its words, with capitals or … for what is filled in."""
        return "".join(self.parts)

    @property
    def told(self) -> int:
        """How many characters are its own: of two that fit, the one with more of them is meant."""
        return sum(map(len, self.parts[::2]))

    def says(self, message: str) -> bool:
        """Whether ``message`` has its words."""
        place = 0 if self.told > 9 else -1
        for words in self.parts[::2]:
            if place >= 0:
                place = message.find(words, place)
                place += len(words) if place >= 0 else 0
        return place >= 0


@dataclass(frozen=True)
class Topic:
    """A module that refuses input: its name, what it is about, the page on that, and its messages."""

    name: str
    about: str
    page: str
    messages: tuple[Refusal, ...]


@cache
def topics() -> dict[str, Topic]:
    """All of them by name, from the installed source: a new message needs no entry anywhere."""
    root = Path(__file__).parents[1]
    paths = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    found = (_read(_named(path.relative_to(root)), path.read_text(encoding="utf-8")) for path in paths)
    return {topic.name: topic for topic in found if topic is not None}


def find(message: str) -> tuple[Topic, Refusal] | None:
    """The place that tells ``message``, or what resembles it most."""
    told = [(known.told, topic, known) for topic in topics().values() for known in topic.messages if known.says(message)]
    return max(told, key=lambda one: one[0])[1:] if told else None


def page_of(topic: str) -> str:
    """The page of ``docs/`` on a topic."""
    names = topic.split(".")
    return next(page for n in range(len(names), -1, -1) if (page := PAGES.get(".".join(names[:n]))))


def _named(path: Path) -> str:
    package, *rest = path.with_suffix("").parts
    return ".".join([*(["zoo"] if package == "pipeoptim_zoo" else []), *(rest if rest[-1] != "__init__" else rest[:-1])])


def _read(name: str, source: str) -> Topic | None:
    if not any(f"{error}(" in source for error in (*_ERRORS, _UNKNOWN)):
        return None
    tree = ast.parse(source)
    about = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
    messages = tuple(
        Refusal(name, call.lineno, parts) for function, call in _calls(tree) for parts in _Words(tree, function).of_call(call)
    )
    return Topic(name, about, page_of(name), messages) if messages else None


def _calls(tree: ast.AST, function: ast.AST | None = None) -> Iterator[tuple[ast.AST | None, ast.Call]]:
    """Where errors are made, each with the function around it."""
    for node in ast.iter_child_nodes(tree):
        inside = node if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in (*_ERRORS, _UNKNOWN):
            yield inside, node
        yield from _calls(node, inside)


class _Words:
    """Expressions as words. One that has several values, such as a variable, or a function of the same module, is each of them."""

    def __init__(self, module: ast.AST, function: ast.AST | None) -> None:
        self._module, self._function = module, function

    def of_call(self, call: ast.Call) -> Iterator[tuple[str, ...]]:
        if isinstance(call.func, ast.Name) and call.func.id == _UNKNOWN:
            for what in self._of(call.args[0]):
                yield _joined(("unknown ",), what, (" ", "NAME", "; "), ("", "…", "known: "), ("", "NAMES", ""))
        elif call.args:
            yield from self._of(call.args[0])

    def _of(self, node: ast.AST, depth: int = 0) -> list[tuple[str, ...]]:
        if isinstance(node, ast.Constant):
            return [(str(node.value),)]
        if isinstance(node, ast.JoinedStr):
            return [_joined(*(self._filled(part) for part in node.values))]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [_joined(a, b) for a in self._of(node.left, depth) for b in self._of(node.right, depth)]
        if isinstance(node, ast.IfExp):
            return self._of(node.body, depth) + self._of(node.orelse, depth)
        values = self._values(node) if depth < 3 else []
        return [parts for value in values for parts in self._of(value, depth + 1)] or [("", _placeholder(node), "")]

    def _filled(self, part: ast.AST) -> tuple[str, ...]:
        return (str(part.value),) if isinstance(part, ast.Constant) else ("", _placeholder(part), "")

    def _values(self, node: ast.AST) -> list[ast.AST]:
        if isinstance(node, ast.Name) and self._function is not None:
            assigned = (one for one in ast.walk(self._function) if isinstance(one, ast.Assign))
            return [one.value for one in assigned if any(isinstance(t, ast.Name) and t.id == node.id for t in one.targets)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            defined = (one for one in ast.walk(self._module) if isinstance(one, ast.FunctionDef) and one.name == node.func.id)
            return [one.value for f in defined for one in ast.walk(f) if isinstance(one, ast.Return) and one.value is not None]
        return []


def _placeholder(node: ast.AST) -> str:
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Call):
        return "TYPE" if "name" in inner.attr else "…"  # type(value).__name__
    name = inner.attr if isinstance(inner, ast.Attribute) else inner.id if isinstance(inner, ast.Name) else ""
    return name.strip("_").upper() or "…"


def _joined(*pieces: tuple[str, ...]) -> tuple[str, ...]:
    """Words and placeholders alternate, words first and last."""
    found = [""]
    for piece in pieces:
        found[-1] += piece[0]
        found += piece[1:]
    return tuple(found)
