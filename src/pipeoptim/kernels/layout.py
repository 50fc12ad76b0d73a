"""How jobs lie in memory: the structures of ``optim.c``, in its order. q = int64, P = address, i = int32, f = float.

A job of a step has a head that differs from parameter to parameter and a tail that a whole param group shares.
"""

from struct import Struct

ADAM_HEAD, ADAM_TAIL = Struct("@q6P"), Struct("@4i14f")
SGD_HEAD, SGD_TAIL = Struct("@q4P"), Struct("@2i12f")
MOVE = Struct("@q3P2i2f")
TERM = Struct("@2P4f")
FACTOR = Struct("@2f")

SIZES = [ADAM_HEAD.size + ADAM_TAIL.size, SGD_HEAD.size + SGD_TAIL.size, MOVE.size, TERM.size]

NO_PREDICTION, BY_RULE, BY_DISPLACEMENT, BY_TERMS = range(4)
