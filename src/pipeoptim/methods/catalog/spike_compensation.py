"""Spike compensation with linear weight prediction (Kosson et al., MLSys 2021): late gradients get the share of momentum they missed.

``W_hat(t+s) = W_t - lr * s * v_t`` in F, the latest weights in B, and ``W -= lr (m^s v + (1 - m^s)/(1 - m) g)`` as the update, v the
momentum buffer, m the momentum, s the version gap of the stage.
"""

from pipeoptim.methods.method import Method
from pipeoptim.optim import SpikeCompensation
from pipeoptim.weights.sources import Latest, Predicted


def spike_compensation(predict: bool = True) -> Method:
    """Spike compensation with its own setting.

    Args:
        predict: forwards run on predicted weights; off, on the latest (one copy).

    Example:
        >>> spike_compensation(predict=False).name
        'spike_compensation+no_prediction'
    """
    return Method(
        name="spike_compensation" if predict else "spike_compensation+no_prediction",
        order="async_1f1b",
        forward=Predicted() if predict else Latest(),
        backward=Latest(),
        compensation=SpikeCompensation,
        summary=(
            "predicted in F, latest in B, late gradients weighted as momentum would have; 2 copies"
            if predict
            else "latest weights in F and B, late gradients weighted as momentum would have; 1 copy"
        ),
        source="Kosson et al., Pipelined Backpropagation at Scale, MLSys 2021 (arXiv 2003.11666), LWP and SC combined",
        deviations=(
            "s is the gap counted in this engine's order, the mean over the micro-batches of a mini-batch in the update. The prediction is "
            "that of the optimizer's rule: with SGD and momentum the paper's velocity form (LWPv); prediction='displacement' is its weight "
            "form (LWPw). Adam and AdamW are this project's. Linear weight prediction alone is the method 'pipeoptim'."
        ),
    )


METHOD = spike_compensation()

FACTORY = spike_compensation
