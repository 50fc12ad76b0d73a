"""The optimizer step and the prediction after it in one pass over memory."""
