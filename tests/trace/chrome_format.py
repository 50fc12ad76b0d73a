"""A checker of Chrome's trace-event format, from its published description and from what Perfetto refuses."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise


def check(data: dict) -> dict[tuple[str, str], list[dict]]:
    """Checks every event; returns the complete events by (group, row) in the order of their beginnings."""
    assert set(data) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert data["displayTimeUnit"] in ("ms", "ns")
    groups, rows = {}, {}
    complete, starts, ends = defaultdict(list), {}, {}
    for e in data["traceEvents"]:
        assert isinstance(e["pid"], int) and isinstance(e["tid"], int) and isinstance(e["name"], str)
        if e["ph"] == "M":
            if e["name"] == "process_name":
                groups[e["pid"]] = e["args"]["name"]
            elif e["name"] == "thread_name":
                assert e["tid"] not in (0, e["pid"]), "Perfetto takes it for the idle or the main thread"
                assert e["tid"] not in rows, "a row's number is used twice"
                rows[e["tid"]] = e["args"]["name"]
            else:
                assert e["name"] in ("process_sort_index", "thread_sort_index") and isinstance(e["args"]["sort_index"], int)
            continue
        assert math.isfinite(e["ts"]) and e["ts"] >= 0
        if e["ph"] == "X":
            assert e["dur"] >= 0 and isinstance(e["args"], dict)
            complete[e["pid"], e["tid"]].append(e)
        else:
            assert e["ph"] in ("s", "f") and isinstance(e["id"], int)
            side = starts if e["ph"] == "s" else ends
            assert e["id"] not in side, "a message starts or ends twice"
            side[e["id"]] = e
    for events in complete.values():
        events.sort(key=lambda e: e["ts"])
        for one, other in pairwise(events):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.0005, f"{one} overlaps {other}"
    _check_arrows(starts, ends, complete)
    return {(groups[pid], rows[tid]): events for (pid, tid), events in complete.items()}


def _check_arrows(starts, ends, complete):
    for identity, end in ends.items():
        if identity in starts:  # not where the recording began between the two
            assert starts[identity]["ts"] <= end["ts"] and starts[identity]["tid"] != end["tid"]
    for e in [*starts.values(), *ends.values()]:
        around = [x for x in complete[e["pid"], e["tid"]] if x["ts"] <= e["ts"] <= x["ts"] + x["dur"]]
        assert any(x["cat"] == "communication" for x in around), "an arrow that begins or ends nowhere"
