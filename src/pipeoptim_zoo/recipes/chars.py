"""The default recipe: language modelling with nothing to download.

As many micro-batches as stages: then only the first three of a mini-batch run on weights that are one update old, and the
pipeline is as full as with one. With ``--microbatches 1`` every mini-batch of stage 0 is three updates late, which costs much.
"""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import Component, TrainConfig, recipe

CONTEXT = 64


@recipe
def chars(tiny: bool = False) -> TrainConfig:
    """A character-level GPT (0.8 million weights, 4 stages) learns the source of Python's standard library.

    Tiny: half the width and the context, 300 steps.
    """
    config = TrainConfig(
        recipe="chars",
        model=Component(
            "pipeoptim_zoo.models.gpt:gpt",
            {"vocab_size": 98, "context": CONTEXT, "width": 128, "layers": 4, "heads": 4, "dropout": 0.0},
        ),
        data=Component("pipeoptim_zoo.data.stdlib_text:chars", {"context": CONTEXT}),
        optimizer=Component("adamw", {"lr": 3e-3, "weight_decay": 0.01}),
        lr_schedule=Component("cosine", {"warmup": 50, "final": 0.1}),
        stages=4,
        microbatches=4,
        prediction="in_progress",
        batch_size=32,
        steps=1000,
        eval_every=100,
        eval_batches=8,
        checkpoint_every=250,
    )
    if not tiny:
        return config
    return replace(
        config,
        model=config.model.with_options(width=64, context=32),
        data=config.data.with_options(context=32, max_bytes=1_000_000),
        lr_schedule=config.lr_schedule.with_options(warmup=25),
        steps=300,
        eval_every=60,
        checkpoint_every=0,
    )
