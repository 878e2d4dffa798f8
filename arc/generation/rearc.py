"""Pairs of re-arc (https://github.com/michaelhodel/re-arc) as a dataset in the course's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from arc.puzzles.files import list_rearc, read_tasks
from arc.puzzles.grids import MAX_SIDE

REARC_FILE = "rearc.txt"
REARC_HEADER = "# Made by demo/make_dataset.py from a re-arc folder."


def from_rearc(
    folder: Path, max_side: int, min_pairs: int
) -> tuple[dict[str, tuple[dict[str, Any], list[dict[str, Any]]]], dict[str, int]]:
    """Take the small pairs of re-arc's tasks, in their order.

    Args:
        folder: holds metadata.json and tasks/.
        max_side: largest side of any grid.
        min_pairs: tasks with fewer pairs are left out.

    Returns:
        By task name: the number of pairs taken and of all, and the pairs, each input once. And the tasks that are left
        out, each with its number of small pairs.

    Raises:
        FileNotFoundError, ValueError: settings out of range, bad files (named by file, pair and row), or no task left.
    """
    problems = [
        f"{flag} is {value}: expected {expected}"
        for flag, value, low, high, expected in (
            ("--max_side", max_side, 1, MAX_SIDE, f"1 to {MAX_SIDE}"),
            ("--min_pairs", min_pairs, 1, np.inf, "a whole number from 1"),
        )
        if not low <= value <= high
    ]
    if problems:
        raise ValueError("; ".join(problems))
    files = list_rearc(folder)
    store, parsed = read_tasks(files)
    tasks, left_out = {}, {}
    for path, task in zip(files, parsed, strict=True):
        if task.tests >= 0:
            raise ValueError(f"{path}: found a puzzle with train and test pairs, expected a list of pairs")
        pairs: dict[tuple[tuple[int, ...], bytes], dict[str, list[list[int]]]] = {}
        for first in range(task.first, task.first + 2 * task.pairs, 2):
            grid, solved = store.grid(first), store.grid(first + 1)
            if max(*grid.shape, *solved.shape) <= max_side:
                pairs.setdefault(
                    (grid.shape, grid.tobytes()), {"input": grid.tolist(), "output": solved.tolist()}
                )  # the first of its input
        if len(pairs) < min_pairs:
            left_out[path.stem] = len(pairs)
        else:
            tasks[path.stem] = ({"pairs": len(pairs), "of": task.pairs}, list(pairs.values()))
    if not tasks:
        raise ValueError(
            f"{folder}: none of {len(files)} tasks has {min_pairs} pairs with sides up to {max_side}, the most are "
            f"{max(left_out.values())}: raise --max_side or lower --min_pairs"
        )
    return tasks, left_out
