"""What is installed and active in this process, and why: what ``pipeoptim doctor`` shows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeoptim.errors import ConfigError
from pipeoptim.version import __version__

State = Literal["ok", "absent", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        state: ``"ok"``; ``"absent"``, which does no harm; ``"warning"``: works, but worse than it could; ``"broken"``.
        found: what is there, in few words.
        reason: why it is so, or what to do.
    """

    name: str
    state: State
    found: str
    reason: str = ""


def diagnose() -> list[Finding]:
    """All findings, in an order in which they explain one another.

    Example:
        >>> [finding.name for finding in diagnose()][:3]
        ['python', 'pipeoptim', 'torch']
    """
    findings = []
    for check in (_python, _pipeoptim, _torch, _threads, _kernels, _compiler, _cache, _distributed, _gpu, _triton):
        try:
            findings.append(check())
        except Exception as error:  # a diagnosis names what fails, and goes on
            findings.append(Finding(check.__name__.removeprefix("_"), "broken", type(error).__name__, _first_line(error)))
            if check is _torch:
                break  # nothing else can be asked
    return findings


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}", sys.executable)


def _pipeoptim() -> Finding:
    return Finding("pipeoptim", "ok", __version__, str(Path(__file__).parent))


def _torch() -> Finding:
    import torch

    if torch.version.cuda is not None:
        build = f"for CUDA {torch.version.cuda}"
    else:
        build = f"for ROCm {torch.version.hip}" if torch.version.hip is not None else "for CPUs"
    wanted = next((one for one in importlib.metadata.requires("pipeoptim") or [] if one.startswith("torch")), "torch")
    least = tuple(int(part) for part in wanted.partition(">=")[2].split(".") if part.isdigit())
    version = tuple(int(part) for part in str(torch.__version__).partition("+")[0].split(".")[: len(least)] if part.isdigit())
    if version < least:
        return Finding("torch", "broken", f"{torch.__version__}, built {build}", f"pipeoptim needs {wanted}; upgrade torch")
    return Finding("torch", "ok", f"{torch.__version__}, built {build}", str(Path(torch.__file__).parent))


def _threads() -> Finding:
    import torch

    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    found = f"{threads} per process, {cores} core{'s' * (cores > 1)}"
    chosen = os.environ.get("OMP_NUM_THREADS")
    reason = (
        f"OMP_NUM_THREADS is {chosen}" if chosen else "OMP_NUM_THREADS is not set; pipeoptim train sets it for its processes"
    )
    if threads > cores:
        return Finding(
            "threads", "warning", found, f"{reason}; more threads than cores wait for one another, set it to {cores}"
        )
    return Finding("threads", "ok", found, reason)


def _kernels() -> Finding:
    from pipeoptim.kernels.library import loaded_library

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say stands in the finding
        library = loaded_library()
    if library.entries is None:
        wanted = bool(library.remedy)
        return Finding(
            "kernels", "broken" if wanted else "absent", "off", "; ".join(filter(None, (library.reason, library.remedy)))
        )
    problem = _wrong_step()
    if problem:
        return Finding("kernels", "broken", f"{library.origin}, {library.variant}", problem)
    state: State = "warning" if "cannot be loaded" in library.reason else "ok"
    return Finding("kernels", state, f"{library.origin}, {library.variant}", library.reason)


def _wrong_step() -> str:
    """What is wrong with a step of the kernels beside the same one by torch; empty if nothing is."""
    import torch

    from pipeoptim.rules import Predictor

    first, second = (torch.nn.Parameter(torch.linspace(-1, 1, 1001)) for _ in range(2))
    ours, theirs = torch.optim.AdamW([first], lr=0.1), torch.optim.AdamW([second], lr=0.1)
    predictor = Predictor(ours, kind="none")
    for _ in range(3):
        first.grad, second.grad = torch.linspace(2, -3, 1001), torch.linspace(2, -3, 1001)
        predictor.step()
        theirs.step()
    if torch.allclose(first, second, rtol=1e-5, atol=1e-6):
        return ""
    return "a step of AdamW differs from torch's; set PIPEOPTIM_KERNELS=off and report this, with the output of this command"


def _compiler() -> Finding:
    from pipeoptim.kernels.compiler import BuildError, find_compiler

    try:
        return Finding("C compiler", "ok", find_compiler(), "needed only where no kernels came with the package")
    except BuildError as error:
        return Finding("C compiler", "absent", "none", f"needed only where no kernels came with the package; {error.remedy}")


def _cache() -> Finding:
    from pipeoptim.kernels.build import cache_folders, check_folder

    reason = ""
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_folder(folder)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} cannot be written to")
            return Finding("cache", "ok", str(folder), reason or "for kernels that are compiled on this machine")
        except OSError as error:
            reason = str(error)
    remedy = "kernels that must be compiled are compiled anew in every process; let PIPEOPTIM_CACHE name a folder that is yours alone"
    return Finding("cache", "warning", "none", f"{reason}; {remedy}")


def _distributed() -> Finding:
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("distributed", "broken", "none", "this build of torch has no torch.distributed; install another one")
    asked: dict[str, Callable[[], bool]] = {
        "gloo": dist.is_gloo_available,
        "nccl": dist.is_nccl_available,
        "mpi": dist.is_mpi_available,
    }
    backends = [name for name, is_there in asked.items() if is_there()]
    if "gloo" not in backends:
        return Finding(
            "distributed", "broken", ", ".join(backends) or "none", "processes need gloo; install another build of torch"
        )
    return Finding("distributed", "ok", ", ".join(backends), "backends of torch.distributed")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        return Finding("GPU", "absent", "none", "no device or no driver is found" if built else "this torch is built for CPUs")
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return Finding("GPU", "ok", ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)))


def _triton() -> Finding:
    import torch

    if importlib.util.find_spec("triton") is not None:
        return Finding("Triton", "ok", importlib.metadata.version("triton"), "for the kernel of predictions on GPUs")
    if torch.cuda.is_available():
        return Finding(
            "Triton", "warning", "none", "predictions on the GPU take several passes; install the triton of this torch"
        )
    return Finding("Triton", "absent", "none", "only the kernel of predictions on GPUs needs it")


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or ["no reason given"])[0]
    return text if isinstance(error, ConfigError) else f"{text}; install pipeoptim and its dependencies anew"
