"""How an optimizer moves a weight: ``W_hat(t+s) = W_t - lr * s * dW_t`` from the optimizer's own state.

`predict_weights` is the pure function, `Predictor` the same for an engine. One file per optimizer family; a rule answers with a
`Move` (plain data), which `interpreters` carry out:

    Predictor ── Horizon (steps, rates, scale, ...) ──► ask_rule ──► Rule.move ──► Move ──► MoveBatch ──► C kernel, Triton, torch
        └─────── fused/: optimizer step and prediction in one pass; asks rules at the same place

Imports nothing else of this library but `errors`, `kernels` and `optim`.
"""

from pipeoptim.rules import (
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    asgd,
    muon,
    nadam,
    radam,
    refused,
    rmsprop,
    rotated_adam,
    rprop,
    sgd,
)
from pipeoptim.rules.clip_estimate import ClipEstimate
from pipeoptim.rules.combined import CombinedOptimizer, muon_adamw
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.move import Ahead, Momentum, Move, PartialGradient, Scalar, Term
from pipeoptim.rules.predict import predict_weights
from pipeoptim.rules.predictor import Predictor
from pipeoptim.rules.registry import KINDS, REFUSED, RULES, PredictionKind, Rule, find_rule, register_rule
from pipeoptim.rules.tracking import Tracker, track

__all__ = [
    "KINDS",
    "REFUSED",
    "RULES",
    "Ahead",
    "ClipEstimate",
    "CombinedOptimizer",
    "Horizon",
    "PredictionKind",
    "Momentum",
    "Move",
    "PartialGradient",
    "Predictor",
    "Rule",
    "Scalar",
    "Term",
    "Tracker",
    "find_rule",
    "muon_adamw",
    "predict_weights",
    "register_rule",
    "track",
]

# Imported for what they register, not for their names.
_FAMILIES = (
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    asgd,
    muon,
    nadam,
    radam,
    refused,
    rmsprop,
    rotated_adam,
    rprop,
    sgd,
)
