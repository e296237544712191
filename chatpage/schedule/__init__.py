"""Which sequence computes which tokens in a step. Pure Python."""
