"""Puzzles made by rules, for the demo and for pretraining."""
