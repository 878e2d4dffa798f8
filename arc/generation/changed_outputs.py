"""Puzzles of a dataset whose outputs are changed by one random operation each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arc.generation.operations import OPERATIONS
from arc.generation.processes import map_in_processes
from arc.generation.rules import BLACK, Grid, Random, Unfit, pick
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.grids import MAX_SIDE
from arc.puzzles.keys import seeded_rng
from arc.runs.settings import DataSettings

CHANGED = "changed"  # prefix of the names of puzzles with changed outputs
CHANGES_TRIED = 12  # operations that are drawn for a puzzle
# Settings that decide which puzzles are held out; the defaults are the stages'.
SPLIT = ("sizes", "grid_sizes", "dataset_seed", "holdout_examples", "holdout_tasks", "holdout_seed")


def change_outputs(rng: Random, outputs: Sequence[Grid], max_side: int) -> tuple[dict[str, Any], list[Grid]] | None:
    """Change all outputs of a puzzle by one operation of the programs.

    Args:
        rng: of all draws.
        outputs: of the demonstrations and the tests.
        max_side: largest side of a changed output.

    Returns:
        The operation with its parameters, and the changed outputs: at most one is unchanged, and they are not all
        equal. None if no operation of CHANGES_TRIED does that.
    """
    names = list(OPERATIONS)
    colours = sorted({*np.concatenate([grid.ravel() for grid in outputs]).tolist()} - {BLACK}) or [1]
    for _ in range(CHANGES_TRIED):
        name = pick(rng, names)
        with contextlib.suppress(Unfit):
            parameters, solve = OPERATIONS[name][0](rng, colours)
            changed: list[Grid] = []
            same = 0
            for grid in outputs:
                made = solve(grid)
                same += np.array_equal(made, grid)
                if same > 1 or not 1 <= min(made.shape) <= max(made.shape) <= max_side:
                    break
                changed.append(made)
            if len(changed) == len(outputs) and not all(np.array_equal(changed[0], grid) for grid in changed):
                return {"operation": name, **parameters}, changed
    return None


def _changed_puzzle(
    puzzle: tuple[str, list[Grid]], max_side: int, seed: int
) -> tuple[dict[str, Any], list[Grid]] | None:
    name, outputs = puzzle
    return change_outputs(seeded_rng(seed, CHANGED, name), [grid.astype(int) for grid in outputs], max_side)


def generate_changed(
    folder: Path, share: float, max_side: int, seed: int, workers: int | None = None, **split: Any
) -> tuple[dict[str, tuple[dict[str, Any], dict[str, Any]]], dict[str, Any]]:
    """Change the outputs of puzzles that a stage trains on, by one random operation for each puzzle.

    Args:
        folder: a dataset as the stages load it.
        share: share of the puzzles. A larger one adds puzzles and leaves the others as they are.
        max_side: largest side of a changed output.
        seed: of which puzzles are chosen, and of all draws.
        workers: processes that draw; None: one a core. The puzzles do not depend on it.
        split: settings of SPLIT that differ from the stages' defaults. Held-out puzzles are not used.

    Returns:
        By task name, `changed-PUZZLE`: the operation with its parameters, and the puzzle {"train", "test"}. And the
        source: "split" (all its settings), "dataset" (a hash of all puzzles), and numbers of puzzles: "train",
        "looked_at", and of these "unfit" (no operation fits) and "heldout" (with an input of a held-out puzzle).

    Raises:
        FileNotFoundError, ValueError: settings out of range, bad files, too much held out, or no puzzle is left.
    """
    problems = [
        (not 0 < share <= 1, f"--share is {share}: expected a share above 0, up to 1"),
        (not 1 <= max_side <= MAX_SIDE, f"--max_side is {max_side}: expected 1 to {MAX_SIDE}"),
        (workers is not None and workers < 1, f"--workers is {workers}: expected a whole number from 1"),
    ]
    settings = DataSettings(str(folder), **split)
    problems += [
        (value < 0, f"--{name} is {value}: expected a whole number from 0")
        for name, value in (
            ("seed", seed),
            *((name, getattr(settings, name)) for name in ("dataset_seed", "holdout_seed")),
        )
    ]
    if any(wrong for wrong, _ in problems):
        raise ValueError("; ".join(message for wrong, message in problems if wrong))
    bounds: Any = tuple(settings.grid_sizes) or None  # refused below unless it is (low, high)
    try:
        data = ArcDataset.load_from_local_json(
            folder, sizes=tuple(settings.sizes), seed=settings.dataset_seed, grid_sizes=bounds
        )
        held = data.holdout(settings.holdout_examples, settings.holdout_tasks, settings.holdout_seed)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--changed_from: {error}") from None

    def inputs(ds: ArcDataset, puzzle: str) -> list[Grid]:
        return [pair["input"] for part in ("train", "test") for pair in ds.challenge[puzzle][part]]

    hidden = {
        (grid.shape, grid.tobytes())
        for part in (held.seen, held.unseen)
        for puzzle in part.challenge
        for grid in inputs(part, puzzle)
    }
    train = held.train
    drawn = [puzzle for puzzle in train.challenge if seeded_rng(seed, CHANGED, puzzle, "share").random() < share]
    # Small inputs occur in several tasks. A held-out input must not be trained on with another answer.
    usable = [p for p in drawn if not any((grid.shape, grid.tobytes()) in hidden for grid in inputs(train, p))]
    outputs = [[*(pair["output"] for pair in train.challenge[p]["train"]), *train.solutions.get(p, ())] for p in usable]
    change = functools.partial(_changed_puzzle, max_side=max_side, seed=seed)
    tasks = {}
    for puzzle, made in zip(
        usable, map_in_processes(change, list(zip(usable, outputs, strict=True)), workers), strict=True
    ):
        if made is None:
            continue
        parameters, changed = made
        rows = [{"input": grid.tolist()} for grid in inputs(train, puzzle)]
        for row, grid in zip(rows, changed, strict=False):  # tests without solutions stay so
            row["output"] = grid.tolist()
        count = len(train.challenge[puzzle]["train"])
        tasks[f"{CHANGED}-{puzzle}"] = parameters, {"train": rows[:count], "test": rows[count:]}
    source = {
        "split": {name: getattr(settings, name) for name in SPLIT}, "dataset": data.content_hash(),
        "train": len(train.challenge), "looked_at": len(drawn), "unfit": len(usable) - len(tasks),
        "heldout": len(drawn) - len(usable),
    }  # fmt: skip
    if not tasks:
        raise ValueError(
            f"--changed_from: {folder}: no puzzle to write of {len(drawn)} looked at: no operation fits "
            f"{source['unfit']}, and {source['heldout']} have an input of a held-out puzzle"
        )
    return tasks, source
