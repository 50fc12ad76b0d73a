"""Translating with a trained model, greedily: enough to score it, and the same for every training method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeoptim_zoo.data.losses import PADDING
from pipeoptim_zoo.data.vocabulary import BEGIN, END

__all__ = ["greedy"]


@torch.no_grad()
def greedy(model: nn.Module, source: Tensor, target_length: int) -> Tensor:
    """The likeliest next id, ``target_length`` times: source ids ``[B, S]`` to target ids ``[B, target_length]``.

    ``model`` is a ``gnmt`` whose ``source_length`` is S, in evaluation mode. After END a sentence is PADDING. The whole
    sentence is computed again for each word, which costs ``target_length`` times more than it must, and needs
    nothing from the model but its ordinary forward.
    """
    out = torch.full((len(source), target_length + 1), PADDING, dtype=torch.int64, device=source.device)
    out[:, 0] = BEGIN
    done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    for place in range(target_length):
        logits = model(torch.cat([source, out[:, : place + 1]], dim=1))
        word = logits[:, -1].argmax(-1).masked_fill(done, PADDING)
        out[:, place + 1] = word
        done |= word == END
        if bool(done.all()):
            break
    return out[:, 1:]
