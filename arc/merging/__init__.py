"""Merging: an adapter is added to its base, and the merge is proved. `python -m arc.merging --help` says how."""
