"""Comparing methods: the same recipe, optimizer and seeds under each of them, and what came out.

``plan`` says which runs there are, ``pool`` does them in worker processes, ``outcome`` reads what each left behind,
``figures`` are the sums over them, ``summary`` and ``report`` write them down. Nothing here imports torch when imported.
"""

from pipeoptim.compare.settings import ComparisonSettings

__all__ = ["ComparisonSettings"]
