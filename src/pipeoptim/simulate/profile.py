"""What a model costs on a device, block by block: the file that ``pipeoptim profile`` writes and ``pipeoptim simulate`` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.files import read_object, write_durably
from pipeoptim.simulate.figures import LEAST, MOST, is_divisor, is_figure
from pipeoptim.version import __version__

FORMAT = 2

MOST_SPREAD = 10.0
"""Sigma of a log-normal factor: one draw in six is then more than e^10."""

UNITS = {
    "forward": "seconds of a micro-batch, one number per entry of rows",
    "backward": "seconds of a micro-batch, one number per entry of rows",
    "output_bytes": "bytes that a micro-batch hands to the next block",
    "gradient_bytes": "bytes of its gradient on the way back",
    "saved_bytes": "bytes that a stage of this block keeps of a micro-batch from F to B",
    "shared_bytes": "bytes of them less where the block before is on the same stage",
    "weight_bytes": "bytes",
    "fixed": "seconds per call",
    "per_byte": "seconds per byte of weights",
    "state_bytes": "bytes of the optimizer's state per byte of weights",
    "latency": "seconds from the end of a message's last byte to its arrival",
    "bandwidth": "bytes per second of each link and direction; null: no limit",
    "handling": "seconds per byte that a message costs its sender, and as many its receiver",
    "action": "seconds that the engine itself adds to each F, B and U",
    "spread": "sigma of a log-normal factor on the seconds of F and B",
}


@dataclass(frozen=True)
class BlockProfile:
    """One block. Where a field is a tuple, it has an entry for each of the profile's ``rows``; units are in UNITS."""

    name: str
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    output_bytes: tuple[float, ...]
    gradient_bytes: tuple[float, ...]
    saved_bytes: tuple[float, ...]
    shared_bytes: tuple[float, ...]
    weight_bytes: float


@dataclass(frozen=True)
class PassCost:
    """Seconds of one pass over the weights of a stage: ``fixed + per_byte * bytes``."""

    fixed: float
    per_byte: float

    def seconds(self, weight_bytes: float) -> float:
        """Of a stage with so many bytes of weights."""
        return self.fixed + self.per_byte * weight_bytes


@dataclass(frozen=True)
class OptimizerProfile:
    """What an update costs: its step, a prediction, a copy of the weights; and how large its state is.

    ``rule_step`` is a step of a method that predicts by a rule, which one kernel makes together with the prediction; None: as ``step``.
    """

    name: str
    step: PassCost
    predict: PassCost
    copy: PassCost
    state_bytes: float
    rule_step: PassCost | None = None


@dataclass(frozen=True)
class LinkProfile:
    """A link between two devices, in each direction, and what a message costs the processes at its ends."""

    latency: float
    bandwidth: float | None
    handling: float = 0.0


