"""Leaks: puzzles and test pairs of an evaluation that training has seen, in whatever dress.

    leaks = find_leaks(evaluation, training)
    leaks.puzzles  # {"007bbfb7": ("007bbfb7-012",), ...}: whole puzzles that are training puzzles
    leaks.tests  # {"007bbfb7_0": ("007bbfb7-003", ...), ...}: test pairs that are pairs of training puzzles

Two puzzles are equal here if one of the 8 symmetries of the square and one permutation of the 10 colours, the same for
all grids, turn the pairs of one into those of the other, in any order. Nothing is guessed: equal puzzles have one
canonical form, others have another. Cheap signatures, computed for a whole store at once, only choose which forms are
worth computing.

A pair counts as often as it is there, and wherever it is: which of the pairs is the test is left out, as training on
the same pairs with another one as the test has seen the answer too. A test input without a solution is a pair of its
own kind, an input alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from arc.puzzles.files import MAX_SIDE, GridStore

if TYPE_CHECKING:  # the loader imports this module
    from arc.puzzles.dataset import ArcDataset

CHUNK_CELLS = 1_000_000  # cells that are counted at once: some tens of MB


# ---------------------------------------------------------------------------------------------------------------------
# Canonical forms


def _images(query: np.ndarray, reply: np.ndarray | None) -> list[tuple[bytes, bytes]]:
    """The 8 symmetric images of a pair, each as a pattern and the colours that fill it.

    Args:
        query, reply: (height, width) of colours; reply None: an input alone.

    Returns:
        Patterns are the four sides (0 for those of no reply) and the cells, row by row, each colour written as its
        place among the pair's colours; these follow in the order in which they appear. Patterns tell their own length.
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
    """The canonical form of one pair: the same for pairs that a symmetry and a permutation of colours make equal.

    Args:
        query, reply: uint8 (height, width); reply None: an input alone, whose form is that of no pair.
    """
    return min(pattern for pattern, _ in _images(query, reply))


def puzzle_fingerprint(pairs: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> str:
    """SHA-256 (hex) of the canonical form of a puzzle: the same for equal puzzles (see the module) and for no others.

    For each symmetry, a puzzle is a list of patterns, in order, and colours that fill them. Patterns do not depend on
    the names of colours, so the symmetries with the smallest list are found first, and only among these the names that
    make the lists of colours smallest.

    Args:
        pairs: at least one (input, output), uint8 (height, width); output None: an input alone.
    """
    turned = [sorted(image) for image in zip(*(_images(query, reply) for query, reply in pairs), strict=True)]
    least = min([pattern for pattern, _ in image] for image in turned)
    numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(least))}
    found = {
        tuple((numbers[pattern], colours) for pattern, colours in image)
        for image in turned
        if [pattern for pattern, _ in image] == least
    }
    colours = min(_least_colours(Counter(image)) for image in found)
    # How many patterns, these, and how each is filled in turn: can be read back, so no two puzzles share the bytes.
    return hashlib.sha256(b"".join([len(least).to_bytes(8, "big"), *least, *colours])).hexdigest()


Row = tuple[tuple[int, int], bytes]  # a pattern's number and how often it is filled so; the colours that fill it


class _Leaf(NamedTuple):
    """Names for all colours, the rows under these names, and the choices that led there."""

    rows: list[Row]
    names: dict[int, int]
    chosen: tuple[int, ...]


def _least_colours(image: Counter[tuple[int, bytes]]) -> list[bytes]:
    """How the patterns of a puzzle are filled, in order, under names of the colours that depend on no names.

    Colours are told apart by where they stand in which patterns, beside which others. Where that leaves some alike,
    each of them in turn gets a name of its own, which tells others apart, and so on; of all namings that are reached,
    the one with the smallest rows counts. Two namings with equal rows are a symmetry of the puzzle's colours, and what
    a symmetry maps to something done is not done again: ten colours alike take 10 namings, not 10!.

    Args:
        image: (pattern's number, colours) -> how often.

    Source: individualisation and refinement, McKay and Piperno 2014 (Practical graph isomorphism, II), on the colours
        as vertices and the pairs as ordered hyperedges; without their comparison of inner nodes, which ten vertices do
        not need.
    """
    rows: list[Row] = [((number, times), colours) for (number, colours), times in image.items()]
    best: list[_Leaf] = []  # at most one
    symmetries: list[dict[int, int]] = []

    def search(names: dict[int, int], chosen: tuple[int, ...]) -> int:
        """Look at all namings that refine this one; gives the number of choices to go back to."""
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


def _renamed(rows: Sequence[Row], names: dict[int, int]) -> list[Row]:
    """The rows in order after renaming their colours."""
    return sorted((kind, bytes([names[colour] for colour in colours])) for kind, colours in rows)


