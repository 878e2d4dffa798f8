"""Formats of datasets: folders of task files, re-arc, Kaggle's files, neoneye's collection.

A new format is a function here that returns puzzles (and keys, if their order matters), and a `load_from_...` method of
`ArcDataset`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arc.puzzles.files import TaskFile, list_json, list_rearc, parse_json, read_bytes, read_tasks
from arc.puzzles.grids import (
    Grids,
    GridStore,
    Pairs,
    PathLike,
    Puzzle,
    PuzzleData,
    Queries,
    check_puzzle,
    collect,
    show,
    show_name,
)
from arc.puzzles.keys import clean_name, seeded_rng

Loaded = tuple[PuzzleData, list[str]]  # puzzles, and their keys in order


def _check_sizes(sizes: Iterable[int]) -> list[int]:
    numbers = [int(size) for size in sizes]
    if not numbers or min(numbers) < 1:
        raise ValueError(f"sizes is {tuple(sizes)}, expected numbers of demonstrations, at least 1 each")
    return numbers


def _unique_names(files: Sequence[Path]) -> list[str]:
    """Task or puzzle names of files. ValueError: two are equal."""
    first: dict[str, Path] = {}
    names = [clean_name(file.stem) for file in files]
    for file, name in zip(files, names, strict=True):
        if first.setdefault(name, file) is not file:
            raise ValueError(f'{first[name]} and {file}: duplicate id {name!r} ("_" and "." become "-"): rename one')
    return names


def read_folder(
    path: PathLike, n: int | None, sizes: Sequence[int], seed: int, grid_sizes: Sequence[int] | None
) -> Loaded:
    """See `ArcDataset.load_from_local_json`."""
    sizes = _check_sizes(sizes)
    if n is not None and n < 1:
        raise ValueError(f"n is {n}, expected at least 1 puzzle")
    if grid_sizes is not None and not (len(grid_sizes) == 2 and 1 <= grid_sizes[0] <= grid_sizes[1]):
        raise ValueError(f"grid_sizes is {grid_sizes}, expected (low, high) with 1 <= low <= high")
    files = list_json(path)
    maker = _Maker(str(path), _unique_names(files), *read_tasks(files), sizes, seed, bounds=grid_sizes)
    return maker.make("{}-{:03d}".format, n=n)


def read_rearc(
    path: PathLike, n: int, sizes: Sequence[int], seed: int, others: Mapping[str, Loaded], shuffle: bool
) -> Loaded:
    """See `ArcDataset.load_from_rearc`; `others` are the puzzles and keys of its `mix_datasets`."""
    sizes = _check_sizes(sizes)
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 round")
    files = list_rearc(path)
    maker = _Maker(str(path), _unique_names(files), *read_tasks(files), sizes, seed, rounds=n)
    data, keys = maker.make("rearc-{}{:02x}".format, shuffle=shuffle)
    return _mixed_in(data, keys, others, n, seed, shuffle) if others else (data, keys)


def read_challenges(file: PathLike) -> PuzzleData:
    """See `ArcDataset.load_from_json`."""
    path = Path(file)
    challenge = parse_json(read_bytes(path), path)
    if not isinstance(challenge, dict) or not challenge or "train" in challenge:
        raise ValueError(f'{path}: found {show(challenge)}, expected {{id: {{"train": pairs, "test": inputs}}}}')
    return collect(challenge, {}, place=f"{path}: ")


def read_solutions(file: PathLike, data: PuzzleData) -> PuzzleData:
    """The puzzles with the solutions of a file; see `ArcDataset.load_solutions`."""
    path = Path(file)
    solutions = parse_json(read_bytes(path), path)
    if not isinstance(solutions, dict):
        raise ValueError(f"{path}: found {show(solutions)}, expected {{id: [grid for each test input]}}")
    if missing := [puzzle for puzzle in data.challenge if solutions.get(puzzle) is None]:
        such = f"{len(missing):,} puzzles, such as {show_name(missing[0])}"
        raise ValueError(f"{path}: no solutions of {such}, expected all")
    return collect(data.challenge, {puzzle: solutions[puzzle] for puzzle in data.challenge}, place=f"{path}: ")


def read_neoneye(path: PathLike) -> PuzzleData:
    """See `ArcDataset.load_from_neoneye`."""
    newest: dict[tuple[Path, str], tuple[int, Path]] = {}
    for file in list_json(Path(path) / "data", "*/*.json"):
        version = re.search(r"_v([0-9]+)\Z", file.stem)
        stem, number = (file.stem[: version.start()], int(version[1])) if version else (file.stem, 1)
        newest[file.parent, stem] = max(newest.get((file.parent, stem), (number, file)), (number, file))
    files = sorted(file for _, file in newest.values())
    puzzles = {}
    for name, file in zip(_unique_names(files), files, strict=True):
        puzzles[name] = parse_json(read_bytes(file), file)
        check_puzzle(puzzles[name], str(file))  # `collect` would name the puzzle, not the file
    return collect(puzzles, {})


def cycle_sizes(sizes: Sequence[int], pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes of the puzzles that a number of pairs is enough for, with one test each: int64 (puzzles,).

    Seeded orders of `sizes` follow one another. Sizes above the remaining pairs are skipped.
    """
    most = pairs // (min(sizes) + 1)
    plan = rng.permuted(np.tile(np.array(sizes, dtype=np.int64), (most, 1)), axis=1).ravel()
    if len(set(sizes)) == 1:
        return plan[:most]
    taken = []
    for size in plan.tolist():
        if size < pairs:
            taken.append(size)
            pairs -= size + 1
    return np.array(taken, dtype=np.int64)


