"""``pipeoptim methods``: what there is to choose from, and what follows from each choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

#: Columns that the widest terminal line of a drawing gets.
WIDEST = 200


def methods(
    name: Annotated[str | None, Argument(help="Show one method in detail.")] = None,
    stages: Annotated[int, Option(help="Depth D.")] = 4,
    microbatches: Annotated[int, Option(help="Micro-batches M per mini-batch.")] = 1,
    svg: Annotated[Path | None, Option(help="Write the drawing of the method's schedule to this file.")] = None,
) -> None:
    """List the training methods, or explain one.

    Everything shown is computed from the method's own table and its action program for the given depth.

    \b
    Examples:
      pipeoptim methods
          All of them at depth 4.
      pipeoptim methods --stages 8 --microbatches 8
          The same at depth 8 with 8 micro-batches per update.
      pipeoptim methods pipeoptim
          How it works, where it comes from, and its schedule.
      pipeoptim methods 1f1b --microbatches 4 --svg 1f1b.svg
          The drawing as a file.
    """
    from rich.console import Console

    from pipeoptim.schedule import Program

    Program("async_1f1b", stages, microbatches)  # says what is wrong with the two numbers
    console = Console(highlight=False)
    if name is not None:
        _one(console, name, stages, microbatches, svg)
    elif svg is not None:
        raise ConfigError("--svg draws one method; name it, for example: pipeoptim methods pipeoptim --svg schedule.svg")
    else:
        _all(console, stages, microbatches)


def _all(console: Console, stages: int, microbatches: int) -> None:
    from rich.table import Table

    from pipeoptim.compare.facts import facts, refusal, weights_in_words
    from pipeoptim.methods import METHODS

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    for heading in ("order", "F uses", "B uses"):
        table.add_column(heading)
    for heading in ("copies", "gap", "bubble"):
        table.add_column(heading, justify="right", no_wrap=True)
    refused = {}
    for method in METHODS.values():
        reason = refusal(method.name, stages, microbatches)
        words = (weights_in_words(method.forward), weights_in_words(method.backward))
        if reason is not None:
            refused[method.name] = reason
            table.add_row(method.name, method.order, *words, *("-" * 3))
            continue
        found = facts(method.name, stages, microbatches)
        gaps = " ".join(map(str, found.gaps))
        table.add_row(method.name, method.order, *words, str(max(found.copies)), gaps, f"{found.bubble:.0%}")
    console.print(f"depth {stages}, {microbatches} micro-batch{'es' * (microbatches > 1)} per update")
    console.print(table)
    console.print(
        "copies: of the weights, the most of any stage. gap: updates between F and B, by stage. bubble: idle in steady state."
    )
    for which, reason in refused.items():
        console.print(f"{which} is not defined here: {reason}", soft_wrap=True)
    console.print("pipeoptim methods NAME explains one.")


def _one(console: Console, name: str, stages: int, microbatches: int, svg: Path | None) -> None:
    from rich.table import Table

    from pipeoptim.compare.facts import explanation, facts, minibatches, order_name, weights_in_words
    from pipeoptim.methods import get_method
    from pipeoptim.schedule import to_svg, to_text

    method = get_method(name)
    program = method.program(stages, microbatches)
    found = facts(name, stages, microbatches)
    count = minibatches(program)
    if svg is not None:
        _write(svg, to_svg(program, count, title=f"{name}: {order_name(method.order)}"))
    console.print(f"[bold]{name}[/bold]: {method.summary}", soft_wrap=True)
    console.print()
    console.print(explanation(method), markup=False)
    console.print()
    for label, text in (("source", method.source), ("deviations", method.deviations)):
        if text:
            console.print(f"{label}: {text}", markup=False)
    own = f"; brings its own optimizer, {method.optimizer.name}" if method.optimizer else ""
    console.print(f"order: {order_name(method.order)}; idle in steady state {found.bubble:.0%}{own}")
    console.print(f"F uses {weights_in_words(method.forward)} weights, B {weights_in_words(method.backward)}")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "gap", "copies of weights", "F predicts ahead", "B predicts ahead", "in flight"):
        table.add_column(heading, justify="right")
    columns = (found.gaps, found.copies, found.ahead_forward, found.ahead_backward, found.in_flight)
    for k in range(stages):
        table.add_row(str(k), *(str(column[k]) for column in columns))
    console.print(table)
    console.print("gap: updates of the stage between F and B of the first micro-batch of a mini-batch, in steady state")
    console.print()
    width = WIDEST if not console.is_terminal else console.width
    console.print(to_text(program, count, width=width), soft_wrap=True, markup=False)
    console.print("F one unit of time, B two; ' marks an update", style="dim")
    if svg is not None:
        console.print(f"drawing: {svg}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another file with --svg") from error
