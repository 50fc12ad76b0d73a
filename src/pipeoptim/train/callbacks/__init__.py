"""What is called at the events of a run: one file per callback that comes along, each with its ``CALLBACK``.

One of your own is a subclass of :class:`Callback`, named as ``module:Class``, or given to :func:`pipeoptim.train.run`.
"""

from pipeoptim.train.callbacks.callback import Callback, RunView
from pipeoptim.train.callbacks.registry import CALLBACKS, make_callbacks

__all__ = ["CALLBACKS", "Callback", "RunView", "make_callbacks"]
