"""How arguments lie in memory: the structures of ``optim.c``, field by field. q = int64, P = address, i = int32, f = float.

A step has one structure of addresses per parameter, and one of coefficients per param group.
"""

from struct import Struct

ADAM_TENSORS, ADAM_COEFFICIENTS = Struct("@q4P"), Struct("@P4i16f")
SGD_TENSORS, SGD_COEFFICIENTS = Struct("@q3P"), Struct("@2i14f")
ADDRESS = Struct("@P")  # of a prediction: the last field of the structures of addresses
DRY_ESTIMATE = Struct("@3f")  # the last fields of both coefficients
MOVE = Struct("@q3P2i2f")
TERM = Struct("@2P4f")
FACTOR = Struct("@2f")
ESTIMATE = Struct("@q3P4f")

SIZES = [part.size for part in (ADAM_TENSORS, ADAM_COEFFICIENTS, SGD_TENSORS, SGD_COEFFICIENTS, MOVE, TERM, ESTIMATE)]

NO_PREDICTION, BY_RULE, BY_DISPLACEMENT, BY_TERMS, DRY = range(5)

CACHED, STREAMED, OVER_GRADIENT = 0, 1, 2
"""Where a prediction is written (``enum into``): to a buffer, to a buffer past the caches, or over the gradient."""
