"""Loading and splitting of datasets, the same way in every script: puzzles to train on and held-out puzzles."""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np

from arc.puzzles.dataset import ArcDataset, Holdout
from arc.puzzles.leaks import find_leaks


class DataSettings(Protocol):
    """The data settings of a script; `runs.settings` says what they mean."""

    dataset_dir: str
    n: int | None
    extra_dataset_dirs: list[str]
    sizes: list[int]
    grid_sizes: list[int]
    dataset_seed: int
    holdout_examples: int
    holdout_tasks: int
    holdout_seed: int


def load_dataset(settings: DataSettings) -> ArcDataset:
    """Load the dataset folder. ValueError, FileNotFoundError: bad data, missing folder."""
    try:
        return _load_folder(settings.dataset_dir, settings)
    except FileNotFoundError as error:
        command = f"python demo/make_dataset.py --out {settings.dataset_dir}"
        advice = f"name yours with --dataset_dir, or make one to try with: {command}"
        raise FileNotFoundError(f"{error}; {advice}") from None


def _load_folder(folder: str, settings: DataSettings) -> ArcDataset:
    bounds = settings.grid_sizes or None
    return ArcDataset.load_from_local_json(folder, None, tuple(settings.sizes), settings.dataset_seed, bounds)


def split_dataset(data: ArcDataset, settings: DataSettings, quiet: bool = False) -> Holdout:
    """Split a dataset and print the counts, unless `quiet`.

    `n` limits the puzzles to train on; extra_dataset_dirs add to them. ValueError: more asked for than there is.
    """
    try:
        split = data.holdout(settings.holdout_examples, settings.holdout_tasks, settings.holdout_seed)
    except ValueError as error:
        raise ValueError(f"--holdout_examples, --holdout_tasks: {settings.dataset_dir}: {error}") from None
    train = split.train if settings.n is None else split.train.subset(settings.n)
    if not quiet:
        _report_left_out(data)
        print(
            f"{settings.dataset_dir}: {len(data.keys):,} base puzzles; {len(train.keys):,} to train on, held out "
            f"{len(split.seen.keys):,} of the same tasks and {len(split.unseen.keys):,} of "
            f"{settings.holdout_tasks} others"
        )
    extras = [load_extra(folder, settings, split, quiet) for folder in settings.extra_dataset_dirs]
    try:
        return split._replace(train=train.append(*extras) if extras else train)
    except ValueError as error:
        raise ValueError(f"--extra_dataset_dirs {' '.join(settings.extra_dataset_dirs)}: {error}") from None


def _report_left_out(data: ArcDataset) -> None:
    if data.left_out:
        print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in data.left_out.items()))


def load_extra(folder: str, settings: DataSettings, split: Holdout, quiet: bool = False) -> ArcDataset:
    """Puzzles of one of extra_dataset_dirs, without those that would leak held-out puzzles.

    Two kinds are left out, counted and printed: puzzles of a task with the name of a held-out task; and puzzles that
    equal a held-out one or contain its test pair (see `find_leaks`). A held-out task under another name is recognised
    by its pairs only. sizes, grid_sizes and dataset_seed apply to this folder too.

    Raises:
        ValueError, FileNotFoundError: bad data, missing folder, a puzzle id that the dataset has too.
    """
    try:
        data = _load_folder(folder, settings)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--extra_dataset_dirs: {error}") from None
    if twice := sorted(data.challenge.keys() & {*split.train.challenge, *split.seen.challenge}):
        message = f"{settings.dataset_dir} has a puzzle {twice[0]!r} too: expected tasks of other names"
        raise ValueError(f"--extra_dataset_dirs: {folder}: {message}")
    unseen = {split.unseen.task_of(puzzle) for puzzle in split.unseen.challenge}
    named = {puzzle for puzzle in data.challenge if data.task_of(puzzle) in unseen}
    shared: set[str] = set()
    for heldout in (split.seen, split.unseen):
        leaks = find_leaks(heldout, data)
        shared.update(*leaks.puzzles.values(), *leaks.tests.values())
    usable = data.select_puzzles(data.challenge.keys() - named - shared)
    if not quiet:
        _report_left_out(data)
        print(f"{folder}: {len(usable.keys):,} puzzles more to train on")
        if named or shared:
            others = f"{len(shared - named):,} with a held-out test pair"
            print(f"left out: {len(named):,} puzzles of tasks that are held out, and {others}")
    return usable


def load_split(settings: DataSettings, quiet: bool = False) -> Holdout:
    """See `load_dataset` and `split_dataset`."""
    return split_dataset(load_dataset(settings), settings, quiet)


def with_solutions(puzzles: ArcDataset, purpose: str) -> ArcDataset:
    """The puzzles with solutions. The others are counted and printed, called `purpose` ("held out")."""
    solved = puzzles.select_puzzles(puzzles.challenge.keys() & puzzles.solutions.keys())
    if missing := len(puzzles.keys) - len(solved.keys):
        print(f"left out: {missing:,} of {len(puzzles.keys):,} {purpose}: no outputs of their tests")
    return solved


def tasks_in_turn(ds: ArcDataset, seed: int) -> ArcDataset:
    """The keys in a seeded random order: one of each task before the second of any.

    Any prefix of the keys is then spread over the tasks.
    """
    of_task: dict[str, list[str]] = {}
    for place in np.random.default_rng(seed).permutation(len(ds.keys)):
        of_task.setdefault(ds.task_of(ds.keys[place]), []).append(ds.keys[place])
    rounds = itertools.zip_longest(*of_task.values())
    return ds.change_keys(key for keys in rounds for key in keys if key is not None)
