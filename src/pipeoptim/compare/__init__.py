"""Compares methods: the same recipe, optimizer and seeds under each of them.

``plan`` lists the runs, ``pool`` executes them in worker processes, ``outcome`` reads what each left behind,
``statistics`` summarizes the seeds, ``summary`` and ``report`` write the results down. Nothing here imports torch when imported.
"""

from pipeoptim.compare.settings import ComparisonSettings

__all__ = ["ComparisonSettings"]
