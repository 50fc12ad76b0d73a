"""``pipeoptim methods``: the methods to choose from, and what follows from each choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pipeoptim.cli.new_files import check_new_files
from pipeoptim.cli.settings import given, takes_settings
from pipeoptim.errors import ConfigError, counted

if TYPE_CHECKING:
    from rich.console import Console

    from pipeoptim.schedule import Program

#: Columns of the table whose words may stand below one another.
MAY_WRAP = ("F uses", "B uses")

#: Actions that are walked through in about five seconds; one method alone is drawn as well, which takes as long as four do.
MOST_ACTIONS = 600_000

#: Columns that the widest terminal line of a drawing gets.
WIDEST = 200


@takes_settings(
    "stages",
    "microbatches",
    "slack",
    "prediction",
    "refresh",
    after="name",
    defaults=("stages", "microbatches", "slack", "prediction"),
    stages="Depth D.",
    microbatches="Micro-batches M per mini-batch.",
    slack="More micro-batches in flight: x, or 0,x,0 with one x for each boundary between stages.",
)
def methods(
    name: Annotated[str | None, Argument(help="Show one method in detail.")] = None,
    svg: Annotated[Path | None, Option(help="Write the drawing of the method's schedule to this file.")] = None,
    **settings: Any,
) -> None:
    """List the training methods, or explain one.

    Everything shown is computed from the method's own table and its action program for the given depth.

    \b
    Examples:
      pipeoptim methods
          All of them at depth 4.
      pipeoptim methods --stages 8 --microbatches 8
          The same at depth 8 with 8 micro-batches per update.
      pipeoptim methods pipeoptim --slack 1
          One with more micro-batches in flight, so that late messages hold nobody up: what it costs, and its drawing.
      pipeoptim methods --stages 8 --microbatches 8 --prediction in_progress --refresh 2
          How many copies of the weights they hold with these predictions.
      pipeoptim methods pipeoptim
          How it works, where it comes from, and its schedule.
      pipeoptim methods 1f1b --microbatches 4 --svg 1f1b.svg
          The drawing as a file.
    """
    from pipeoptim.methods import METHODS, refresh_every
    from pipeoptim.schedule import Program
    from pipeoptim.telemetry.console import table_console

    check_new_files({"--svg": svg}, drawn=["--svg"])
    wanted = given(settings)
    program = Program(
        "async_1f1b", wanted["stages"], wanted["microbatches"], slack=wanted["slack"]
    )  # refuses impossible numbers
    refresh = refresh_every(wanted["prediction"], wanted.get("refresh") or None)
    _check_size(program, 4 if name is not None else len(METHODS))
    console = table_console(WIDEST)
    if name is not None:
        _one(console, name, program, refresh, svg)
    elif svg is not None:
        raise ConfigError("--svg draws one method; name it, for example: pipeoptim methods pipeoptim --svg schedule.svg")
    else:
        _all(console, program, refresh)


def _check_size(program: Program, methods: int) -> None:
    """Everything that is shown is counted action by action, which must not take minutes."""
    stages, microbatches = program.depth, program.microbatches
    actions = 2 * stages * (2 * program.warm_up + 2) * microbatches * methods
    if actions > MOST_ACTIONS:
        raise ConfigError(
            f"{counted(stages, 'stage')} with {counted(microbatches, 'micro-batch')} would take minutes to count ({actions:,} actions, at "
            f"most {MOST_ACTIONS:,} are counted); set --stages or --microbatches to less"
        )


def _all(console: Console, setting: Program, refresh: int | None) -> None:
    from rich.table import Table

    from pipeoptim.compare.facts import refusal
    from pipeoptim.methods import METHODS
    from pipeoptim.methods.registry import FACTORIES
    from pipeoptim.schedule import describe_slack

    headings, rows = _rows(setting, refresh, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        figures = heading in ("copies", "gap", "bubble")
        table.add_column(heading, justify="right" if figures else "left", no_wrap=heading not in MAY_WRAP)
    for row in rows:
        table.add_row(*row)
    slack = f", slack {describe_slack(setting.slack)}" if setting.slack else ""
    console.print(f"depth {setting.depth}, {counted(setting.microbatches, 'micro-batch')} per update{slack}")
    console.print(table)
    console.print(
        "copies: of the weights, the most of any stage. gap: updates from the weights of F to B, by stage. bubble: idle in steady state."
    )
    for name in METHODS:
        if reason := refusal(name, setting.depth, setting.microbatches, setting.slack):
            console.print(f"{name} is not defined here: {reason}", soft_wrap=True)
    console.print(f"pipeoptim methods NAME explains one. With options: {', '.join(FACTORIES)}.")


def _rows(setting: Program, refresh: int | None, width: int) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of all methods; where they do not fit, without the order, then with the ends of the gaps alone."""
    from pipeoptim.compare.facts import facts, refusal, weights_in_words
    from pipeoptim.methods import METHODS

    headings = ["method", "order", "F uses", "B uses", "copies", "gap", "bubble"]
    rows = []
    for name, method in METHODS.items():
        words = [name, method.order, weights_in_words(method.forward), weights_in_words(method.backward)]
        if refusal(name, setting.depth, setting.microbatches, setting.slack) is not None:
            rows.append([*words, *("-" * 3)])
            continue
        found = facts(name, setting.depth, setting.microbatches, setting.slack, refresh)
        rows.append([*words, str(max(found.copies)), " ".join(map(str, found.gaps)), f"{found.bubble:.0%}"])

    def too_wide() -> bool:
        columns = [
            [word for cell in column for word in _unbroken(cell, column[0])] for column in zip(headings, *rows, strict=True)
        ]
        return sum(2 + max(map(len, words)) for words in columns) - 2 > width

    if too_wide():
        headings.remove("order")
        rows = [[row[0], *row[2:]] for row in rows]
    if too_wide():
        gap = headings.index("gap")
        for row in rows:
            ends = row[gap].split()
            row[gap] = f"{ends[0]} .. {ends[-1]}" if len(ends) > 2 else row[gap]
    return headings, rows


