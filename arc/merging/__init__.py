"""Merging: an adapter into its base, the probe of the trained model, and the proof of a merge."""
