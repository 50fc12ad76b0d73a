"""A profile from a formula: a transformer of given sizes on a device of given speed. Nothing of it is measured, and it says so.

Of one block, with width h, sequence length L, b rows and e bytes per number (Narayanan et al., SC 2021, section 5.1 and appendix;
activations: Korthikanti et al., MLSys 2023, equation 1, here with an attention that does not keep its L x L scores):

- weights: ``12 h^2 + 13 h`` numbers; F: ``b L (24 h^2 + 4 h L)`` FLOP, B twice that,
- output: ``b L h e`` bytes; kept from F to B: ``17 b L h e`` bytes (34 b L h at two bytes per number).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from pipeoptim.errors import ConfigError, counted, unknown_name
from pipeoptim.simulate.figures import LEAST, MOST, is_divisor, is_figure
from pipeoptim.simulate.profile import BlockProfile, LinkProfile, OptimizerProfile, PassCost, Profile, checked

MOST_BLOCKS = 100_000


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of a transformer and of the devices and links that train it.

    Attributes:
        layers: blocks; 0 for one per stage.
        width, sequence: h and L.
        rows: sequences of a mini-batch.
        bytes: per number, of weights and activations.
        flops, efficiency: peak FLOP per second of a device, and the share of it that is reached.
        memory_bandwidth: bytes per second, for passes over the weights.
        latency, bandwidth: of links, in seconds and bytes per second.
    """

    layers: int = 0
    width: int = 4096
    sequence: int = 2048
    rows: int = 64
    bytes: int = 2
    flops: float = 312e12
    efficiency: float = 0.5
    memory_bandwidth: float = 2e12
    latency: float = 1e-5
    bandwidth: float = 25e9

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            may_be_zero = one.name in ("layers", "latency")
            if not is_figure(value) or not (may_be_zero or is_divisor(value)):
                least = "of at least 0" if may_be_zero else f"above 0 (at least {LEAST:g})"
                raise ConfigError(f"{one.name} is {value:g}, must be a number {least} and at most {MOST:g}")
        if self.efficiency > 1:
            raise ConfigError(f"efficiency is {self.efficiency:g}, must be at most 1: the share of the peak that is reached")


def read_sizes(text: str) -> TransformerSizes:
    """Sizes as they are written on the command line; what is not named keeps its default.

    Raises:
        ConfigError: an unknown name, or no number.

    Example:
        >>> read_sizes("width=1024, rows=8").width
        1024
    """
    known = {one.name: one for one in fields(TransformerSizes)}
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise unknown_name("size", name, known)
        whole = known[name].type == "int"
        try:
            number = float(value)
            found[name] = int(number) if whole else number
        except (ValueError, OverflowError):
            number = 0.5
        if name not in found or (whole and found[name] != number):
            kind = "a whole number" if whole else "a number"
            raise ConfigError(f"{name} is {value!r}, must be {kind}, as in {name}={known[name].default}")
    return TransformerSizes(**found)  # type: ignore[arg-type]


def synthetic(sizes: TransformerSizes, stages: int) -> Profile:
    """The profile of a transformer by the formulas above, with AdamW: its step passes over the weights seven times, a prediction four.

    Args:
        sizes: of model, devices and links.
        stages: blocks where ``sizes.layers`` is 0.

    Raises:
        ConfigError: too many blocks, or figures that are beyond all that can be reckoned with.

    Example:
        >>> synthetic(TransformerSizes(), stages=8).synthetic
        True
    """
    count = sizes.layers or stages
    if count > MOST_BLOCKS:
        raise ConfigError(
            f"{counted(count, 'block')} are more than the {MOST_BLOCKS:,} of a formula; give fewer layers or stages"
        )
    h, length, e = sizes.width, sizes.sequence, sizes.bytes
    weights = (12 * h * h + 13 * h) * e
    rows = (1, sizes.rows) if sizes.rows > 1 else (1,)
    forward = tuple(b * length * (24 * h * h + 4 * h * length) / (sizes.flops * sizes.efficiency) for b in rows)
    output = tuple(float(b * length * h * e) for b in rows)
    kept = tuple(17 * one for one in output)
    one_pass = 1 / sizes.memory_bandwidth
    blocks = tuple(
        BlockProfile(f"block {n}", forward, tuple(2 * f for f in forward), output, output, kept, (0.0,) * len(kept), weights)
        for n in range(count)
    )
    optimizer = OptimizerProfile(
        "AdamW",
        step=PassCost(0.0, 7 * one_pass),
        predict=PassCost(0.0, 4 * one_pass),
        copy=PassCost(0.0, 2 * one_pass),
        state_bytes=2.0,
    )
    found = Profile(
        model=f"transformer of width {h}",
        synthetic=True,
        batch_rows=sizes.rows,
        rows=rows,
        blocks=blocks,
        optimizer=optimizer,
        link=LinkProfile(sizes.latency, sizes.bandwidth),
        made={"formula": __name__, "sizes": asdict(sizes)},
    )
    if blocks:  # the first is as all of them
        checked(replace(found, blocks=blocks[:1]))
    return found
