"""Fingerprints: one canonical form for all puzzles that are equal but for symmetry, colours and order of the pairs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def _images(query: np.ndarray, reply: np.ndarray | None) -> list[tuple[bytes, bytes]]:
    """The 8 symmetric images of a pair (height, width), each as a pattern and the colours that fill it.

    Patterns are the four sides (0 without a reply) and the cells, row by row. Each colour is written as its place among
    the pair's colours, which follow in order of appearance. So a pattern tells its own length.
    """
    images = []
    upright = [np.asarray(grid, dtype=np.uint8) for grid in (query, reply) if grid is not None]
    for transposed in (False, True):
        grids = [grid.T if transposed else grid for grid in upright]
        sides = bytes([*grids[0].shape, *(grids[1].shape if reply is not None else (0, 0))])
        for rows in (1, -1):
            for columns in (1, -1):
                cells = b"".join([grid[::rows, ::columns].tobytes() for grid in grids])
                colours = bytes(dict.fromkeys(cells))
                images.append((sides + cells.translate(bytes.maketrans(colours, bytes(range(len(colours))))), colours))
    return images


def pair_form(query: np.ndarray, reply: np.ndarray | None) -> bytes:
    """The canonical form of a pair, uint8 (height, width): a symmetry and a permutation of colours do not change it.

    A reply of None gives the form of an input alone, which is that of no pair.
    """
    return min(pattern for pattern, _ in _images(query, reply))


def puzzle_fingerprint(pairs: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> str:
    """SHA-256 (hex) of the canonical form of a puzzle: the same for equal puzzles and for no others.

    Under each symmetry, a puzzle is a sorted list of patterns and the colours that fill them. Patterns do not depend on
    the names of colours. So first the symmetries with the smallest list are chosen, then the names that make the lists
    of colours smallest.

    Args:
        pairs: at least one (input, output), uint8 (height, width); output None: an input alone.
    """
    turned = [sorted(image) for image in zip(*(_images(query, reply) for query, reply in pairs), strict=True)]
    least = min([pattern for pattern, _ in image] for image in turned)
    numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(least))}
    fillings = {
        tuple((numbers[pattern], colours) for pattern, colours in image)
        for image in turned
        if [pattern for pattern, _ in image] == least
    }
    colours = min(_least_colours(Counter(image)) for image in fillings)
    # How many patterns, these, and how each is filled in turn: can be read back, so no two puzzles share the bytes.
    return hashlib.sha256(b"".join([len(least).to_bytes(8, "big"), *least, *colours])).hexdigest()


Row = tuple[tuple[int, int], bytes]  # a pattern's number and how often it is filled so; the colours that fill it


class _Leaf(NamedTuple):
    """Names for all colours, the rows under these names, and the choices that led there."""

    rows: list[Row]
    names: dict[int, int]
    chosen: tuple[int, ...]


def _least_colours(image: Counter[tuple[int, bytes]]) -> list[bytes]:
    """How the patterns of a puzzle are filled, in order, under canonical names of the colours.

    Colours are distinguished by their places in the patterns. Where some remain alike, each in turn gets a new name,
    which distinguishes others, and so on. The naming with the smallest rows wins. Two namings with equal rows are a
    symmetry of the colours. A branch that a symmetry maps to a finished one is skipped: ten alike colours take 10
    namings, not 10!.

    `image` maps (pattern's number, colours) to a count.

    Source: individualisation and refinement, McKay and Piperno 2014 (Practical graph isomorphism, II), with colours as
        vertices and pairs as ordered hyperedges; without comparing inner nodes, which ten vertices do not need.
    """
    rows: list[Row] = [((number, times), colours) for (number, colours), times in image.items()]
    best: list[_Leaf] = []  # at most one
    symmetries: list[dict[int, int]] = []

    def search(names: dict[int, int], chosen: tuple[int, ...]) -> int:
        """Search all namings that refine this one; returns the number of choices to go back to."""
        names = _refined(rows, names)
        sizes = Counter(names.values())
        if len(sizes) == len(names):
            leaf = _Leaf(_renamed(rows, names), names, chosen)
            if not best or leaf.rows < best[0].rows:
                best[:] = [leaf]
            elif leaf.rows == best[0].rows:
                here = {name: colour for colour, name in names.items()}
                symmetries.append({colour: here[name] for colour, name in best[0].names.items()})
                # The symmetry maps the branch of the best leaf, which is done, to this one, from where they part.
                return next(i for i, pair in enumerate(zip(chosen, best[0].chosen, strict=False)) if len({*pair}) > 1)
            return len(chosen)
        alike = min((size, name) for name, size in sizes.items() if size > 1)[1]
        done: list[int] = []
        for colour in [c for c, name in names.items() if name == alike]:
            fixing = [s for s in symmetries if all(s[c] == c for c in chosen)]
            if colour in _orbit(done, fixing):
                continue
            done.append(colour)
            apart = {c: 2 * name + (name == alike and c != colour) for c, name in names.items()}
            if (back := search(apart, (*chosen, colour))) < len(chosen):
                return back
        return len(chosen)

    search(dict.fromkeys(sorted({colour for _, colours in rows for colour in colours}), 0), ())
    return [colours for (_, times), colours in best[0].rows for _ in range(times)]


def _renamed(rows: Sequence[Row], names: dict[int, int]) -> list[Row]:  # sorted
    return sorted((kind, bytes([names[colour] for colour in colours])) for kind, colours in rows)


def _refined(rows: Sequence[Row], names: dict[int, int]) -> dict[int, int]:
    """Tell apart colours of one name by the rows they stand in, as far as that goes.

    `names` maps colour to name; colours that are not told apart yet share one. The result has names 0, 1, ... in the
    order of the old ones, equal for colours that a symmetry of rows and names maps to each other.
    """
    count = 0
    while count < len(names):
        standing: dict[int, list[tuple]] = {colour: [] for colour in names}
        for kind, colours in rows:
            row = bytes([names[colour] for colour in colours])
            for place, colour in enumerate(colours):
                standing[colour].append((kind, place, row))
        known = {colour: (names[colour], tuple(sorted(places))) for colour, places in standing.items()}
        ranks = {value: rank for rank, value in enumerate(sorted(set(known.values())))}
        names = {colour: ranks[value] for colour, value in known.items()}
        if len(ranks) == count:
            break
        count = len(ranks)
    return names


def _orbit(colours: Sequence[int], symmetries: Sequence[dict[int, int]]) -> set[int]:
    """All colours that the symmetries map the given ones to."""
    reached, waiting = set(colours), list(colours)
    while waiting:
        colour = waiting.pop()
        for symmetry in symmetries:
            if symmetry[colour] not in reached:
                reached.add(symmetry[colour])
                waiting.append(symmetry[colour])
    return reached
