"""A worker process of a comparison: ``python -m pipeoptim.compare.worker``, one run after the other, each on one line of stdin.

It stays alive between runs, so torch and the data are loaded once. How a run ended is in its folder, in ``outcome.json``;
stdout only says when.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeoptim.compare.folder import write_text
from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError, PipeOptimError

OUTCOME = "outcome.json"
READY = "run ended: "

#: The message that a loss, a gradient or a weight is no longer finite; from several processes only the text arrives.
_DIVERGED = re.compile(r"(?:the loss is (?:nan|-?inf)|the (?:gradients|weights) of stage \d+ are not finite) at step (\d+)")


def main() -> None:
    """Serve until stdin ends."""
    from pipeoptim.kernels.allocation import keep_freed_memory
    from pipeoptim.train.parent import end_with_parent

    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its workers
    end_with_parent()
    for line in sys.stdin:
        order = json.loads(line)
        folder = Path(order["folder"])
        outcome = carry_out(TrainConfig.from_json(json.dumps(order["config"])), folder)
        write_text(folder / OUTCOME, json.dumps(outcome) + "\n")
        print(READY + outcome["status"], flush=True)


def carry_out(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Execute the run and return how it ended: ``finished``, ``diverged`` (at a step), ``refused`` or ``failed`` (and why)."""
    from pipeoptim.train import run

    try:
        # A comparison that is ended ends its runs at once, for it begins them anew.
        run(replace(config, stop_signals=""), folder, resume=_can_continue(config, folder), progress=False)
    except PipeOptimError as error:
        return _ended(error, folder)
    except Exception as error:
        traceback.print_exc()
        folder.mkdir(parents=True, exist_ok=True)
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    if not config.checkpoint_every:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a comparison keeps figures, not weights
    return {"status": "finished", "step": config.steps}


def _can_continue(config: TrainConfig, folder: Path) -> bool:
    """Whether what an interruption left can be resumed; if not, it is removed."""
    from pipeoptim.checkpoint import find

    if folder.exists() and config.checkpoint_every:
        meta = find(folder / "checkpoints").meta
        if meta is not None and meta.config == config.fingerprint() and meta.step < config.steps:
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _ended(error: PipeOptimError, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    diverged = _DIVERGED.search(str(error))
    if diverged:
        return {"status": "diverged", "step": int(diverged[1]), "reason": diverged[0]}
    return {"status": "refused" if isinstance(error, ConfigError) else "failed", "reason": str(error)}


if __name__ == "__main__":
    main()
