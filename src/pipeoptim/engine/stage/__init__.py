"""One stage: its numerics, its update, and what a training loop adds to them."""
