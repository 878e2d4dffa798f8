"""New tasks made of old ones: a puzzle's outputs, all of them alike, turned, mirrored or recoloured, its inputs not.

A view turns and colours a whole puzzle, so that its rule stays what it was: a model can learn the rules by heart and
look no further. Of a puzzle whose outputs alone are changed the rule is another one, and stands in its demonstrations
only.

Source: task augmentation as in Barbadillo's solution of the ARC Prize 2024; the draws are our own.
"""

from __future__ import annotations

import numpy as np

from arc_files import Grids, GridStore, Pairs, Queries, Window
from arc_loader import ArcDataset, seeded_rng

MARK = "~"  # between a puzzle's id and the number of a puzzle made of it
RECOLOURED = 0.5  # share of the new puzzles whose outputs are recoloured, where their tests allow it


def augment_tasks(ds: ArcDataset, per_puzzle: float, seed: int) -> ArcDataset:
    """The dataset and puzzles of new tasks behind it, `PUZZLE~1`, `PUZZLE~2` and so on.

    Args:
        ds: puzzles, with or without solutions.
        per_puzzle: new puzzles made of each; of 1.5 every puzzle has one and half of them, drawn, a second one.
        seed: of the draws; each puzzle's depend on its id and the seed alone.

    Returns:
        The dataset with a key of each new puzzle for each key of its old one. A new puzzle is a task of its own: its
        outputs are all turned the same way, or recoloured by the same permutation, or both. Where a solution has a
        colour that no demonstration shows, they are turned only: the new rule can be read from the demonstrations.

    Raises:
        ValueError: a negative or infinite number.
    """
    if not 0 <= per_puzzle < float("inf"):
        raise ValueError(f"{per_puzzle} puzzles of new tasks for each puzzle, expected a number from 0")
    keys: dict[str, list[str]] = {}
    for key in ds.keys:
        keys.setdefault(ds.get_base_key(key), []).append(key)
    old, cells = ds.store, [ds.store.cells]
    end = len(old.cells)
    offsets, heights, widths = (array.tolist() for array in (old.offsets, old.heights, old.widths))
    parts: dict[str, dict[str, tuple[int, int]]] = {}  # of each new puzzle, where its parts begin and how long they are

    def turned(number: int, symmetry: int, colours: np.ndarray) -> None:
        nonlocal end
        grid = old.grid(number)
        grid = colours[grid.T if symmetry & 1 else grid][:: -1 if symmetry & 2 else 1, :: -1 if symmetry & 4 else 1]
        cells.append(grid.ravel())
        offsets.append(end)
        heights.append(grid.shape[0])
        widths.append(grid.shape[1])
        end += grid.size

    def same(number: int) -> None:
        for values in (offsets, heights, widths):
            values.append(values[number])

    new_keys = []
    for puzzle, of_puzzle in keys.items():
        rng = seeded_rng(seed, "new tasks", puzzle)
        train, test, solutions = *ds.challenge[puzzle].values(), ds.solutions.get(puzzle)
        for copy in range(1, 1 + int(per_puzzle + rng.random())):
            symmetry, colours = _draw_change(rng, train, solutions)
            name, first = f"{puzzle}{MARK}{copy}", len(offsets)
            parts[name] = {"train": (first, train.count), "test": (first + 2 * train.count, test.count)}
            for number in range(train.first, train.first + 2 * train.count, 2):
                same(number)
                turned(number + 1, symmetry, colours)
            for number in range(test.first, test.first + test.count):
                same(number)
            if solutions is not None:
                parts[name]["solutions"] = (len(offsets), solutions.count)
                for number in range(solutions.first, solutions.first + solutions.count):
                    turned(number, symmetry, colours)
            new_keys += [name + key[len(puzzle) :] for key in of_puzzle]
    if not parts:
        return ds
    sides = (np.array(values, dtype=np.uint8) for values in (heights, widths))
    store = GridStore(np.concatenate(cells), np.array(offsets, dtype=np.int64), *sides)
    kinds: dict[str, type[Window]] = {"train": Pairs, "test": Queries, "solutions": Grids}

    def moved(window: Window) -> Window:
        return type(window)(store, window.first, window.count)

    challenge = {puzzle: {part: moved(window) for part, window in of.items()} for puzzle, of in ds.challenge.items()}
    known = {puzzle: moved(window) for puzzle, window in ds.solutions.items()}
    for name, of in parts.items():
        windows = {part: kinds[part](store, first, count) for part, (first, count) in of.items()}
        if "solutions" in windows:
            known[name] = windows.pop("solutions")
        challenge[name] = windows
    return ds._derived([*ds.keys, *new_keys], False, (store, challenge, known))


def _draw_change(rng: np.random.Generator, train: Pairs, solutions: Grids | None) -> tuple[int, np.ndarray]:
    """How a puzzle's outputs change: a symmetry 0..7 (bits: transpose, mirror rows, mirror columns) and uint8 (10,)."""
    colours = np.arange(10, dtype=np.uint8)
    recolour, symmetry, other = rng.random() < RECOLOURED, int(rng.integers(8)), int(rng.integers(1, 8))
    if recolour:
        store = train.store
        shown = set(b"".join(store.grid(train.first + 2 * i + 1).tobytes() for i in range(train.count)))
        asked = set(b"".join(grid.tobytes() for grid in solutions or ()))
        permuted = rng.permutation(colours)
        if asked <= shown and any(permuted[colour] != colour for colour in shown):
            return symmetry, permuted
    return symmetry or other, colours
