"""Evaluation: answers, selection, scores, the cache of results, the report."""
