"""``pipeoptim explain``: more on a message, from docs/troubleshooting.md."""

from __future__ import annotations

import re
from typing import Annotated

from typer import Argument

from pipeoptim.errors import unknown_name
from pipeoptim.explained import Explanation, explanations

_LINK = re.compile(r"\[([^]]+)\]\((?:\.\./)?([^)]+)\)", re.DOTALL)


def explain(
    name: Annotated[str | None, Argument(help="What a message ends with, or the message; all by default.")] = None,
) -> None:
    """Say more about a message.

    \b
    Examples:
      pipeoptim explain
          The names of all messages that are explained.
      pipeoptim explain leftover-step
          One of them, as the message that ends with "(more: pipeoptim explain leftover-step)" says.
      pipeoptim explain "the processes did not meet within 60 s"
          By the message itself.
    """
    if name is None:
        width = max(len(part.name) for part in explanations())
        print("\n".join(f"{part.name:{width}}  {part.words}" for part in explanations()))
    else:
        part = _named(name)
        print(f"{part.words}\n\n{_LINK.sub(_said, part.text)}")


def _named(name: str) -> Explanation:
    for part in explanations():
        if name == part.name or part.explains(name):
            return part
    raise unknown_name("message", name, (part.name for part in explanations()))


def _said(link: re.Match[str]) -> str:
    """A link as text: where it leads in the documentation."""
    return f"{link[1]} ({'' if link[2][0].isupper() else 'docs/'}{link[2]})"
