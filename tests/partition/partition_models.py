"""Small models of the kinds that people bring, with random weights, and mini-batches for them."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeoptim.partitioning import BlockCost

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
WIDTH = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 32, "vocab_size": 40}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Case(NamedTuple):
    """A model, one mini-batch as positional and keyword arguments, its target, and a loss of output and target."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Tensor]
    target: Tensor
    loss: Any


def logits_loss(output, target):
    scores = output.logits if hasattr(output, "logits") else output
    return nn.functional.cross_entropy(scores.flatten(0, -2), target.flatten())


def _language(model, batch=4, length=7, mask=True) -> Case:
    ids = torch.randint(3, 40, (batch, length + 1))
    there = torch.ones(batch, length, dtype=torch.long)
    there[::2, length - 2 :] = 0
    kwargs = {"attention_mask": there} if mask else {}
    return Case(model.train(), (ids[:, :-1],), kwargs, ids[:, 1:].contiguous(), logits_loss)


def gpt2(tie=False) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=40, n_positions=32, tie_word_embeddings=tie, **off)
    return _language(GPT2LMHeadModel(config))


def llama(tie=False) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _language(LlamaForCausalLM(LlamaConfig(**WIDTH, num_key_value_heads=1, tie_word_embeddings=tie)), mask=False)


def bert() -> Case:
    from transformers import BertConfig, BertForTokenClassification

    return _language(BertForTokenClassification(BertConfig(**WIDTH, **QUIET, classifier_dropout=0.0, num_labels=40)))


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = {**WIDTH, **QUIET, "image_size": 8, "patch_size": 4, "num_labels": 5}
    config.pop("vocab_size")
    x, y = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
    return Case(ViTForImageClassification(ViTConfig(**config)).train(), (x,), {}, y, logits_loss)


def resnet101() -> Case:
    from pipeoptim_zoo.models.resnet import resnet101

    return Case(resnet101(32, 5, width=0.05), (torch.randn(4, 3, 32, 32),), {}, torch.randint(5, (4,)), logits_loss)


def gnmt8() -> Case:
    from pipeoptim_zoo.models.gnmt import gnmt8

    ids = torch.randint(1, 40, (4, 11))
    ids[::2, 4:6] = 0
    return Case(gnmt8(40, 6, width=8, dropout=0.0), (ids,), {}, torch.randint(40, (4, 5)), logits_loss)


def gpt2_tied() -> Case:
    return gpt2(tie=True)


CASES = {"gpt2": gpt2, "gpt2_tied": gpt2_tied, "llama": llama, "bert": bert, "vit": vit, "resnet101": resnet101, "gnmt8": gnmt8}


def case(name: str) -> Case:
    torch.manual_seed(5)
    return CASES[name]()


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


BLOCKS = {"gpt2": 5, "gpt2_tied": 5, "llama": 5, "bert": 5, "vit": 5, "resnet101": 36, "gnmt8": 11}


def equal_costs(name):
    """So that every process cuts at the same places without measuring."""
    return [BlockCost(str(i), 1.0, 2.0, 0, 0, 0) for i in range(BLOCKS[name])]


def feeds(case):
    """Five mini-batches; some are shorter."""
    for n in range(5):
        size = len(case.target) - (n % 3 == 2)
        yield [a[:size] for a in case.args], {key: a[:size] for key, a in case.kwargs.items()}, case.target[:size]
