"""New tasks made of old ones: a puzzle's outputs, all of them alike, turned, mirrored or recoloured, its inputs not.

A view turns and colours a whole puzzle, so that its rule stays what it was: a model can learn the rules by heart and
look no further. Of a puzzle whose outputs alone are changed the rule is another one, and stands in its demonstrations
only.

Source: task augmentation as in Barbadillo's solution of the ARC Prize 2024; the draws are our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.files import Grids, GridStore, Pairs, Queries, Window
from arc.puzzles.keys import seeded_rng

MARK = "~"  # between a puzzle's id and the number of a puzzle made of it
RECOLOURED = 0.5  # share of the new puzzles whose outputs are recoloured, where their tests allow it
DRAWS = 8  # until a puzzle is given up whose outputs none of them changes


def augment_tasks(ds: ArcDataset, per_puzzle: float, seed: int) -> ArcDataset:
    """The dataset and puzzles of new tasks behind it, `PUZZLE~1`, `PUZZLE~2` and so on.

    Args:
        ds: puzzles, with or without solutions.
        per_puzzle: new puzzles made of each; of 1.5 every puzzle has one and half of them, drawn, a second one.
        seed: of the draws; each puzzle's depend on its id and the seed alone.

    Returns:
        The dataset with a key of each new puzzle for each key of its old one. A new puzzle counts as a task of its own:
        its outputs are all turned the same way, or recoloured by the same permutation, or both, and are not those of
        the old puzzle or another one made of it; where outputs are too symmetric for that, there are fewer. Where a
        solution has a colour that no demonstration shows, they are turned only: the new rule can be read from the
        demonstrations.

    Raises:
        ValueError: a negative or infinite number; the id of a new puzzle is that of one of the dataset.
    """
    if not 0 <= per_puzzle < float("inf"):
        raise ValueError(f"{per_puzzle} puzzles of new tasks for each puzzle, expected a number from 0")
    if per_puzzle == 0:
        return ds
    keys: dict[str, list[str]] = {}
    for key in ds.keys:
        keys.setdefault(ds.get_base_key(key), []).append(key)
    grids: list[np.ndarray] = []  # of the new puzzles
    parts: dict[str, tuple[int, int, int, bool]] = {}  # of each the first grid, pairs, tests, whether they are solved
    new_keys: list[str] = []
    for puzzle, of_puzzle in keys.items():
        rng = seeded_rng(seed, "new tasks", puzzle)
        pairs = list(ds.challenge[puzzle]["train"])
        tests = [query["input"] for query in ds.challenge[puzzle]["test"]]
        solutions = ds.solutions.get(puzzle, ())
        outputs = [*(pair["output"] for pair in pairs), *solutions]
        known = [outputs]
        for copy in range(1, 1 + int(per_puzzle + rng.random())):
            for _ in range(DRAWS):
                symmetry, colours = _draw_change(rng, outputs[: len(pairs)], outputs[len(pairs) :])
                changed = [_changed(grid, symmetry, colours) for grid in outputs]
                if any(all(map(np.array_equal, changed, others)) for others in known):
                    continue
                known.append(changed)
                name = f"{puzzle}{MARK}{copy}"
                parts[name] = len(grids), len(pairs), len(tests), len(solutions) > 0
                for pair, output in zip(pairs, changed, strict=False):  # the solutions come after the tests
                    grids += [pair["input"], output]
                grids += [*tests, *changed[len(pairs) :]]
                new_keys += [name + key[len(puzzle) :] for key in of_puzzle]
                break
    if not parts:
        return ds
    store = GridStore.of_grids(grids)
    challenge: dict[str, dict[str, Window]] = {}
    known_solutions: dict[str, Window] = {}
    for name, (first, pairs, tests, solved) in parts.items():
        after = first + 2 * pairs
        challenge[name] = {"train": Pairs(store, first, pairs), "test": Queries(store, after, tests)}
        if solved:
            known_solutions[name] = Grids(store, after + tests, tests)
    return ds.append(ArcDataset(challenge, known_solutions, new_keys, is_orig=ds.is_orig))


def dihedral(grid: np.ndarray, number: int) -> np.ndarray:
    """One of the eight symmetries of the square.

    Args:
        grid: (rows, columns).
        number: 0 to 7, bits: transpose, then mirror rows, mirror columns.
    """
    turned = grid.T if number & 1 else grid
    return turned[:: -1 if number & 2 else 1, :: -1 if number & 4 else 1]


def _changed(grid: np.ndarray, symmetry: int, colours: np.ndarray) -> np.ndarray:
    return dihedral(colours[grid], symmetry)


def _draw_change(
    rng: np.random.Generator, outputs: Sequence[np.ndarray], solutions: Sequence[np.ndarray]
) -> tuple[int, np.ndarray]:
    """How outputs change: a symmetry, see `dihedral`, and colours, uint8 (10,)."""
    colours = np.arange(10, dtype=np.uint8)
    recolour, symmetry, other = rng.random() < RECOLOURED, int(rng.integers(8)), int(rng.integers(1, 8))
    if recolour:
        shown, asked = (set(b"".join(grid.tobytes() for grid in grids)) for grids in (outputs, solutions))
        permuted = rng.permutation(colours)
        if asked <= shown and any(permuted[colour] != colour for colour in shown):
            return symmetry, permuted
    return symmetry or other, colours
