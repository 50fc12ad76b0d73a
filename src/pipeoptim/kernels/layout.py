"""How jobs lie in memory: the structures of ``optim.c``, in its order. q = int64, P = address, i = int32, f = float.

Of a step, the place is a parameter's own, and how to step is what a whole param group shares.
"""

from struct import Struct

ADAM_PLACE, ADAM_HOW = Struct("@q4P"), Struct("@P4i14f")
SGD_PLACE, SGD_HOW = Struct("@q3P"), Struct("@2i12f")
MOVE = Struct("@q3P2i2f")
TERM = Struct("@2P4f")
FACTOR = Struct("@2f")

SIZES = [part.size for part in (ADAM_PLACE, ADAM_HOW, SGD_PLACE, SGD_HOW, MOVE, TERM)]

NO_PREDICTION, BY_RULE, BY_DISPLACEMENT, BY_TERMS = range(4)

CACHED, STREAMED, OVER_GRADIENT = 0, 1, 2
"""How a prediction is written (``enum into``)."""
