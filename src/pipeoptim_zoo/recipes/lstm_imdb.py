"""A residual LSTM on IMDb, with either optimizer of the paper: recurrent stages, a mask that travels with the features."""

from __future__ import annotations

from pipeoptim.config import Component, TrainConfig, recipe
from pipeoptim_zoo.recipes._paper import imdb_lstm
from pipeoptim_zoo.recipes._tiny import on_packages


@recipe
def lstm_imdb_adam(tiny: bool = False) -> TrainConfig:
    """A residual LSTM (8 layers, 9 million weights, 4 stages) on IMDb with Adam.

    Source and deviations: ``_paper``, ``_paper.imdb_lstm``.
    Tiny: 4 layers of 48 units tell from which package of the standard library 64 characters are; dropout 0.1, lr 0.003.
    """
    return _lstm("lstm_imdb_adam", Component("adam", {"lr": 1e-3}), tiny)


@recipe
def lstm_imdb_adamw(tiny: bool = False) -> TrainConfig:
    """A residual LSTM (8 layers, 9 million weights, 4 stages) on IMDb with AdamW.

    As ``lstm_imdb_adam``, with the weight decay of the paper's other runs with AdamW.
    """
    return _lstm("lstm_imdb_adamw", Component("adamw", {"lr": 1e-3, "weight_decay": 5e-4}), tiny)


def _lstm(name: str, optimizer: Component, tiny: bool) -> TrainConfig:
    config = imdb_lstm(name, optimizer)
    return on_packages(config, steps=500, lr=0.003, width=48, layers=4, dropout=0.1) if tiny else config
