"""Facts derived from a method's table and its action program, for tables and pages; none is typed by hand."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import lru_cache

from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method, copies, gap, get_method
from pipeoptim.methods.registry import EXPLANATIONS, FACTORIES
from pipeoptim.schedule import ORDERS, Program, Slack, timeline
from pipeoptim.weights import Source


@dataclass(frozen=True)
class Facts:
    """A method at one depth and number of micro-batches; lists have one number per stage.

    Args:
        gaps: updates from the weights of F to B, of a mini-batch's first micro-batch in steady state, which is the largest.
        copies: copies of the weights at most, the latest included.
        ahead_forward, ahead_backward: updates that the weights of F and B are predicted ahead.
        in_flight: micro-batches between F and B at most.
        bubble: share of time idle in steady state, F taking one unit and B two.
    """

    gaps: tuple[int, ...]
    copies: tuple[int, ...]
    ahead_forward: tuple[int, ...]
    ahead_backward: tuple[int, ...]
    in_flight: tuple[int, ...]
    bubble: float


def facts(name: str, depth: int, microbatches: int, slack: Slack = 0.0, refresh: int | None = None) -> Facts:
    """The facts of method ``name``.

    ``refresh``: with predictions from the mini-batch in progress, where it can make them, anew after so many micro-batches.

    Raises:
        ConfigError: it is unknown, or not defined for this setting.

    Example:
        >>> facts("pipedream", 4, 1).copies, facts("pipeoptim", 4, 1).copies
        ((4, 3, 2, 1), (2, 2, 2, 1))
    """
    method = get_method(name)
    program = method.program(depth, microbatches, slack=slack)
    first = program.warm_up * microbatches
    refresh = refresh if method.predicts_by_rule else None
    stages = range(depth)
    return Facts(
        gaps=tuple(gap(method, depth, microbatches, k, program=program) for k in stages),
        copies=tuple(copies(method, depth, microbatches, k, program=program, refresh=refresh) for k in stages),
        ahead_forward=tuple(method.forward.steps_ahead(program, k, first) for k in stages),
        ahead_backward=tuple(method.backward.steps_ahead(program, k, first) for k in stages),
        in_flight=tuple(program.in_flight(k) for k in stages),
        bubble=steady_bubble(program),
    )


@lru_cache(maxsize=64)
def steady_bubble(program: Program) -> float:
    """Idle share of one mini-batch's time once the pipeline is full.

    >>> steady_bubble(Program("async_1f1b", 4)), round(steady_bubble(Program("gpipe", 4, 4)), 3)
    (0.0, 0.429)
    """
    n = 2 * -(-program.warm_up // program.microbatches) + 4  # the pipeline is full after 2 D micro-batches
    spans = timeline(program, n)
    end = {mini: max(s.end for s in spans if s.action.number == mini and s.action.kind == "U") for mini in (n - 4, n - 2)}
    window = end[n - 2] - end[n - 4]
    busy = 2 * 3.0 * program.microbatches  # two mini-batches, F one unit and B two
    return max(0.0, 1.0 - busy / window)


def minibatches(program: Program) -> int:
    """How many mini-batches a drawing needs to show filling, steady state and draining."""
    return 2 if program.flushes else max(2, -(-(program.warm_up + 2) // program.microbatches))


def refusal(name: str, depth: int, microbatches: int, slack: Slack = 0.0) -> str | None:
    """Why the method is not defined for this setting; None if it is."""
    try:
        get_method(name).program(depth, microbatches, slack=slack)
    except ConfigError as error:
        return str(error)
    return None


def order_name(order: str) -> str:
    """An order in words."""
    flushes = "flushed after each mini-batch" if ORDERS[order].flushes else "never flushed"
    return f"{order.replace('_', ' ')}, {flushes}"


def weights_in_words(source: Source) -> str:
    """Where weights come from in one or two words, derived from the kind of source.

    >>> weights_in_words(get_method("pipeoptim").forward), weights_in_words(get_method("pipedream").backward)
    ('predicted', 'stashed')
    """
    words = re.sub(r"(?<!^)(?=[A-Z])", " ", type(source).__name__).lower()
    return _WORDS.get(words, words)


#: Kinds of source whose class name needs more words.
_WORDS = {"numbered": "one version"}


def explanation(method: Method) -> str:
    """The docstring of the module that defines the method: what it does, with its formula; its summary where there is none."""
    text = EXPLANATIONS.get(family(method.name)) or method.summary
    paragraphs = text.strip().replace("``", "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def family(name: str) -> str:
    """The name without variant and options.

    >>> family("pipemare(correct=False)"), family("nesterov+no_stash")
    ('pipemare', 'nesterov')
    """
    return re.split(r"[+(]", name, maxsplit=1)[0]


@dataclass(frozen=True)
class MethodOption:
    """Something that a user may set: ``name(option=value)``."""

    name: str
    default: object
    meaning: str


def options(name: str) -> tuple[str, list[MethodOption]]:
    """The method whose options those of ``name`` are, and the options with what they mean, from the function that takes them.

    >>> options("pipedream+vertical_sync")[0], [o.name for o in options("pipedream")[1]], options("gpipe")
    ('pipedream', ['vertical_sync'], ('gpipe', []))
    """
    head = family(name)
    if head not in FACTORIES:
        return head, []
    meanings = dict(re.findall(r"^    (\w+): (.+)$", inspect.getdoc(FACTORIES[head]) or "", re.M))
    parameters = inspect.signature(FACTORIES[head]).parameters.values()
    return head, [MethodOption(p.name, p.default, meanings.get(p.name, "")) for p in parameters]
