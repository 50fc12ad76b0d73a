"""One process measures for all: if each measured by itself, their times would differ, and so might their cuts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import torch.distributed as dist

from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.errors import StageFailure
from pipeoptim.partitioning.block_costs import BlockCost

_TIMEOUT = 1800.0  # seconds; that of torch's own groups


def measured_by_first(measure: Callable[[], list[BlockCost]], group: dist.ProcessGroup) -> list[BlockCost]:
    """The costs that ``measure`` finds in the first process of ``group``. All of them call this.

    Raises:
        StageFailure: the first process failed, or one did not come.
    """
    rendezvous = Rendezvous("partition", dist.get_process_group_ranks(group), _TIMEOUT, "process {}")
    try:
        found = [asdict(cost) for cost in measure()] if rendezvous.index == 0 else None
        answers = rendezvous.exchange_settings(json.dumps(found))
    except StageFailure:
        raise
    except BaseException as error:
        rendezvous.abort(error)
        raise
    return [BlockCost(**cost) for cost in json.loads(answers[0])]
