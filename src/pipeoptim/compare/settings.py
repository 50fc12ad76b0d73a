"""The settings of a comparison: one frozen value that survives a JSON round trip. Its folder refuses any other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError

#: Options of a comparison that may change when it is continued: they change how it is read, not what is run.
MAY_CHANGE = ("target",)


@dataclass(frozen=True)
class ComparisonSettings:
    """Everything that determines the runs of a comparison, and how they are read.

    Args:
        config: what all runs share; its method and seed are replaced by those of each run.
        methods: names, in the order of the tables.
        seeds: one run per method and seed.
        same_optimizer: methods that bring their own optimizer use that of ``config`` instead.
        own_lr: learning rate of such optimizers; None for that of ``config`` where it is of Adam's family, else 0.001.
        target: validation loss whose first crossing is timed; None for what the synchronous method reaches.

    Example:
        >>> from pipeoptim.config import Component
        >>> config = TrainConfig("mine", model=Component("m:f"), data=Component("d:f"), optimizer=Component("sgd"))
        >>> settings = ComparisonSettings(config, methods=("gpipe", "pipeoptim"), seeds=(0, 1))
        >>> ComparisonSettings.from_json(settings.to_json()) == settings
        True
    """

    config: TrainConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    same_optimizer: bool = False
    own_lr: float | None = None
    target: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        config = json.loads(replace(self.config, method="", seed=0).to_json())
        return {**asdict(self), "config": config, "methods": list(self.methods), "seeds": list(self.seeds)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ComparisonSettings:
        """What :meth:`to_json` returned, after a trip through JSON; method and seed of ``config`` are not kept."""
        config = TrainConfig.from_json(json.dumps({**data["config"], "method": "pipeoptim"}))
        return cls(**{**data, "config": config, "methods": tuple(data["methods"]), "seeds": tuple(data["seeds"])})


def check_continues(old: ComparisonSettings, new: ComparisonSettings, where: str) -> None:
    """Methods and seeds may be added to a comparison; all else must be as it was.

    Raises:
        ConfigError: ``new`` is another comparison than the ``old`` one in ``where``.
    """
    remedy = "choose another folder with --out"
    for what, before, now in (("methods", old.methods, new.methods), ("seeds", old.seeds, new.seeds)):
        missing = [str(value) for value in before if value not in now]
        if missing:
            given = ",".join(map(str, now))
            raise ConfigError(
                f"--{what} is {given}, but the comparison in {where} also has {', '.join(missing)}; name them too, or {remedy}"
            )
    a, b = _flat(old.to_json()), _flat(new.to_json())
    for key in sorted(a.keys() | b.keys()):
        if key.split(".")[0] not in ("methods", "seeds", *MAY_CHANGE) and a.get(key) != b.get(key):
            name = key.removeprefix("config.").removesuffix(".target").replace(".options.", " ")
            raise ConfigError(f"{name} is {b.get(key)}, but the comparison in {where} has {a.get(key)}; {remedy}")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
