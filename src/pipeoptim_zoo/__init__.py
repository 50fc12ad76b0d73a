"""Models, data sets and recipes to run PipeOptim on. Never imported by ``pipeoptim`` itself.

* ``pipeoptim_zoo.models``: every model is a flat sequence of blocks and may be cut between any two of them.
* ``pipeoptim_zoo.data``: every data set is a :class:`~pipeoptim_zoo.data.task.Task`; its batches depend on
  ``(seed, step)`` alone, so that each process of a pipeline, and a resumed run, sees the same ones.
"""
