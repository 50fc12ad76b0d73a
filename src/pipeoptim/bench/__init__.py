"""Speed and memory, measured: every figure is a ratio of medians within one run, kept with its raw samples as JSON."""
