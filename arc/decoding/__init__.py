"""Decoding: search, greedy replies, sampling, scoring of replies, caches of keys and values."""
