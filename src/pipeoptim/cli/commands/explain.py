"""``pipeoptim explain``: more on a message, from docs/troubleshooting.md and from where it is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated

from typer import Argument

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError, did_you_mean
from pipeoptim.explained import Explanation, explanations
from pipeoptim.messages import Refusal, Topic, find, topics

_LINK = re.compile(r"\[([^]]+)\]\((?:\.\./)?([^)]+)\)", re.DOTALL)
_AROUND = re.compile(r"^pipeoptim: | \[[\w.]+\]$| \(more: pipeoptim explain [\w-]+\)$")


def explain(
    name: Annotated[str | None, Argument(help="What a message ends with, or the message; all by default.")] = None,
) -> None:
    """Say more about a message.

    \b
    Examples:
      pipeoptim explain
          The names of all messages that are explained, and of all topics.
      pipeoptim explain leftover-step
          One of them, as the message that ends with "(more: pipeoptim explain leftover-step)" says.
      pipeoptim explain train.checks
          A topic: all of its messages, as one that ends with "[train.checks]" says.
      pipeoptim explain "the processes did not meet within 60 s"
          By the message itself.
    """
    print("\n".join(_all() if name is None else _about(name)))


def _all() -> Iterator[str]:
    width = max(len(part.name) for part in explanations())
    yield from (f"{part.name:{width}}  {part.words}" for part in explanations())
    yield "\nTopics, by the module that tells a message:\n"
    width = max(map(len, topics()))
    yield from (f"{topic.name:{width}}  {topic.about}" for topic in topics().values())


def _about(name: str) -> Iterator[str]:
    message = _AROUND.sub("", name)
    part = next((part for part in explanations() if message == part.name or part.explains(message)), None)
    if part is not None:
        yield from _part(part)
    elif name in topics():
        topic = topics()[name]
        yield from _topic(topic)
        yield "\nIts messages; what is filled in is in capitals, or a …\n"
        yield from (f"- {text}" for text in dict.fromkeys(known.text for known in topic.messages))
    else:
        found = find(message)
        if found is None:
            close = did_you_mean(name, [*(part.name for part in explanations()), *topics()])
            raise ConfigError(f"no message is called or says {name!r}{close or ';'} for all names, pipeoptim explain")
        yield from _message(*found, message)


def _part(part: Explanation) -> Iterator[str]:
    yield f"{part.words}\n\n{_LINK.sub(_said, part.text)}"


def _message(topic: Topic, known: Refusal, message: str) -> Iterator[str]:
    yield f"{known.text}\n"
    yield from _topic(topic)
    yield f"The other messages of this topic: pipeoptim explain {topic.name}"
    option = _option(message)
    if option:
        yield f"\n{option}"


def _topic(topic: Topic) -> Iterator[str]:
    yield f"{topic.name}: {topic.about}"
    yield f"The page on it: docs/{topic.page}"


def _option(message: str) -> str | None:
    """The help of the setting that a message begins with."""
    first = message.removeprefix("--").replace("-", "_").partition(" ")[0]
    setting = next(
        (one.metadata["setting"] for one in fields(TrainConfig) if one.name == first and "setting" in one.metadata), None
    )
    return setting and f"--{first.replace('_', '-')}: {setting.help}"


def _said(link: re.Match[str]) -> str:
    """A link as text: where it leads in the documentation."""
    return f"{link[1]} ({'' if link[2][0].isupper() else 'docs/'}{link[2]})"