def _refined(rows: Sequence[Row], names: dict[int, int]) -> dict[int, int]:
    """Tell colours of one name apart by the rows that they stand in, as far as that goes.

    Args:
        rows: see `Row`.
        names: colour -> name; colours that are not told apart yet share one.

    Returns:
        Names 0, 1, ... in the order of the old ones; the same for colours that a symmetry of rows and names maps.
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


# ---------------------------------------------------------------------------------------------------------------------
# Signatures of many pairs at once


class _Table(NamedTuple):
    """All pairs of a dataset's puzzles as arrays (pairs,)."""

    puzzle: np.ndarray  # number of the puzzle
    test: np.ndarray  # number of the test input, -1: a demonstration
    query: np.ndarray  # number of the grid in the store
    reply: np.ndarray  # likewise, -1: unknown


def _table(ds: ArcDataset) -> _Table:
    """The demonstrations of all puzzles, then their tests."""
    columns = np.array(
        [
            (train.first, train.count, test.first, test.count, -1 if solution is None else solution.first)
            for name, (train, test) in ((name, (p["train"], p["test"])) for name, p in ds.challenge.items())
            for solution in [ds.solutions.get(name)]
        ],
        dtype=np.int64,
    ).reshape(-1, 5)
    train, train_count, test, test_count, solution = columns.T

    def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each puzzle as often as it has pairs, and the places of these in it."""
        puzzles = np.repeat(np.arange(len(counts)), counts)
        return puzzles, np.arange(len(puzzles)) - np.repeat(np.cumsum(counts) - counts, counts)

    of_train, in_train = spread(train_count)
    of_test, in_test = spread(test_count)
    inputs = train[of_train] + 2 * in_train
    outputs = np.where(solution[of_test] < 0, -1, solution[of_test] + in_test)
    return _Table(
        np.concatenate((of_train, of_test)),
        np.concatenate((np.full(len(of_train), -1), in_test)),
        np.concatenate((inputs, test[of_test] + in_test)),
        np.concatenate((inputs + 1, outputs)),
    )


def _scrambled(values: np.ndarray) -> np.ndarray:
    """A number that looks random for each uint64."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return (values ^ (values >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)


def _colour_counts(store: GridStore, grids: np.ndarray) -> np.ndarray:
    """How many cells of each colour each grid has.

    Args:
        store: of the grids.
        grids: int64 (grids,), numbers in the store, -1: no grid, no cells.

    Returns:
        uint16 (grids, 10).
    """
    areas = np.where(grids < 0, 0, store.heights[grids].astype(np.int64) * store.widths[grids])
    counts, ends, begin = np.zeros((len(grids), 10), dtype=np.uint16), np.cumsum(areas), 0
    while begin < len(grids):
        before = ends[begin] - areas[begin]
        end = max(begin + 1, int(np.searchsorted(ends, before + CHUNK_CELLS, side="right")))
        area, number = areas[begin:end], np.repeat(np.arange(end - begin), areas[begin:end])
        first = store.offsets[grids[begin:end]] - (ends[begin:end] - area - before)
        cells = store.cells[first[number] + np.arange(len(number))]
        counts[begin:end] = np.bincount(number * 10 + cells, minlength=10 * (end - begin)).reshape(-1, 10)
        begin = end
    return counts


def _signatures(store: GridStore, query: np.ndarray, reply: np.ndarray) -> np.ndarray:
    """A number for each pair, uint64 (pairs,), the same for pairs that a symmetry and a permutation make equal.

    Other pairs mostly have others: it depends on the four sides (or those transposed) and on how many cells each
    colour has in input and output.

    Args:
        store: of the grids.
        query, reply: int64 (pairs,), numbers in the store; reply -1: an input alone.
    """
    sides = [
        np.where(grids < 0, 0, side[grids]).astype(np.uint64)
        for grids in (query, reply)
        for side in (store.heights, store.widths)
    ]
    base = np.uint64(MAX_SIDE + 1)
    shapes = [((a * base + b) * base + c) * base + d for a, b, c, d in (sides, [sides[i] for i in (1, 0, 3, 2)])]
    signature = _scrambled(np.minimum(*shapes))
    inputs, outputs = _colour_counts(store, query), _colour_counts(store, reply)
    for colour in range(10):  # a sum: it does not matter which colour it is
        both = inputs[:, colour].astype(np.uint64) << np.uint64(16) | outputs[:, colour].astype(np.uint64)
        signature += _scrambled(both)
    return _scrambled(signature)


Chosen = tuple[np.ndarray, np.ndarray, Callable[[int], Hashable]]  # numbers of items, signatures, an item's form


def _equal(left: Chosen, right: Chosen) -> Iterator[tuple[int, int]]:
    """Numbers (left, right) of items with equal forms, which are computed only where signatures are equal.

    Forms of the left side are kept in memory, those of the right side are not.
    """
    numbers = defaultdict(list)
    for number in left[0][np.isin(left[1], right[1])].tolist():
        numbers[left[2](number)].append(number)
    for found in right[0][np.isin(right[1], left[1])].tolist():
        for number in numbers.get(right[2](found), ()):
            yield number, found


# ---------------------------------------------------------------------------------------------------------------------
# Leaks


