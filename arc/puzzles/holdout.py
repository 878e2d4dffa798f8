"""The choice of held-out puzzles: seeded, it depends on the names of tasks and puzzles alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arc.puzzles.keys import seeded_rank


def choose_heldout(
    puzzles: Mapping[str, Sequence[str]], examples: int, tasks: int, seed: int
) -> tuple[set[str], set[str]]:
    """Choose puzzles to hold out; see `ArcDataset.holdout`, also for its errors. `puzzles` maps tasks to puzzles.

    Returns:
        The chosen puzzles of the tasks that stay, and all puzzles of the chosen tasks.
    """
    if not 0 <= tasks < max(len(puzzles), 1):
        raise ValueError(f"{tasks:,} tasks to hold out, expected 0 to the maximum of {max(len(puzzles) - 1, 0):,}")
    ranked = sorted(puzzles, key=lambda task: seeded_rank(seed, task))
    stay = ranked[tasks:]
    whole = all(len(puzzles[task]) == 1 for task in stay)  # every puzzle is a task of its own
    candidates = []  # one puzzle of every task, then a second one of every task, ...
    for place, task in enumerate(stay):
        ordered = sorted(puzzles[task], key=lambda puzzle: seeded_rank(seed, puzzle))
        candidates += [(turn, place, puzzle) for turn, puzzle in enumerate(ordered[: None if whole else -1])]
    maximum = max(len(candidates) - 1, 0) if whole else len(candidates)
    if not 0 <= examples <= maximum:
        expected = f"0 to the maximum of {maximum:,} beside {tasks} tasks"
        raise ValueError(f"{examples:,} examples to hold out, expected {expected}")
    seen = {puzzle for _, _, puzzle in sorted(candidates)[:examples]}
    return seen, {puzzle for task in ranked[:tasks] for puzzle in puzzles[task]}
