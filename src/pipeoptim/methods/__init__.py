"""The methods, each as data that the engine interprets: one short module per method in ``catalog/``, found automatically.

``METHODS`` maps a name to its :class:`Method`. A method of your own is a ``Method(...)`` in your own file: pass the object
where a name is expected, or :func:`register_method` it to use it by name.
"""

from pipeoptim.methods.facts import WeightPasses, copies, gap, mean_gap, refresh_every, weight_passes
from pipeoptim.methods.lookup import get_method
from pipeoptim.methods.method import Method
from pipeoptim.methods.predictor_context import PredictorContext
from pipeoptim.methods.registry import METHODS, register_method

__all__ = [
    "METHODS",
    "Method",
    "PredictorContext",
    "WeightPasses",
    "copies",
    "gap",
    "get_method",
    "mean_gap",
    "refresh_every",
    "register_method",
    "weight_passes",
]