@dataclass(frozen=True)
class Profile:
    """A model on a device.

    Attributes:
        model: its name.
        synthetic: whether the figures come from a formula and not from a measurement.
        batch_rows: rows of a mini-batch.
        rows: sizes of micro-batches that the blocks have figures for, ascending.
        blocks: in their order.
        optimizer, link: as they say.
        action: seconds that the engine adds to each F, B and U.
        spread: sigma of a log-normal factor on F and B.
        made: by which versions, on what, by which formula; ``train``: options of ``pipeoptim train`` that name the same run, if there are.
    """

    model: str
    synthetic: bool
    batch_rows: int
    rows: tuple[int, ...]
    blocks: tuple[BlockProfile, ...]
    optimizer: OptimizerProfile
    link: LinkProfile
    action: Mapping[str, float] = field(default_factory=lambda: {"F": 0.0, "B": 0.0, "U": 0.0})
    spread: float = 0.0
    made: Mapping[str, Any] = field(default_factory=dict)

    def at(self, values: Sequence[float], rows: float) -> float:
        """A figure of a block for a micro-batch of ``rows``, between the sizes that there are figures for.

        Raises:
            ConfigError: there are none of such sizes.
        """
        place = _place(self.rows, rows)
        if place is None:
            m = self.batch_rows / rows
            advice = f", or profile the model with --microbatches {m:g} as well" if m >= 1 and m.is_integer() else ""
            raise ConfigError(
                f"the profile of {self.model} has micro-batches of {_range(self.rows)} rows, none of {rows:g}; choose another number of "
                f"micro-batches{advice}"
            )
        upper, share = place
        return values[upper] if share == 0 else values[upper] - share * (values[upper] - values[upper - 1])

    def to_dict(self) -> dict[str, Any]:
        """As plain data that explains itself."""
        return {"format": FORMAT, "pipeoptim": __version__, "units": UNITS, **asdict(self)}

    def write(self, path: Path) -> Path:
        """As JSON; whole or not at all.

        Raises:
            OSError: no space, no permission.
        """
        write_durably(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path


@lru_cache(maxsize=256)
def _place(known: tuple[int, ...], rows: float) -> tuple[int, float] | None:
    """The smallest size of at least ``rows``, and how far down to the next smaller one it lies; None outside of them."""
    if not known[0] <= rows <= known[-1]:
        return None
    upper = next(n for n, size in enumerate(known) if size >= rows)
    return upper, 0.0 if known[upper] == rows else (known[upper] - rows) / (known[upper] - known[upper - 1])


def _range(rows: Sequence[int]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"


def read_profile(path: Path) -> Profile:
    """What :meth:`Profile.write` wrote.

    Raises:
        ConfigError: there is no such file; it is damaged, of another format, or holds a figure that cannot be.
    """
    try:
        data = read_object(path)
    except OSError as error:
        raise ConfigError(
            f"the profile {path} cannot be read ({error.strerror}); make it with pipeoptim profile --out {path}"
        ) from error
    if data.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is no profile of format {FORMAT} (it says {data.get('format')!r}); make it anew with pipeoptim profile"
        )
    try:
        return checked(profile_of(data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); make it anew with pipeoptim profile"
        ) from error


def profile_of(data: dict[str, Any]) -> Profile:
    """What :meth:`Profile.to_dict` returned, unchecked."""

    def block(entry: dict[str, Any]) -> BlockProfile:
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        return BlockProfile(**values)

    optimizer: dict[str, Any] = {key: PassCost(**v) if isinstance(v, dict) else v for key, v in data["optimizer"].items()}
    own = {one.name: data[one.name] for one in fields(Profile)}
    return Profile(
        **{
            **own,
            "rows": tuple(data["rows"]),
            "blocks": tuple(map(block, data["blocks"])),
            "optimizer": OptimizerProfile(**optimizer),
            "link": LinkProfile(**data["link"]),
        }
    )


def checked(found: Profile) -> Profile:
    """The same.

    Raises:
        ConfigError: it holds a figure that cannot be.
    """
    if not found.blocks:
        raise ConfigError("a profile needs at least one block")
    if not found.rows or list(found.rows) != sorted(set(found.rows)):
        raise ConfigError(f"rows is {list(found.rows)}, must be sizes of micro-batches in ascending order")
    for what, value, least in _figures(found):
        if not is_figure(value) or value < least:
            raise ConfigError(f"{what} is {value!r}, must be a number of at least {least:g} and at most {MOST:g}")
    for what, value in (("batch_rows", found.batch_rows), *(("an entry of rows", size) for size in found.rows)):
        if not isinstance(value, int):
            raise ConfigError(f"{what} is {value!r}, must be a whole number")
    named = found.made.get("train", []) if isinstance(found.made, Mapping) else None
    if not isinstance(named, list) or not all(isinstance(word, str) for word in named):
        raise ConfigError(
            f"made is {found.made!r}, must be an object whose train, if it has any, is a list of options of pipeoptim train"
        )
    if found.spread > MOST_SPREAD:
        raise ConfigError(f"spread is {found.spread:g}, must be at most {MOST_SPREAD:g}")
    if found.link.bandwidth is not None and not is_divisor(found.link.bandwidth):
        raise ConfigError(
            f"bandwidth of the link is {found.link.bandwidth!r}, must be a number above 0 (at least {LEAST:g}), or null for no limit"
        )
    return found


def _figures(found: Profile) -> list[tuple[str, Any, float]]:
    """Name, value and least value of every figure."""
    figures: list[tuple[str, Any, float]] = [("batch_rows", found.batch_rows, 1), ("spread", found.spread, 0)]
    figures += [("an entry of rows", size, 1) for size in found.rows]
    for block in found.blocks:
        for name, value in asdict(block).items():
            if name in ("name", "weight_bytes"):
                continue
            if not isinstance(value, tuple):
                raise ConfigError(
                    f"{name} of block {block.name} is {value!r}, must be a list with a number for each entry of rows"
                )
            if len(value) != len(found.rows):
                raise ConfigError(f"{name} of block {block.name} has {len(value)} numbers for {len(found.rows)} sizes")
            figures += [(f"{name} of block {block.name}", one, 0) for one in value]
        figures.append((f"weight_bytes of block {block.name}", block.weight_bytes, 0))
    for kind in ("step", "predict", "copy", *(["rule_step"] if found.optimizer.rule_step is not None else [])):
        figures += [(f"{part} of {kind}", value, 0) for part, value in asdict(getattr(found.optimizer, kind)).items()]
    figures += [("state_bytes", found.optimizer.state_bytes, 0), ("latency of the link", found.link.latency, 0)]
    figures.append(("handling of the link", found.link.handling, 0))
    return figures + [(f"action {kind}", found.action[kind], 0) for kind in ("F", "B", "U")]
