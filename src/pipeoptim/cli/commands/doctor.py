"""``pipeoptim doctor``: what is active on this machine, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

if TYPE_CHECKING:
    from pipeoptim.diagnosis import Finding

STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "broken": "bold red"}


def doctor(
    as_json: Annotated[bool, Option("--json", help="Print the findings as JSON, for scripts and bug reports.")] = False,
) -> None:
    """Say what is installed and active here, and why: kernels, threads, torch, backends, compiler, GPU, Triton.

    The exit code is 1 if something is broken, else 0. Kernels that are wanted but cannot be used count as broken: everything works
    without them, but slower. PIPEOPTIM_KERNELS=off says that they are not wanted.

    \b
    Examples:
      pipeoptim doctor
          A table.
      pipeoptim doctor --json
          To be pasted into a bug report.
    """
    from pipeoptim.diagnosis import diagnose

    findings = diagnose()
    if as_json:
        _print_json(findings)
    else:
        _print_table(findings)
    if any(finding.state == "broken" for finding in findings):
        raise Exit(1)


def _print_json(findings: list[Finding]) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps([asdict(finding) for finding in findings], indent=1))


def _print_table(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from pipeoptim.telemetry.console import table_console

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("what", "state", "found", "why"):
        table.add_column(heading, no_wrap=heading in ("what", "state"))
    for finding in findings:
        table.add_row(finding.name, Text(finding.state, STYLES[finding.state]), Text(finding.found), Text(finding.reason))
    table_console().print(table)
