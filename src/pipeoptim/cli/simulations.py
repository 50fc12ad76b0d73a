"""What commands that simulate have in common: the profile that is asked for, and the table of what was found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeoptim.errors import ConfigError, bytes_in_words, counted

if TYPE_CHECKING:
    from pipeoptim.simulate import Profile, Scenario, Simulation

#: Stages that a table shows; of more the first and the last.
SHOWN = 32


def chosen_profile(path: Path | None, synthetic: bool, sizes: str | None, stages: int) -> Profile:
    """A file's, or that of a transformer by formula with one block per stage."""
    from pipeoptim.simulate import read_profile, read_sizes
    from pipeoptim.simulate import synthetic as from_formula

    if (path is None) == (not synthetic):
        raise ConfigError("give either --profile FILE, of pipeoptim profile, or --synthetic, for a transformer by formula")
    if path is None:
        return from_formula(read_sizes(sizes or ""), stages)
    if sizes is not None:
        raise ConfigError(f"sizes is {sizes!r}, which belongs to --synthetic; a profile has its own; leave one of them out")
    return read_profile(path)


def show_simulation(found: Simulation, scenario: Scenario) -> None:
    """As a table and sentences."""
    from rich.table import Table

    from pipeoptim.telemetry.console import table_console

    where = "a formula, nothing of it measured" if found.synthetic else f"a profile of {scenario.profile.model}"
    print(f"{found.method}, {counted(found.depth, 'stage')}, M = {found.microbatches}; simulated from {where}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    replicas = ("for replicas",) if found.replicas > 1 else ()
    for heading in (
        "stage",
        "blocks",
        "busy",
        "waits for activations",
        "for gradients",
        *replicas,
        "in flight",
        "gap",
        "copies",
    ):
        table.add_column(heading, justify="right", overflow="fold")  # in a narrow terminal nothing is cut off
    table.add_column("activations", justify="right", overflow="fold")
    table.add_column("memory", justify="right", overflow="fold")
    rows = found.stages
    if len(rows) > SHOWN:
        rows = rows[: SHOWN // 2] + rows[-SHOWN // 2 :]
    for one in rows:
        shares = [one.waits.busy, one.waits.activations, one.waits.gradients] + [one.waits.replicas] * len(replicas)
        counts = (str(one.in_flight), str(one.gap), "?" if one.copies is None else str(one.copies))
        memory = "?" if one.memory is None else bytes_in_words(one.memory)
        table.add_row(
            str(one.stage),
            str(one.blocks),
            *(f"{share:.1%}" for share in shares),
            *counts,
            bytes_in_words(one.activations),
            memory,
        )
    table_console().print(table)
    if len(rows) < len(found.stages):
        print(f"the first and last {SHOWN // 2} of {len(found.stages):,} stages")
    if found.stages[0].copies is None:
        print("copies of the weights were not counted: too many stages and mini-batches in flight")
    for sentence in found.sentences():
        print(sentence)
