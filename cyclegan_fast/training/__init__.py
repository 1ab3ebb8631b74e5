"""Losses, image pool, learning-rate rule, one training step, and the loop, checkpoints and reports around it."""
