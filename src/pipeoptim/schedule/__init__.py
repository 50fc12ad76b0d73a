"""When things happen: action programs as plain data, checked, counted and drawn. Nothing here imports torch.

One program per (order, depth, micro-batches) is read by three interpreters: the emulator, the distributed engine and
the timeline that draws it. What a stage does, and how old its weights are when it does it, is therefore said once.
"""

from pipeoptim.schedule.actions import Action, ActionKind
from pipeoptim.schedule.draw import to_svg, to_text
from pipeoptim.schedule.happens_before import common_delay
from pipeoptim.schedule.orders import ORDERS, Order
from pipeoptim.schedule.program import Program, count_gaps
from pipeoptim.schedule.slack import (
    AUTO,
    Slack,
    describe_slack,
    forwards_ahead,
    messages_early,
    read_slack,
    read_slack_or_auto,
    slack_at_first,
)
from pipeoptim.schedule.timeline import Span, bubble, replay, timeline
from pipeoptim.schedule.validate import validate, with_transfers

__all__ = [
    "AUTO",
    "ORDERS",
    "Action",
    "ActionKind",
    "Order",
    "Program",
    "Slack",
    "Span",
    "bubble",
    "common_delay",
    "count_gaps",
    "describe_slack",
    "forwards_ahead",
    "messages_early",
    "read_slack",
    "read_slack_or_auto",
    "slack_at_first",
    "replay",
    "timeline",
    "to_svg",
    "to_text",
    "validate",
    "with_transfers",
]
