"""Puzzles: files, formats, keys, views, text, token ids, splits, leaks and pictures. numpy only, never torch."""
