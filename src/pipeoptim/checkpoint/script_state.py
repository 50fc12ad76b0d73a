"""What a training script keeps beside its pipeline (a data loader's place, the best accuracy so far), saved and loaded with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeoptim.checkpoint.stage_files import pack_stage
from pipeoptim.errors import ConfigError

KEY = "script"
"""Of it, in the file of the first stage of its process."""


class Stateful(Protocol):
    """An object with a state, as torch.distributed.checkpoint and torchdata name it."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors and plain data, in nested containers."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take over what :meth:`state_dict` returned."""


class ScriptState:
    """Of one process.

    Args:
        objects: by a name of the script's choice.

    Raises:
        ConfigError: one of them cannot be saved, or not be loaded.
    """

    def __init__(self, objects: Mapping[str, Stateful]) -> None:
        if not isinstance(objects, Mapping):
            raise ConfigError(f"state is a {type(objects).__name__}, must be a dictionary: {{'data': loader, 'best': best}}")
        for name, one in objects.items():
            if not isinstance(name, str):
                raise ConfigError(f"state has the name {name!r}, must be a string")
            for method in ("state_dict", "load_state_dict"):
                if not callable(getattr(one, method, None)):
                    raise ConfigError(
                        f"state[{name!r}] is a {type(one).__name__} without {method}(); give it one, or leave it out"
                    )
        self._objects = dict(objects)
        pack_stage({KEY: self.saved()})  # what cannot be saved is said before the first mini-batch

    def saved(self) -> dict[str, Any]:
        """The states as they are now."""
        return {name: one.state_dict() for name, one in self._objects.items()}

    def check(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Raises ConfigError where ``saved``, of a checkpoint in ``folder``, has others."""
        advice = "give state= as it was when that was saved, or choose another folder"
        for name in self._objects:
            if name not in saved:
                raise ConfigError(f"state[{name!r}] is not in checkpoint {folder}; {advice}")
        for name in saved:
            if name not in self._objects:
                raise ConfigError(f"checkpoint {folder} holds a state {name!r}, and no such object is in state; {advice}")

    def load(self, saved: Mapping[str, Any]) -> None:
        """Hand every object its state."""
        for name, one in self._objects.items():
            one.load_state_dict(saved[name])