class Leaks(NamedTuple):
    """What an evaluation shares with training; see `find_leaks`.

    Attributes:
        puzzles: evaluation puzzle id -> ids of the training puzzles that equal it.
        tests: evaluation key PUZZLE_INDEX -> ids of the training puzzles that have its test pair among their pairs.
    """

    puzzles: dict[str, tuple[str, ...]]
    tests: dict[str, tuple[str, ...]]


class _Items(NamedTuple):
    """Puzzles, or pairs, that are compared: with solutions, or without if one of two has none."""

    known: np.ndarray  # bool (items,), whether the solutions are known
    signatures: Callable[[bool], np.ndarray]  # with solutions or without, uint64 (items,)
    form: Callable[[int, bool], Hashable]  # of an item, with its solutions or without

    def shared(self, others: _Items) -> list[tuple[int, int]]:
        """Numbers of equal items, here and there, sorted."""
        everything = np.ones(len(others.known), dtype=bool)
        found = []
        for here, there, solutions in (
            (self.known, others.known, True),
            (self.known, ~others.known, False),
            (~self.known, everything, False),
        ):
            if here.any() and there.any():
                found += _equal(*(items._chosen(mask, solutions) for items, mask in ((self, here), (others, there))))
        return sorted(found)

    def _chosen(self, mask: np.ndarray, solutions: bool) -> Chosen:
        numbers = np.flatnonzero(mask)
        return numbers, self.signatures(solutions)[numbers], lambda number: self.form(number, solutions)


class _Side:
    """A dataset's puzzles and pairs with their signatures."""

    def __init__(self, ds: ArcDataset):
        """The dataset is only looked at."""
        self.ds, self.names, self.table = ds, list(ds.challenge), _table(ds)
        self.full = _signatures(ds.store, self.table.query, self.table.reply)

    @functools.cached_property
    def alone(self) -> np.ndarray:
        """Signatures of the inputs alone; only needed where solutions are missing."""
        return _signatures(self.ds.store, self.table.query, np.full_like(self.table.reply, -1))

    def puzzles(self) -> _Items:
        """All puzzles."""
        table, known = self.table, np.ones(len(self.names), dtype=bool)
        known[table.puzzle[table.reply < 0]] = False

        def signatures(solutions: bool) -> np.ndarray:
            pairs = self.full if solutions else np.where(table.test < 0, self.full, self.alone)
            sums = np.zeros(len(known), dtype=np.uint64)
            np.add.at(sums, table.puzzle, _scrambled(pairs))  # a sum: the order of the pairs does not matter
            return sums

        return _Items(known, signatures, lambda number, solutions: self.ds.fingerprint(self.names[number], solutions))

    def pairs(self, chosen: np.ndarray) -> _Items:
        """Some pairs, by their places in the table."""
        query, reply, store = self.table.query[chosen], self.table.reply[chosen], self.ds.store

        def form(number: int, solutions: bool) -> bytes:
            return pair_form(store.grid(query[number]), store.grid(reply[number]) if solutions else None)

        return _Items(reply >= 0, lambda solutions: (self.full if solutions else self.alone)[chosen], form)


def find_leaks(evaluation: ArcDataset, training: ArcDataset) -> Leaks:
    """Puzzles and test pairs of an evaluation that training has seen.

    The second is the weaker and often the more telling: where puzzles are made of random examples of a task, no two
    puzzles may be equal, but a test pair of one can be a demonstration of another. Each pair may be turned and coloured
    in its own way there. Small grids of few colours can be equal by chance: what is found is for people to look at.

    What is known on both sides is compared: a puzzle or pair without a solution, on either side, by its inputs and
    demonstrations alone. The demonstrations of an evaluation puzzle among a puzzle of more pairs do not make it equal.

    Args:
        evaluation: of whose puzzles those count that it has keys of, and of their test inputs those that keys name.
        training: all pairs of its puzzles count, whatever its keys pick.

    Returns:
        What is shared; both empty: nothing. Ids are in the order of the datasets' puzzles.
    """
    side, other = _Side(evaluation), _Side(training)
    puzzles: dict[str, list[str]] = defaultdict(list)
    for number, found in side.puzzles().shared(other.puzzles()):
        puzzles[side.names[number]].append(other.names[found])
    named = {evaluation.get_base_key_and_reply_num(key) for key in evaluation.keys}
    table = side.table
    titles = [(side.names[i], test) for i, test in zip(table.puzzle.tolist(), table.test.tolist(), strict=True)]
    chosen = np.array([place for place, (_, test) in enumerate(titles) if test >= 0 and titles[place] in named], int)
    tests: dict[str, set[int]] = defaultdict(set)  # a puzzle can have a pair more than once
    everything = np.arange(len(other.table.query))
    for place, found in side.pairs(chosen).shared(other.pairs(everything)):
        name, test = titles[chosen[place]]
        tests[f"{name}_{test}"].add(int(other.table.puzzle[found]))
    return Leaks(
        {name: tuple(found) for name, found in puzzles.items()},
        {key: tuple(other.names[number] for number in sorted(found)) for key, found in tests.items()},
    )
