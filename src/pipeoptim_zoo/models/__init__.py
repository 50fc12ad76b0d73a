"""Models as flat sequences of blocks: ``pipeoptim_zoo.models.<family>.<constructor>``.

The modules are not re-exported here, because most constructors bear their module's name.
"""
