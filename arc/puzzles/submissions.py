"""Submissions in Kaggle's format: puzzle id -> for each test input {"attempt_1": rows, "attempt_2": rows}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arc.puzzles.grids import Grids, Puzzle

ATTEMPTS = ("attempt_1", "attempt_2")

Submission = dict[str, list[dict[str, list[list[int]]]]]


def empty_submission(challenge: Mapping[str, Puzzle]) -> Submission:
    """A submission whose attempts are all [[0]]."""
    return {name: [{attempt: [[0]] for attempt in ATTEMPTS} for _ in p["test"]] for name, p in challenge.items()}


def fill_submission(results: Mapping[str, Any], submission: Submission) -> None:
    """Write guesses into a submission, in place.

    Args:
        results: puzzle id -> test index -> guesses, best first, each {"output": grid}. Guesses beyond the attempts are
            ignored.
        submission: as `empty_submission` gives it.

    Raises:
        ValueError: a puzzle or test index that the submission lacks.
    """
    for puzzle, tests in results.items():
        targets = submission.get(puzzle, [])
        if len(tests) > len(targets):
            raise ValueError(f"results of {puzzle}: {len(tests)} tests, the submission has {len(targets)}")
        for target, guesses in zip(targets, tests, strict=False):
            for attempt, guess in zip(ATTEMPTS, guesses, strict=False):
                target[attempt] = np.asarray(guess["output"]).tolist()


def score_submission(submission: Mapping[str, Any], solutions: Mapping[str, Grids]) -> float:
    """Of each puzzle the share of its tests that an attempt solves, summed.

    Raises:
        ValueError: no solutions, or a puzzle, test or attempt that the submission lacks.
    """
    if not solutions:
        raise ValueError("there are no solutions to compare with: load_solutions first")
    score = 0.0
    for puzzle, grids in solutions.items():
        for number, grid in enumerate(grids):
            try:
                attempts = [submission[puzzle][number][attempt] for attempt in ATTEMPTS]
            except (KeyError, IndexError, TypeError):
                raise ValueError(f"the submission has no {' and '.join(ATTEMPTS)} of {puzzle}, test {number}") from None
            # Lists as JSON has them: an array of ragged rows would not compare but raise.
            score += any(np.asarray(a, dtype=object).tolist() == grid.tolist() for a in attempts) / len(grids)
    return score
