"""What computes: the hardware and versions that figures are told with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from pipeoptim.version import __version__


def machine() -> dict[str, Any]:
    """The hardware and versions of this process."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pipeoptim": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