def _unbroken(cell: str, heading: str) -> list[str]:
    return cell.split() if heading in MAY_WRAP and cell != heading else [cell]


def _one(console: Console, name: str, setting: Program, refresh: int | None, svg: Path | None) -> None:
    from rich.table import Table

    from pipeoptim.compare.facts import explanation, facts, minibatches, options, order_name, weights_in_words
    from pipeoptim.methods import get_method
    from pipeoptim.schedule import to_svg, to_text

    method = get_method(name)
    program = method.program(setting.depth, setting.microbatches, slack=setting.slack)
    found = facts(name, setting.depth, setting.microbatches, setting.slack, refresh)
    count = minibatches(program)
    if svg is not None:
        svg.write_text(to_svg(program, count, title=f"{name}: {order_name(method.order)}"), encoding="utf-8")
    console.print(f"[bold]{name}[/bold]: {method.summary}", soft_wrap=True)
    console.print()
    if (text := explanation(method)) != method.summary:
        console.print(text, markup=False)
        console.print()
    for label, text in (("source", method.source), ("deviations", method.deviations)):
        if text:
            console.print(f"{label}: {text}", markup=False)
    own = f"; brings its own optimizer, {method.optimizer.name}" if method.optimizer else ""
    if method.compensation is not None:
        own += f"; corrects the optimizer's steps by {getattr(method.compensation, '__name__', 'a function of its own')}"
    console.print(f"order: {order_name(method.order)}; idle in steady state {found.bubble:.0%}{own}")
    head, settings = options(name)
    if settings:
        console.print(f"options, as in {head}({settings[0].name}={settings[0].default!r}):", markup=False, soft_wrap=True)
    for option in settings:
        console.print(f"  {option.name}={option.default!r}  {option.meaning}", markup=False, soft_wrap=True)
    console.print(f"F uses {weights_in_words(method.forward)} weights, B {weights_in_words(method.backward)}")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "gap", "copies of weights", "F predicts ahead", "B predicts ahead", "in flight"):
        table.add_column(heading, justify="right")
    columns = (found.gaps, found.copies, found.ahead_forward, found.ahead_backward, found.in_flight)
    for k in range(setting.depth):
        table.add_row(str(k), *(str(column[k]) for column in columns))
    console.print(table)
    console.print("gap: updates from the weights of F to the B of the first micro-batch of a mini-batch, in steady state")
    console.print()
    width = WIDEST if not console.is_terminal else console.width
    console.print(to_text(program, count, width=width), soft_wrap=True, markup=False)
    console.print("F one unit of time, B two; ' marks an update", style="dim")
    if svg is not None:
        console.print(f"drawing: {svg}")
