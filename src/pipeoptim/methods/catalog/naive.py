"""Asynchronous 1F1B without any correction: the lower bound for quality, the upper bound for speed and memory.

``W(t+s+1) = W(t+s) - lr * g``, where g is no gradient at any one point: F of the stage ran on ``W(t)``, B runs on ``W(t+s)``.
"""

from pipeoptim.methods.method import Method
from pipeoptim.weights.sources import Latest

METHOD = Method(
    name="naive",
    order="async_1f1b",
    forward=Latest(),
    backward=Latest(),
    summary="latest weights in F and in B, though they differ",
    source="the asynchronous baseline of PipeMare (arXiv 1910.05124) and others",
    deviations="None.",
)
