"""PipeDream (Narayanan et al., SOSP 2019): weight stashing, so that the backward sees the weights its forward used.

B of a mini-batch on ``W(t)``, the weights of its F on that stage; its update, ``W(t+s+1) = W(t+s) - lr * g(W(t))``, applies to
the latest ones. With vertical sync t is the version of stage 0, the same on all stages.
"""

from pipeoptim.methods.method import Method
from pipeoptim.schedule import Program
from pipeoptim.weights.sources import Latest, Numbered, Stashed


def version_at_entry(program: Program, k: int, i: int) -> int:
    """Updates of stage 0 when it forwards micro-batch ``i``: the version that all stages use for it."""
    return program.version_at_forward(0, i)


def pipedream(vertical_sync: bool = False) -> Method:
    """PipeDream with its own setting.

    Args:
        vertical_sync: every stage uses the version that stage 0 had when the micro-batch entered.

    Example:
        >>> pipedream(vertical_sync=True).name
        'pipedream+vertical_sync'
    """
    if vertical_sync:
        return Method(
            name="pipedream+vertical_sync",
            order="async_1f1b",
            forward=Numbered(version_at_entry, counts=True),
            backward=Stashed(),
            summary="every stage uses the version that stage 0 had when the micro-batch entered",
            source="Narayanan et al., PipeDream, SOSP 2019, section 3.3, vertical sync",
            deviations="In the paper, absent from its public runtime; taken from the paper's description.",
        )
    return Method(
        name="pipedream",
        order="async_1f1b",
        forward=Latest(),
        backward=Stashed(),
        summary="latest weights in F, the same stashed ones in B; D-k copies",
        source="Narayanan et al., PipeDream, SOSP 2019 (arXiv 1806.03377), weight stashing",
        deviations="Vertical sync is off; it is the option vertical_sync, and the method pipedream+vertical_sync.",
    )


METHOD = pipedream()

VARIANTS = (pipedream(vertical_sync=True),)

FACTORY = pipedream