class _Maker(NamedTuple):
    """Makes puzzles of the pairs of task files, no pair twice."""

    place: str  # opens messages
    names: Sequence[str]  # of the tasks
    store: GridStore
    files: Sequence[TaskFile]
    sizes: Sequence[int]
    seed: int
    rounds: int | None = None  # puzzles of each task; None: all that its pairs are enough for
    bounds: Sequence[int] | None = None  # of the sides of the grids

    def _choose(self, task: int, left_out: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A task's inputs and official test grids (numbers in the store), and the sizes of its puzzles."""
        file, store = self.files[task], self.store
        inputs, tests = file.first + 2 * np.arange(file.pairs), np.zeros(0, dtype=np.int64)
        if self.bounds is not None:
            sides = np.stack([side[i] for side in (store.heights, store.widths) for i in (inputs, inputs + 1)])
            inside = ((sides >= self.bounds[0]) & (sides <= self.bounds[1])).all(axis=0)
            left_out["pairs outside grid_sizes"] += int((~inside).sum())
            inputs = inputs[inside]
        if file.tests < 0:
            rng = seeded_rng(self.seed, "pairs", self.names[task])
            inputs = inputs[rng.permutation(len(inputs))]
            plan = cycle_sizes(self.sizes, len(inputs), rng)[: self.rounds]
            if self.rounds is not None and len(plan) < self.rounds:
                rounds = f"enough for {len(plan)} rounds with sizes {tuple(self.sizes)} and a test each"
                task_pairs = f"{self.place}: task {self.names[task]} has {file.pairs} pairs"
                raise ValueError(f"{task_pairs}, {rounds}, expected {self.rounds}: lower n, or generate more pairs")
            used = int((plan + 1).sum())
            left_out["pairs that fill no puzzle"] += len(inputs) - used
            inputs = inputs[:used]
        else:
            plan = np.array([len(inputs)] if len(inputs) else [], dtype=np.int64)
            tests = file.first + 2 * file.pairs + np.arange(file.tests * (1 + file.solved) * len(plan))
        left_out["tasks without a puzzle"] += not len(plan)
        return inputs, tests, plan

    def make(self, name: Callable[[str, int], str], n: int | None = None, shuffle: bool = True) -> Loaded:
        """Puzzles round by round: the first of every task, the second of every task, and so on.

        Args:
            name: a puzzle's id from its task's name and its round.
            n: how many puzzles; None: all.
            shuffle: whether the order within a round is seeded; else the tasks' order.
        """
        left_out = dict.fromkeys(("pairs outside grid_sizes", "pairs that fill no puzzle", "tasks without a puzzle"), 0)
        grids: list[np.ndarray] = []  # numbers in the store, in the order of the puzzles
        puzzles: list[np.ndarray] = []  # (task, round, demonstrations, first grid) of each, task by task
        position = 0
        for task in range(len(self.files)):
            inputs, tests, plan = self._choose(task, left_out)
            grids += [np.stack((inputs, inputs + 1), axis=1).ravel(), tests]
            firsts = position + 2 * (np.cumsum(plan + 1) - plan - 1)
            puzzles.append(np.stack((np.full(len(plan), task), np.arange(len(plan)), plan, firsts)))
            position += 2 * len(inputs) + len(tests)
        table = np.concatenate(puzzles, axis=1)
        count, sizes = table.shape[1], tuple(self.sizes)
        if not count:
            within = "" if self.bounds is None else f" within grid_sizes {tuple(self.bounds)}"
            problem = f"no task has the pairs of one puzzle{within}"
            raise ValueError(f"{self.place}: {problem}, expected {min(sizes)} and a test")
        if n is not None and n > count:
            maximum = f"{count:,} with sizes {sizes} and no pair used twice"
            raise ValueError(f"{self.place}: {n:,} puzzles asked for, the maximum is {maximum}: lower n")
        order = np.lexsort((seeded_rng(self.seed, "order").random(count) if shuffle else table[0], table[1]))
        store = self.store.picked(np.concatenate(grids))
        data, keys = self._cut(store, table[:, order[:n]], name)
        return data._replace(left_out={reason: count for reason, count in left_out.items() if count}), keys

    def _cut(self, store: GridStore, table: np.ndarray, name: Callable[[str, int], str]) -> Loaded:
        """The puzzles of a table, see `make`."""
        challenge: dict[str, Puzzle] = {}
        solutions, tasks, keys = {}, {}, []
        for task, number, size, first in table.T.tolist():
            file, title = self.files[task], self.names[task]
            puzzle, tests, test = name(title, number) if file.tests < 0 else title, abs(file.tests), first + 2 * size
            if puzzle in challenge:
                raise ValueError(f"{self.place}: duplicate puzzle id {puzzle!r}, expected each once: rename a file")
            challenge[puzzle] = Puzzle(train=Pairs(store, first, size), test=Queries(store, test, tests))
            if file.tests < 0 or file.solved:
                solutions[puzzle] = Grids(store, test + tests, tests)
            tasks[puzzle] = title
            keys += [f"{puzzle}_{i}" for i in range(tests)]
        return PuzzleData(store, challenge, solutions, tasks), keys


def _mixed_in(
    data: PuzzleData, keys: list[str], others: Mapping[str, Loaded], rounds: int, seed: int, shuffle: bool
) -> Loaded:
    """Spread the keys of other datasets over the rounds, each under `NAME-KEY`."""
    groups, challenge, solutions, tasks = [keys], {**data.challenge}, {**data.solutions}, {**data.tasks}
    for title, (other, other_keys) in others.items():
        prefix = clean_name(title) + "-"
        groups.append([prefix + key for key in other_keys])
        challenge |= {prefix + puzzle: value for puzzle, value in other.challenge.items()}
        solutions |= {prefix + puzzle: value for puzzle, value in other.solutions.items()}
        tasks |= {prefix + puzzle: prefix + other.tasks.get(puzzle, puzzle) for puzzle in other.challenge}
    # Every dataset's keys are cut into as many pieces as there are rounds.
    places = np.concatenate([np.arange(len(group)) * rounds // max(len(group), 1) for group in groups])
    all_keys = [key for group in groups for key in group]
    draws = seeded_rng(seed, "mix").random(len(all_keys)) if shuffle else np.zeros(len(all_keys))
    mixed = [all_keys[i] for i in np.lexsort((draws, places))]
    return collect(challenge, solutions)._replace(tasks=tasks, left_out=data.left_out), mixed
