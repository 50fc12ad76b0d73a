"""Optimizers whose step cannot be predicted at all, each with its reason."""

from __future__ import annotations

import torch

from pipeoptim.optim import ErrorFeedback
from pipeoptim.rules.registry import refuse

refuse(
    torch.optim.LBFGS,
    "its step re-evaluates the loss through a closure, several times per step, which no pipeline can do "
    "in mid-flight; use SGD, Adam or AdamW",
)
refuse(
    torch.optim.SparseAdam,
    "its gradients are sparse, and a weight that no index touched keeps stale moments; use Adam or AdamW "
    "with sparse=False in the embedding",
)
refuse(
    ErrorFeedback,
    "its weights lie ahead by the version gap already; use it with a method that predicts nothing, as pipedream_2bw or pipedream, or leave "
    "it out",
)
