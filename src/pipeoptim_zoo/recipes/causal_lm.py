"""A causal language model of Hugging Face Transformers on any text: the recipe for models and texts of one's own."""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import Component, TrainConfig, recipe

SMALL = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""A Llama of bytes: 256 of them, and the three special tokens of ByT5's tokenizer."""


@recipe
def causal_lm(tiny: bool = False) -> TrainConfig:
    """Any causal language model of Hugging Face Transformers on any text, from scratch, fine-tuned or by LoRA, in 4 stages.

    ``--set model.source=FOLDER --set data.text=FILES`` say which. As it stands, a small Llama (8 layers of width 256) reads the source
    of Python's standard library byte by byte.
    Tiny: 4 layers of width 64, context 64.
    """
    config = TrainConfig(
        recipe="causal_lm",
        model=Component("pipeoptim_zoo.models.causal_lm:causal_lm", {"source": SMALL}),
        data=Component("pipeoptim_zoo.data.text:packed_text", {"text": "stdlib", "context": 256}),
        optimizer=Component("adamw", {"lr": 1e-3, "weight_decay": 0.01}),
        lr_schedule=Component("cosine", {"warmup": 50, "final": 0.1}),
        stages=4,
        microbatches=4,
        prediction="in_progress",
        clip=1.0,
        clip_scope="global",  # per stage it would be another factor for each copy of a tied embedding
        batch_size=16,
        steps=1000,
        eval_every=100,
        eval_batches=8,
        checkpoint_every=250,
        export=True,
    )
    if not tiny:
        return config
    small = {**SMALL, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
    return replace(
        config,
        model=config.model.with_options(source=small),
        data=config.data.with_options(context=64),
        lr_schedule=config.lr_schedule.with_options(warmup=25),
        steps=300,
        eval_every=60,
        checkpoint_every=0,
    )
