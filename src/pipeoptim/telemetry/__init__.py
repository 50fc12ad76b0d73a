"""Observing a run: ``metrics.jsonl``, a progress bar, a loss curve, a summary."""
