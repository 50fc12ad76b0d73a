"""Translation by GNMT with 8 and 16 layers: recurrent stages, attention, several tensors between two stages."""

from __future__ import annotations

from pipeoptim.config import TrainConfig, recipe
from pipeoptim_zoo.recipes._paper import wmt16_adam
from pipeoptim_zoo.recipes._tiny import on_unicode_names


@recipe
def gnmt8_wmt16(tiny: bool = False) -> TrainConfig:
    """GNMT with 8 LSTM layers (194 million weights, 4 stages) translates WMT-16 English to German with Adam, as in the paper.

    Source and deviations: ``_paper``, ``_paper.wmt16_adam``.
    Tiny: width 64, lr 0.003; from Unicode's description of a character to its name.
    """
    config = wmt16_adam("gnmt8_wmt16", "pipeoptim_zoo.models.gnmt:gnmt8")
    return on_unicode_names(config, steps=400, lr=0.003, width=64) if tiny else config


@recipe
def gnmt16_wmt16(tiny: bool = False) -> TrainConfig:
    """GNMT with 16 LSTM layers (278 million weights, 4 stages) translates WMT-16 English to German with Adam, as in the paper.

    As ``gnmt8_wmt16``. Tiny: all 16 layers, width 48.
    """
    config = wmt16_adam("gnmt16_wmt16", "pipeoptim_zoo.models.gnmt:gnmt16")
    return on_unicode_names(config, steps=350, lr=0.003, width=48) if tiny else config
