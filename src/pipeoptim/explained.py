"""Messages that are explained: docs/troubleshooting.md, by the words of a message and by the name of a part. It lies in the package too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGE = Path(__file__).with_name("troubleshooting.md")
_PART = re.compile(r'<a id="([\w-]+)"></a>\n\n### ([^\n]*)\n\n(.*?)\n(?=\n<a id=|\n## |\Z)', re.DOTALL)
_NAMED = re.compile(r" \(more: pipeoptim explain [\w-]+\)")


@dataclass(frozen=True)
class Explanation:
    """A part of the page: its name, which is its anchor as well; the words of the message, with … for what is filled in; what is said."""

    name: str
    words: str
    text: str

    def explains(self, message: str) -> bool:
        """Whether ``message`` has its words."""
        told = map(re.escape, self.words.strip(" …").split("…"))
        return re.search(".*?".join(told), message, re.DOTALL) is not None  # a module is shown on several lines


@cache
def explanations() -> tuple[Explanation, ...]:
    """All parts of the page; none where it is missing, for an error must not hide another."""
    try:
        page = PAGE.read_text(encoding="utf-8")
    except OSError:
        return ()
    return tuple(Explanation(*part) for part in _PART.findall(page))


def with_name(message: str) -> str:
    """``message``, and at its end the name of what explains it, if anything does.

    >>> with_name("the model is a GPT, which cannot be sliced, and no sample_args were given")[-37:]
    '(more: pipeoptim explain sample-args)'
    """
    plain = _NAMED.sub("", message)  # of an error that this one is about
    found = next((part.name for part in explanations() if part.explains(plain)), None)
    return plain if found is None else f"{plain} (more: pipeoptim explain {found})"


def is_named(message: str) -> bool:
    """Whether it has such a name."""
    return _NAMED.search(message) is not None
