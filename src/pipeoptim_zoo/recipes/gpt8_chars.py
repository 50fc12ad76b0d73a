"""A deeper language model than ``chars``: eight stages, where staleness costs most."""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import Component, TrainConfig, recipe

CONTEXT = 128


@recipe
def gpt8_chars(tiny: bool = False) -> TrainConfig:
    """A character-level GPT (8 layers, 6 million weights, 8 stages) learns the source of Python's standard library.

    Not in the paper. Nothing to download; on two cores it takes hours.
    Tiny: width 64, context 32, still eight layers, in 4 stages.
    """
    config = TrainConfig(
        recipe="gpt8_chars",
        model=Component(
            "pipeoptim_zoo.models.gpt:gpt",
            {"vocab_size": 98, "context": CONTEXT, "width": 256, "layers": 8, "heads": 8, "dropout": 0.1},
        ),
        data=Component("pipeoptim_zoo.data.stdlib_text:chars", {"context": CONTEXT, "max_bytes": 16_000_000}),
        optimizer=Component("adamw", {"lr": 1e-3, "weight_decay": 0.01}),
        lr_schedule=Component("cosine", {"warmup": 200, "final": 0.1}),
        stages=8,
        microbatches=8,
        batch_size=64,
        steps=5000,
        eval_every=250,
        eval_batches=16,
        checkpoint_every=500,
    )
    if not tiny:
        return config
    return replace(
        config,
        model=config.model.with_options(context=32, width=64, heads=4, dropout=0.0),
        data=config.data.with_options(context=32, max_bytes=1_000_000),
        optimizer=config.optimizer.with_options(lr=3e-3),
        lr_schedule=config.lr_schedule.with_options(warmup=25),
        stages=4,
        microbatches=4,
        batch_size=32,
        steps=300,
        eval_every=60,
        eval_batches=8,
        checkpoint_every=0,
    )
