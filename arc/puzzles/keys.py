"""Keys: what names a view of a puzzle, and random numbers that depend on names alone.

`007bbfb7_0.tp.rt.perm0123456789.ex2-0-1` names a puzzle, a test input, then transforms in order:

    tp              transpose
    rt              rotate by 90 degrees counter-clockwise (numpy.rot90)
    permDDDDDDDDDD  colour c becomes the digit at position c
    ex2-0-1         order (and subset) of the demonstration pairs; a second `ex` picks from those of the first
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from arc.puzzles.grids import Grids, Pairs, Puzzle

COLOURS = "0123456789"
GRAMMAR = "tp, rt, permDDDDDDDDDD or ex2-0-1"


def seed_words(seed: int | None, *names: str) -> list[int]:
    """Integers to seed a generator with, from the seed and the names; seed None: from the system."""
    if seed is None:
        return [int(word) for word in np.random.SeedSequence().generate_state(2)]
    return [int(seed) % 2**64, *(zlib.crc32(name.encode()) for name in names)]


def seeded_rng(seed: int | None, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names alone; seed None: the system seeds it."""
    return np.random.default_rng(seed_words(seed, *names))


def seeded_rank(seed: int, name: str) -> bytes:
    """Sort key of a name in a seeded order; other names do not change it."""
    return hashlib.sha256(f"{int(seed)}:{name}".encode()).digest()


def clean_name(name: str) -> str:
    """A puzzle's name without "_" and ".", which have a meaning in keys."""
    return name.replace("_", "-").replace(".", "-")


def puzzle_of(key: str) -> str:
    """Puzzle id of a valid key, faster than `split_name`."""
    return key.partition(".")[0].partition("_")[0]


def split_name(key: str) -> tuple[str, int]:
    """Puzzle id and test index (-1: none) of a key. ValueError: the index is not a number."""
    name = key.partition(".")[0]
    puzzle, separator, number = name.partition("_")
    if not separator:
        return puzzle, -1
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"key {key!r}: found test index {number!r}, expected PUZZLE_INDEX such as 007bbfb7_0")
    return puzzle, int(number)


def check_colours(transform: str) -> str:
    """The ten digits of `perm...`."""
    colours = transform[4:]
    if len(colours) != 10 or frozenset(colours) != frozenset(COLOURS):
        raise ValueError(f"found {transform!r}, expected perm and each of the digits 0 to 9 once")
    return colours


def check_order(transform: str, count: int) -> list[int]:
    """The numbers of `ex...`, each a different one of `count` demonstrations."""
    words = transform[2:].split("-")
    order = [int(word) if word.isascii() and word.isdigit() else -1 for word in words]
    if min(order) < 0 or max(order) >= count or len(set(order)) < len(order):
        expected = f"different numbers of the {count} demonstrations, 0 to {count - 1}"
        raise ValueError(f"found {transform!r}, expected {expected}")
    return order


def permute_grid(grid: Any, descriptor: str, invert: bool = False) -> np.ndarray:
    """Recolour a grid (height, width): colour c becomes the digit at position c of `permDDDDDDDDDD`, or back.

    Raises:
        ValueError: no permutation, or no grid.
    """
    lookup = np.array([int(c) for c in check_colours(descriptor)], dtype=np.uint8)
    grid = np.asarray(grid)
    if grid.ndim != 2:
        raise ValueError(f"found an array {grid.shape}, expected a grid (height, width)")
    return (np.argsort(lookup).astype(np.uint8) if invert else lookup)[grid]


def transform_grid(grid: Any, transforms: Sequence[str], apply_perm: bool = True, invert: bool = False) -> np.ndarray:
    """Apply the transforms of a key to a grid (height, width), or undo them (`invert`).

    `ex...` does not change a single grid; `apply_perm` False leaves the colours. ValueError: an unknown transform.
    """
    grid = np.asarray(grid)
    for transform in reversed(transforms) if invert else transforms:
        if transform == "tp":
            grid = grid.T
        elif transform == "rt":
            grid = np.rot90(grid, -1 if invert else 1)
        elif transform.startswith("perm"):
            grid = permute_grid(grid, transform, invert) if apply_perm else grid
        elif not transform.startswith("ex"):
            raise ValueError(f"found transform {transform!r}, expected {GRAMMAR}")
    return grid


def dihedral(grid: np.ndarray, number: int) -> np.ndarray:
    """Symmetry 0 to 7 of a grid (rows, columns). Bits: transpose, then mirror rows, mirror columns."""
    oriented = grid.T if number & 1 else grid
    return oriented[:: -1 if number & 2 else 1, :: -1 if number & 4 else 1]


class View(NamedTuple):
    """A resolved key: its grids, and how they are turned and coloured."""

    train: Pairs
    order: Sequence[int]
    query: int  # number of the test input in the store, -1: none
    solution: int  # number of its output, -1: unknown
    symmetry: tuple[int, int, int]  # transpose, then mirror the order of rows, then of columns
    colours: str  # colour c becomes the digit at position c


def resolve(key: str, challenge: Mapping[str, Puzzle], solutions: Mapping[str, Grids]) -> View:
    """A key's grids and transforms.

    Raises:
        ValueError: an unknown puzzle, test input or transform.
    """
    name, *transforms = key.split(".")
    puzzle, number = split_name(name)
    entry = challenge.get(puzzle)
    if entry is None:
        raise ValueError(f"key {key!r}: no puzzle {puzzle!r} among {len(challenge):,}")
    train, test = entry["train"], entry["test"]
    if number >= len(test):
        raise ValueError(f"key {key!r}: no test input {number}, {puzzle} has {len(test)}")
    order: Sequence[int] = range(len(train))
    symmetry, colours = (0, 0, 0), COLOURS
    try:
        for transform in transforms:
            if transform in ("tp", "rt"):
                transposed, rows, columns = symmetry
                # rot90 is a transpose followed by a mirror of the rows.
                symmetry = (1 - transposed, columns if transform == "tp" else 1 - columns, rows)
            elif transform.startswith("perm"):
                new = check_colours(transform)
                colours = new if colours is COLOURS else "".join(new[int(c)] for c in colours)
            elif transform.startswith("ex"):
                order = [order[i] for i in check_order(transform, len(order))]
            else:
                raise ValueError(f"found transform {transform!r}, expected {GRAMMAR}")
    except ValueError as error:
        raise ValueError(f"key {key!r}: {error}") from None
    solution = solutions.get(puzzle) if number >= 0 else None
    query = test.first + number if number >= 0 else -1
    return View(train, order, query, -1 if solution is None else solution.first + number, symmetry, colours)


def shortened_key(key: str, count: int) -> str:
    """A key with only the first `count` of its demonstrations."""
    name, _, last = key.rpartition(".")
    if last.startswith("ex") and name:
        return f"{name}.{'-'.join(last.split('-')[:count])}"
    return f"{key}.ex{'-'.join(map(str, range(count)))}"
