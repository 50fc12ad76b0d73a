"""What the system says of a process."""

from __future__ import annotations

from pathlib import Path


def process_state(process: int) -> str:
    """One letter, as /proc has it: Z where it has ended, T or t where it is stopped; empty where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
