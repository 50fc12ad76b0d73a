"""Failures as sentences: ``kill stage 2 at forward 130``. A kind of failure is one entry of ``SENTENCES``, and one of ``INJECT``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeoptim.errors import ConfigError, unknown_name

OF_MINI_BATCHES = ("forward", "backward", "update", "send")
"""At what a failure can happen in each mini-batch; counted from 0."""

EVENTS = (*OF_MINI_BATCHES, "image", "validation", "checkpoint")
"""At what a failure can happen. The others are counted from 1, as they come; not the image that a process begins with."""

SENTENCES = {
    "kill": "kill stage {stage} at {event} {number}",
    "freeze": "freeze stage {stage} for {seconds} s at {event} {number}",
    "flip_gradient": "flip a bit in stage {stage}'s gradient at {number}",
    "flip_weights": "flip a bit in stage {stage}'s weights at {number}",
    "disk": "disk full at checkpoint {number}",
    "nan": "make the loss nan at {number}",
}
"""kind -> how it is said."""

_EVENT_OF = {"flip_gradient": "update", "flip_weights": "update", "disk": "checkpoint", "nan": "forward"}
_PARTS = {"stage": r"(?P<stage>\d{1,9})", "number": r"(?P<number>\d{1,9})", "seconds": r"(?P<seconds>\d{1,6}(\.\d+)?)"}
_PATTERNS = {
    kind: re.compile(re.sub(r"\{(\w+)\}", lambda part: _PARTS.get(part[1], rf"(?P<{part[1]}>\w+)"), text))
    for kind, text in SENTENCES.items()
}


@dataclass(frozen=True)
class Fault:
    """One failure.

    Attributes:
        kind: of ``SENTENCES``.
        event, number: when; just before the event, or while an image is made.
        stage: whose process; None where all have it.
        seconds: how long it stands still.

    Example:
        >>> str(read_fault("freeze stage 1 for 20 s at update 40"))
        'freeze stage 1 for 20 s at update 40'
    """

    kind: str
    event: str
    number: int
    stage: int | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        return SENTENCES[self.kind].format(stage=self.stage, event=self.event, number=self.number, seconds=f"{self.seconds:g}")


def read_fault(sentence: str) -> Fault:
    """The failure that ``sentence`` says.

    Raises:
        ConfigError: it says none.

    Example:
        >>> read_fault("kill stage 2 at forward 130")
        Fault(kind='kill', event='forward', number=130, stage=2, seconds=0.0)
    """
    text = " ".join(sentence.split())
    for kind, pattern in _PATTERNS.items():
        found = pattern.fullmatch(text)
        if found is None:
            continue
        parts = found.groupdict()
        event = parts.get("event") or _EVENT_OF[kind]
        if event not in EVENTS:
            raise unknown_name("event", event, EVENTS)
        stage = None if parts.get("stage") is None else int(parts["stage"])
        return Fault(kind, event, int(parts["number"]), stage, float(parts.get("seconds") or 0))
    shapes = "; ".join(text.format(stage="K", event="EVENT", number="N", seconds="S") for text in SENTENCES.values())
    raise ConfigError(f"{text[:80]!r} is no failure; say one of: {shapes}. EVENT is one of {', '.join(EVENTS)}")
