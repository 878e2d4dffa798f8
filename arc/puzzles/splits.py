"""Loading and splitting of datasets: what is trained on, what is held out. Every script shares it."""

from __future__ import annotations

import itertools

import numpy as np

from arc.puzzles.dataset import ArcDataset, Holdout
from arc.puzzles.leaks import find_leaks
from arc.runs.settings import DataSettings


def load_dataset(settings: DataSettings) -> ArcDataset:
    """Load the dataset folder, the same way in every script.

    Raises:
        ValueError, FileNotFoundError: bad data, missing folder.
    """
    try:
        return _load_folder(settings.dataset_dir, settings)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; name yours with --dataset_dir, or make one to try with: python demo/make_dataset.py --out "
            f"{settings.dataset_dir}"
        ) from None


def _load_folder(folder: str, settings: DataSettings) -> ArcDataset:
    bounds = tuple(settings.grid_sizes) or None
    return ArcDataset.load_from_local_json(
        folder, sizes=tuple(settings.sizes), seed=settings.dataset_seed, grid_sizes=bounds
    )


def split_dataset(data: ArcDataset, settings: DataSettings, quiet: bool = False) -> Holdout:
    """Split a dataset, the same way in every script; `n` limits what is trained on, extra_dataset_dirs add to it.

    Prints how many puzzles there are, unless `quiet`.

    Raises:
        ValueError: more held out or asked for than there is.
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
        print("left out: " + ", ".join(f"{count:,} {what}" for what, count in data.left_out.items()))


def load_extra(folder: str, settings: DataSettings, split: Holdout, quiet: bool = False) -> ArcDataset:
    """Puzzles of one of extra_dataset_dirs, without those that would give away what is held out.

    Left out, counted and printed are the tasks that have the name of one that is held out whole, and puzzles that equal
    a held-out one or have its test pair among theirs, in whatever symmetry, colours and order (see `find_leaks`). A
    task that is held out and has another name here is recognised by these alone.

    Args:
        folder: of task files.
        settings: sizes, grid_sizes and dataset_seed are those of all folders.
        split: what is held out.
        quiet: print nothing.

    Raises:
        ValueError, FileNotFoundError: bad data, missing folder, a puzzle's id that the dataset has too.
    """
    try:
        data = _load_folder(folder, settings)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--extra_dataset_dirs: {error}") from None
    if twice := sorted(data.challenge.keys() & {*split.train.challenge, *split.seen.challenge}):
        raise ValueError(
            f"--extra_dataset_dirs: {folder}: {settings.dataset_dir} has a puzzle {twice[0]!r} too: expected tasks of "
            "other names"
        )
    unseen = {split.unseen.task_of(puzzle) for puzzle in split.unseen.challenge}
    named = {puzzle for puzzle in data.challenge if data.task_of(puzzle) in unseen}
    shared: set[str] = set()
    for heldout in (split.seen, split.unseen):
        leaks = find_leaks(heldout, data)
        shared.update(*leaks.puzzles.values(), *leaks.tests.values())
    kept = data.select_puzzles(data.challenge.keys() - named - shared)
    if not quiet:
        _report_left_out(data)
        print(f"{folder}: {len(kept.keys):,} puzzles more to train on")
        if named or shared:
            print(
                f"left out: {len(named):,} puzzles of tasks that are held out, and {len(shared - named):,} with a "
                "held-out test pair"
            )
    return kept


def load_split(settings: DataSettings, quiet: bool = False) -> Holdout:
    """Load the dataset folder and split it; see `load_dataset` and `split_dataset`."""
    return split_dataset(load_dataset(settings), settings, quiet)


def with_solutions(puzzles: ArcDataset, what: str) -> ArcDataset:
    """The puzzles whose tests have outputs; those that lack them are counted and printed."""
    solved = puzzles.select_puzzles(puzzles.challenge.keys() & puzzles.solutions.keys())
    if missing := len(puzzles.keys) - len(solved.keys):
        print(f"left out: {missing:,} of {len(puzzles.keys):,} {what}: no outputs of their tests")
    return solved


def tasks_in_turn(ds: ArcDataset, seed: int) -> ArcDataset:
    """The dataset with its keys in a random order, one of each task before the second of any: the first stand for all.

    In the dataset's own order the lowest numbers come first, and tasks with few puzzles have no others.

    Args:
        ds: the dataset.
        seed: of the order of tasks and of the puzzles of each.
    """
    of_task: dict[str, list[str]] = {}
    for place in np.random.default_rng(seed).permutation(len(ds.keys)):
        of_task.setdefault(ds.task_of(ds.keys[place]), []).append(ds.keys[place])
    rounds = itertools.zip_longest(*of_task.values())
    return ds.change_keys(key for part in rounds for key in part if key is not None)
