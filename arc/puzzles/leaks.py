"""Leaks: puzzles and test pairs of an evaluation that training has seen, in any symmetry, colours and order.

    leaks = find_leaks(evaluation, training)
    leaks.puzzles  # {"007bbfb7": ("007bbfb7-012",), ...}: whole puzzles that are training puzzles
    leaks.tests  # {"007bbfb7_0": ("007bbfb7-003", ...), ...}: test pairs that are pairs of training puzzles

Two puzzles are equal if one symmetry of the square and one permutation of the colours map the pairs of one to those
of the other, in any order. Repeated pairs count. It does not matter which pair is the test: training on the same pairs
in other roles has seen the answer too.

The comparison is exact: only equal puzzles have the same canonical form. Cheap signatures of all pairs choose which
forms are computed.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.fingerprints import pair_form
from arc.puzzles.grids import MAX_SIDE, GridStore

CHUNK_CELLS = 1_000_000  # cells that are counted at once: some tens of MB


class _Table(NamedTuple):
    """All pairs of a dataset's puzzles as arrays (pairs,)."""

    puzzle: np.ndarray  # number of the puzzle
    test: np.ndarray  # number of the test input, -1: a demonstration
    query: np.ndarray  # number of the grid in the store
    reply: np.ndarray  # likewise, -1: unknown


def _table(ds: ArcDataset) -> _Table:
    """The demonstrations of all puzzles, then their tests."""
    columns = []
    for name, puzzle in ds.challenge.items():
        pairs, tests, solved = puzzle["train"], puzzle["test"], ds.solutions.get(name)
        columns.append((pairs.first, len(pairs), tests.first, len(tests), -1 if solved is None else solved.first))
    train, train_count, test, test_count, solution = np.array(columns, dtype=np.int64).reshape(-1, 5).T

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
    """Cells of each colour in each grid: uint16 (grids, 10).

    `grids` are numbers in the store, int64 (grids,); -1: no grid, no cells.
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
    """A hash of each pair, uint64 (pairs,), equal for pairs that a symmetry and a permutation make equal.

    It depends on the four sides (or those transposed) and on the cells of each colour in input and output. `query` and
    `reply` are numbers in the store, int64 (pairs,); reply -1: an input alone.
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


class Leaks(NamedTuple):
    """Puzzles and test pairs that an evaluation shares with training."""

    puzzles: dict[str, tuple[str, ...]]  # evaluation puzzle id -> ids of the equal training puzzles
    tests: dict[str, tuple[str, ...]]  # evaluation key PUZZLE_INDEX -> ids of the training puzzles with its test pair


class _Items(NamedTuple):
    """Puzzles or pairs to compare: with solutions, or without if one of two has none."""

    known: np.ndarray  # bool (items,), whether the solutions are known
    signatures: Callable[[bool], np.ndarray]  # with solutions or without, uint64 (items,)
    form: Callable[[int, bool], Hashable]  # of an item, with its solutions or without

    def shared(self, others: _Items) -> list[tuple[int, int]]:
        """Numbers of equal items (in self, in others), sorted. Only the forms of self are held in memory."""
        everything = np.ones(len(others.known), dtype=bool)
        equal: list[tuple[int, int]] = []
        for mask, others_mask, solutions in (
            (self.known, others.known, True),
            (self.known, ~others.known, False),
            (~self.known, everything, False),
        ):
            if not (mask.any() and others_mask.any()):
                continue
            signatures, others_signatures = self.signatures(solutions)[mask], others.signatures(solutions)[others_mask]
            numbers: dict[Hashable, list[int]] = defaultdict(list)
            for number in np.flatnonzero(mask)[np.isin(signatures, others_signatures)].tolist():
                numbers[self.form(number, solutions)].append(number)
            for other in np.flatnonzero(others_mask)[np.isin(others_signatures, signatures)].tolist():
                equal += [(number, other) for number in numbers.get(others.form(other, solutions), ())]
        return sorted(equal)


class _Side:
    """A dataset's puzzles and pairs with their signatures."""

    def __init__(self, ds: ArcDataset):
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

    The puzzles and test inputs that the evaluation's keys name are compared with all pairs of the training puzzles.
    Where one side lacks a solution, both are compared without it. A puzzle with all pairs of an evaluation puzzle and
    more is not equal to it.

    Where puzzles are random examples of a task, test pairs tell more than whole puzzles: the test pair of one can be a
    demonstration of another. Each pair may have its own symmetry and colours there. Small grids of few colours can be
    equal by chance: look at the results.
    """
    side, other = _Side(evaluation), _Side(training)
    puzzles: dict[str, list[str]] = defaultdict(list)
    for number, equal in side.puzzles().shared(other.puzzles()):
        puzzles[side.names[number]].append(other.names[equal])
    named = {evaluation.get_base_key_and_reply_num(key) for key in evaluation.keys}
    table = side.table
    titles = [(side.names[i], test) for i, test in zip(table.puzzle.tolist(), table.test.tolist(), strict=True)]
    chosen = np.array([place for place, (_, test) in enumerate(titles) if test >= 0 and titles[place] in named], int)
    tests: dict[str, set[int]] = defaultdict(set)  # a puzzle can have a pair more than once
    everything = np.arange(len(other.table.query))
    for place, equal in side.pairs(chosen).shared(other.pairs(everything)):
        name, test = titles[chosen[place]]
        tests[f"{name}_{test}"].add(int(other.table.puzzle[equal]))
    return Leaks(
        {name: tuple(ids) for name, ids in puzzles.items()},
        {key: tuple(other.names[number] for number in sorted(numbers)) for key, numbers in tests.items()},
    )
