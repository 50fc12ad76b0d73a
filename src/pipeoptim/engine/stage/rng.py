"""Random numbers of one stage, apart from everybody else's.

Each stage draws (dropout) from a state of its own. So the emulator, where all stages share one process, draws what separate
processes draw, and the user's own random numbers (shuffling) change nothing in the stages, nor they in them.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError

_cpu = torch.default_generator
_STRIDE = 1_000_003  # keeps the seeds of the stages of neighbouring user seeds apart
_REPLICA_STRIDE = 7_368_787_000_003  # and those of the replicas


class StageRandom:
    """The generator state of stage ``k``, used on ``device``.

    Args:
        seed: of the whole run; the same on every stage.
        k: the stage.
        device: where the stage computes.
        replica: which of the stage's replicas, 0 where there is one.

    Raises:
        ConfigError: the seed is no integer.
    """

    def __init__(self, seed: int, k: int, device: torch.device, replica: int = 0) -> None:
        try:
            # index(), not int(): 1.5 and "1" are refused, NumPy's integers are taken.
            seed = operator.index(seed)
        except TypeError:
            raise ConfigError(f"seed is {seed!r}, must be an integer, or None for torch's initial seed") from None
        self.device = device if device.type == "cuda" else None
        own = (seed + _STRIDE * (k + 1) + _REPLICA_STRIDE * replica) % 2**63
        # As a state and not as a generator: dropout knows no generator= argument, it draws from torch's default one.
        self.cpu = torch.Generator().manual_seed(own).get_state()
        self.cuda = torch.Generator(device).manual_seed(own).get_state() if self.device is not None else None
        self._outer = self.cpu
        self._outer_cuda: Tensor | None = None

    def seeded_draws(self) -> StageRandom:
        """Draw from the stage's state inside the block; the caller's state is back afterwards."""
        return self

    def __enter__(self) -> None:
        self._outer = _cpu.get_state()
        # The default generator is shared by all threads: what the user draws in another one meanwhile is not separated.
        _cpu.set_state(self.cpu)
        if self.device is not None and self.cuda is not None:
            self._outer_cuda = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(self.cuda, self.device)

    def __exit__(self, *_: object) -> None:
        self.cpu = _cpu.get_state()
        _cpu.set_state(self._outer)
        if self._outer_cuda is not None and self.device is not None:
            self.cuda = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(self._outer_cuda, self.device)
            self._outer_cuda = None

    def state_dict(self) -> dict[str, Tensor | None]:
        """The state as plain tensors."""
        return {"cpu": self.cpu, "cuda": self.cuda}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Continue from a saved state. A state saved without a GPU leaves the GPU's seed as it is."""
        cpu = state["cpu"]
        assert cpu is not None
        self.cpu = cpu
        if self.cuda is not None and state["cuda"] is not None:
            self.cuda = state["cuda"]
