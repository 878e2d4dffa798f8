"""Supervised stages: the run, the trainer, batch planning, optimizers, logs."""
