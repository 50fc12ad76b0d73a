"""Data parallelism of a stage: its replicas, and how their gradients become one."""
