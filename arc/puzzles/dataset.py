"""Puzzles of the ARC kind: loading, views, text, token ids, decoding.

`ArcDataset` reads folders of task files, Kaggle's challenge files and two public collections. Every grid lies in one
flat uint8 array; puzzles are small windows on it. A *key* such as `007bbfb7_0.tp.rt.perm0123456789.ex2-0-1` names a
view of a puzzle: puzzle, test index, then transforms in order:

    tp              transpose
    rt              rotate by 90 degrees counter-clockwise (numpy.rot90)
    permDDDDDDDDDD  colour c becomes the digit at position c
    ex2-0-1         order (and subset) of the demonstration pairs; a second `ex` picks from what the first has left

    ds = ArcDataset.load_from_local_json("dataset")
    views = ds.views(seed=42, tp="all", rt="all", perm=True, shfl_ex=True)
    key, task = ds.get_task(views.key(epoch=0, index=5), **format_options("<|eot_id|>"))
    grid, correct, info = ds.decode(task["reply"], lines_sep="\n", key=key)

Method names and keywords are those of the ARChitects' 2024 loader, so that notebooks written for it port; the code is
our own. It needs numpy and the standard library (tqdm only for progress bars), never torch or transformers: tokenizers
are passed in. Files, pairs and rows are counted from 1 in messages.

Files are read by `arc_files`, which keeps what it has parsed in a cache folder; token ids are made by `arc_samples`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from arc.puzzles.files import (
    MAX_SIDE,
    Grids,
    GridStore,
    Pairs,
    Queries,
    TaskFile,
    Window,
    check_grid,
    check_puzzle,
    is_unicode,
    list_json,
    list_rearc,
    parse_json,
    read_bytes,
    read_tasks,
    show,
    show_name,
)
from arc.puzzles.keys import (
    COLOURS,
    View,
    check_colours,
    check_order,
    counter_draws,
    seed_words,
    seeded_rank,
    seeded_rng,
    shortened_key,
    split_name,
    turned,
)
from arc.puzzles.leaks import puzzle_fingerprint
from arc.puzzles.text import does_not_fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ATTEMPTS = ("attempt_1", "attempt_2")

# ---------------------------------------------------------------------------------------------------------------------
# The dataset


class Holdout(NamedTuple):
    """A split: puzzles to train on, other puzzles of the same tasks, puzzles of tasks that `train` has nothing of."""

    train: ArcDataset
    seen: ArcDataset
    unseen: ArcDataset


class ArcDataset:
    """Puzzles, and the keys (views of them) that are worked with. Methods give new datasets; this one stays as it is.

    Attributes:
        keys: list of keys.
        challenge: puzzle id -> {"train": pairs, "test": inputs}: sequences of {"input": grid, "output": grid} and of
            {"input": grid}.
        solutions: puzzle id -> sequence of grids, one for each test input; only puzzles whose solutions are known.
        is_orig: whether the keys are whole puzzles as they were loaded.
        left_out: what loading left out, and how much of it.

    Grids are uint8 (height, width) and read-only. The dicts are windows on one store: read them, do not write them.
    """

    def __init__(
        self,
        challenge: Mapping[str, Any],
        solutions: Mapping[str, Any] | None = None,
        keys: Iterable[str] | None = None,
        is_orig: bool = False,
    ):
        """Check puzzles and copy them into one store; those of another ArcDataset are taken as they are.

        Args:
            challenge: puzzle id -> {"train": pairs, "test": pairs}; grids are lists of rows or integer arrays. If the
                test pairs have outputs, these are the solutions, unless `solutions` has them.
            solutions: puzzle id -> grids.
            keys: default: every test input of every puzzle, sorted; the bare id of a puzzle that has none.
            is_orig: see the class.

        Raises:
            ValueError: a bad id, pair or grid, named by puzzle, pair and row; a key of a puzzle that is not there.
        """
        self._assign(*_collect(challenge, solutions or {}), keys, is_orig)

    def _assign(
        self,
        store: GridStore,
        challenge: dict[str, dict[str, Window]],
        solutions: dict[str, Grids],
        keys: Iterable[str] | None,
        is_orig: bool,
        tasks: Mapping[str, str] | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> ArcDataset:
        if keys is None:
            keys = sorted(
                key
                for name, p in challenge.items()
                for key in ([f"{name}_{i}" for i in range(len(p["test"]))] or [name])
            )
        self.keys = list(keys)
        puzzles = dict.fromkeys(key.partition(".")[0].partition("_")[0] for key in self.keys)  # ordered and unique
        for puzzle in puzzles:
            if puzzle not in challenge:
                raise ValueError(
                    f"no puzzle {puzzle!r} among {len(challenge):,}, expected keys of puzzles that are there"
                )
        self.challenge = {puzzle: challenge[puzzle] for puzzle in puzzles}
        self.solutions = {puzzle: solutions[puzzle] for puzzle in puzzles if puzzle in solutions}
        self.is_orig = is_orig
        self.left_out = dict(left_out or {})
        self.store, self._tasks = store, tasks or {}
        return self

    def _derived(self, keys: Iterable[str] | None, is_orig: bool, collected: tuple[Any, ...] = ()) -> ArcDataset:
        """A dataset of the same tasks, over the same store and puzzles unless others (see `_collect`) are given."""
        parts = collected or (self.store, self.challenge, self.solutions)
        return object.__new__(type(self))._assign(*parts, keys, is_orig, self._tasks, self.left_out)

    # -- loading

    @classmethod
    def load_from_local_json(
        cls,
        path: str | os.PathLike[str],
        n: int | None = None,
        sizes: Sequence[int] = (6,),
        seed: int = 42,
        grid_sizes: tuple[int, int] | None = None,
    ) -> ArcDataset:
        """Load a folder of task files, each a list of pairs of one task or an official {"train", "test"} puzzle.

        From a list of pairs, puzzles of `size` demonstrations and one test are made in a seeded order; no pair is used
        twice. An official file is one puzzle as it is. Puzzles come in rounds: the first of every task in a seeded
        order, the second of every task, and so on, so that any prefix of `keys` is spread evenly over the tasks.

        Args:
            path: the folder.
            n: how many puzzles; default: all that there are.
            sizes: demonstrations of a puzzle, in a seeded cycle; sizes that a task's rest is too short for are passed
                over. Not for official files.
            seed: of all of it.
            grid_sizes: (low, high): only pairs whose every side is within these bounds; for official files, only such
                demonstrations. What falls out is counted in `left_out`.

        Returns:
            Puzzles `TASK-ROUND` (official ones: `TASK`), TASK being the file name with "_" and "." replaced by "-".

        Raises:
            FileNotFoundError: no folder or no files.
            ValueError: bad data (named by file, pair and row), two files of one task name, more puzzles asked for than
                there are (the message says how many), settings out of range.
        """
        sizes = _check_sizes(sizes)
        if n is not None and n < 1:
            raise ValueError(f"n is {n}, expected at least 1 puzzle")
        if grid_sizes is not None and not (len(grid_sizes) == 2 and 1 <= grid_sizes[0] <= grid_sizes[1]):
            raise ValueError(f"grid_sizes is {grid_sizes}, expected (low, high) with 1 <= low <= high")
        files = list_json(path)
        names = _unique_names(files, [cls.base_key_replace_invalid_chars(file.stem) for file in files])
        return cls._from_tasks(names, *read_tasks(files), sizes, seed, grid_sizes=grid_sizes, n=n, place=str(path))

    @classmethod
    def load_from_rearc(
        cls,
        path: str | os.PathLike[str],
        n: int,
        sizes: Sequence[int],
        seed: int,
        mix_datasets: Mapping[str, ArcDataset] | None = None,
        shuffle: bool = True,
    ) -> ArcDataset:
        """Load a re-arc folder: metadata.json names the tasks, tasks/NAME.json is a list of pairs.

        Args:
            path: the folder.
            n: rounds: puzzles of each task.
            sizes: demonstrations of a puzzle, in a seeded cycle.
            seed: of all of it.
            mix_datasets: name -> dataset whose keys are spread over the rounds, as `NAME-KEY`.
            shuffle: whether the order within a round is seeded (else by name).

        Returns:
            Puzzles `rearc-TASKRR`, RR being the round in hexadecimal.

        Raises:
            FileNotFoundError, ValueError: as `load_from_local_json`; a task with too few pairs for n rounds.

        Source: ARChitects' load_from_rearc; other draws.
        """
        sizes = _check_sizes(sizes)
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1 round")
        files = list_rearc(path)
        names = _unique_names(files, [cls.base_key_replace_invalid_chars(file.stem) for file in files])
        options: dict[str, Any] = {
            "rounds": n,
            "name": lambda task, number: f"rearc-{task}{number:02x}",
            "shuffle": shuffle,
        }
        return cls._from_tasks(names, *read_tasks(files), sizes, seed, place=str(path), mix=mix_datasets, **options)

    @classmethod
    def _from_tasks(
        cls,
        names: Sequence[str],
        store: GridStore,
        files: Sequence[TaskFile],
        sizes: Sequence[int],
        seed: int,
        place: str,
        name: Callable[[str, int], str] = "{}-{:03d}".format,
        rounds: int | None = None,
        n: int | None = None,
        grid_sizes: tuple[int, int] | None = None,
        shuffle: bool = True,
        mix: Mapping[str, ArcDataset] | None = None,
    ) -> ArcDataset:
        """Make puzzles of the tasks' pairs, round by round. The arguments are those of the loaders above."""
        left_out = dict.fromkeys(("pairs outside grid_sizes", "pairs that fill no puzzle", "tasks without a puzzle"), 0)
        grids: list[np.ndarray] = []  # numbers in the store, in the order of the puzzles
        puzzles: list[np.ndarray] = []  # (task, round, demonstrations, first grid) of each, task by task
        position = 0
        for task, file in enumerate(files):
            inputs, after = file.first + 2 * np.arange(file.pairs), np.zeros(0, dtype=np.int64)
            if grid_sizes is not None:
                sides = np.stack([side[i] for side in (store.heights, store.widths) for i in (inputs, inputs + 1)])
                inside = ((sides >= grid_sizes[0]) & (sides <= grid_sizes[1])).all(axis=0)
                left_out["pairs outside grid_sizes"] += int((~inside).sum())
                inputs = inputs[inside]
            if file.tests < 0:
                rng = seeded_rng(seed, "pairs", names[task])
                inputs = inputs[rng.permutation(len(inputs))]
                plan = _cycle_sizes(sizes, len(inputs), rng)[:rounds]
                if rounds is not None and len(plan) < rounds:
                    raise ValueError(
                        f"{place}: task {names[task]} has {file.pairs} pairs, enough for {len(plan)} rounds with sizes "
                        f"{tuple(sizes)} and a test each, expected {rounds}: lower n, or generate more pairs"
                    )
                used = int((plan + 1).sum())
                left_out["pairs that fill no puzzle"] += len(inputs) - used
                inputs = inputs[:used]
            else:
                plan = np.array([len(inputs)] if len(inputs) else [], dtype=np.int64)
                after = file.first + 2 * file.pairs + np.arange(file.tests * (1 + file.solved) * len(plan))
            left_out["tasks without a puzzle"] += not len(plan)
            grids += [np.stack((inputs, inputs + 1), axis=1).ravel(), after]
            firsts = position + 2 * (np.cumsum(plan + 1) - plan - 1)
            puzzles.append(np.stack((np.full(len(plan), task), np.arange(len(plan)), plan, firsts)))
            position += 2 * len(inputs) + len(after)
        table = np.concatenate(puzzles, axis=1)
        if not table.shape[1]:
            bounds = "" if grid_sizes is None else f" within grid_sizes {tuple(grid_sizes)}"
            raise ValueError(f"{place}: no task has the pairs of one puzzle{bounds}, expected {min(sizes)} and a test")
        if n is not None and n > table.shape[1]:
            raise ValueError(
                f"{place}: {n:,} puzzles asked for, the maximum is {table.shape[1]:,} with sizes {tuple(sizes)} and no "
                "pair used twice: lower n"
            )
        order = np.lexsort((seeded_rng(seed, "order").random(table.shape[1]) if shuffle else table[0], table[1]))
        store = store.picked(np.concatenate(grids))
        challenge: dict[str, dict[str, Window]] = {}
        solutions, tasks, keys = {}, {}, []
        for task, number, size, first in table[:, order[:n]].T.tolist():
            file, title = files[task], names[task]
            puzzle, tests, test = name(title, number) if file.tests < 0 else title, abs(file.tests), first + 2 * size
            if puzzle in challenge:
                raise ValueError(f"{place}: duplicate puzzle id {puzzle!r}, expected each once: rename a file")
            challenge[puzzle] = {"train": Pairs(store, first, size), "test": Queries(store, test, tests)}
            if file.tests < 0 or file.solved:
                solutions[puzzle] = Grids(store, test + tests, tests)
            tasks[puzzle] = title
            keys += [f"{puzzle}_{i}" for i in range(tests)]
        if mix:
            # Every dataset's keys are cut into as many parts as there are rounds.
            groups = [keys] + [[f"{_valid(title)}-{key}" for key in other.keys] for title, other in mix.items()]
            places = np.concatenate([np.arange(len(group)) * (rounds or 1) // max(len(group), 1) for group in groups])
            keys = [key for group in groups for key in group]
            draws = seeded_rng(seed, "mix").random(len(keys)) if shuffle else np.zeros(len(keys))
            keys = [keys[i] for i in np.lexsort((draws, places))]
            for title, other in mix.items():
                challenge.update({f"{_valid(title)}-{puzzle}": value for puzzle, value in other.challenge.items()})
                solutions.update({f"{_valid(title)}-{puzzle}": value for puzzle, value in other.solutions.items()})
                tasks.update({f"{_valid(title)}-{p}": f"{_valid(title)}-{other.task_of(p)}" for p in other.challenge})
            store, challenge, solutions = _collect(challenge, solutions)
        left_out = {what: count for what, count in left_out.items() if count}
        return object.__new__(cls)._assign(store, challenge, solutions, keys, True, tasks, left_out)

    @classmethod
    def load_from_json(cls, challenges_file: str | os.PathLike[str]) -> ArcDataset:
        """Load a challenge file of Kaggle's format: {id: {"train": pairs, "test": inputs}}. The keys are sorted.

        Raises:
            FileNotFoundError, ValueError: no such file, bad data (named by file, puzzle, pair and row), duplicate ids.
        """
        path = Path(challenges_file)
        challenge = parse_json(read_bytes(path), path)
        if not isinstance(challenge, dict) or not challenge or "train" in challenge:
            raise ValueError(f'{path}: found {show(challenge)}, expected {{id: {{"train": pairs, "test": inputs}}}}')
        with _named(path):
            return cls(challenge, is_orig=True)

    def load_solutions(self, solutions_file: str | os.PathLike[str]) -> ArcDataset:
        """This dataset with the solutions of a Kaggle file: {id: grids}; ids of other puzzles are passed over.

        Raises:
            FileNotFoundError, ValueError: no such file, bad data, a puzzle without solutions or with another number of
                them.
        """
        path = Path(solutions_file)
        found = parse_json(read_bytes(path), path)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: found {show(found)}, expected {{id: [grid for each test input]}}")
        missing = [puzzle for puzzle in self.challenge if found.get(puzzle) is None]
        if missing:
            raise ValueError(
                f"{path}: no solutions of {len(missing):,} puzzles, such as {show_name(missing[0])}, expected all"
            )
        with _named(path):
            collected = _collect(self.challenge, {puzzle: found[puzzle] for puzzle in self.challenge})
        return self._derived(self.keys, self.is_orig, collected)

    @classmethod
    def load_from_neoneye(cls, path: str | os.PathLike[str]) -> ArcDataset:
        """Load a dataset of neoneye's collection: data/*/*.json, of which the highest version (_vN) of each counts.

        Raises:
            FileNotFoundError, ValueError: as `load_from_local_json`.
        """
        newest: dict[tuple[Path, str], tuple[int, Path]] = {}
        for file in list_json(Path(path) / "data", "*/*.json"):
            stem, version = re.fullmatch(r"(.*?)(?:_v([0-9]+))?", file.stem, re.DOTALL).groups()
            entry = (int(version or 1), file)
            newest[file.parent, stem] = max(newest.get((file.parent, stem), entry), entry)
        files = sorted(file for _, file in newest.values())
        names = _unique_names(files, [cls.base_key_replace_invalid_chars(file.stem) for file in files])
        puzzles, solutions = {}, {}
        for name, file in zip(names, files, strict=True):
            value = parse_json(read_bytes(file), file)
            puzzle = check_puzzle(value, str(file))
            pairs = zip(puzzle.train[0::2], puzzle.train[1::2], strict=True)
            train = [{"input": grid, "output": output} for grid, output in pairs]
            puzzles[name] = {"train": train, "test": [{"input": grid} for grid in puzzle.test]}
            if puzzle.solution:
                solutions[name] = puzzle.solution
        return cls(puzzles, solutions, is_orig=True)

    # -- keys

    @staticmethod
    def base_key_replace_invalid_chars(base_key: str) -> str:
        """A puzzle id without the two characters that have a meaning in keys."""
        return _valid(base_key)

    @staticmethod
    def get_base_key_and_reply_num(key: str) -> tuple[str, int]:
        """Puzzle id and test index of a key; -1: the key names no test input."""
        return split_name(key)

    @classmethod
    def get_base_key(cls, key: str) -> str:
        """Puzzle id of a key."""
        return split_name(key)[0]

    def task_of(self, key: str) -> str:
        """The task that a key's puzzle was made from: a file of pairs; otherwise the puzzle is a task of its own."""
        puzzle = split_name(key)[0]
        return self._tasks.get(puzzle, puzzle)

    def change_keys(self, keys: Iterable[str]) -> ArcDataset:
        """The same puzzles under other keys; puzzles without a key fall out.

        Raises:
            ValueError: a key of a puzzle that is not there.
        """
        return self._derived(keys, is_orig=False)

    def subset(self, n: int) -> ArcDataset:
        """The first n keys.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= n <= len(self.keys):
            raise ValueError(f"{n:,} keys asked for, expected 1 to the maximum of {len(self.keys):,}")
        return self._derived(self.keys[:n], self.is_orig)

    def append(self, *others: ArcDataset) -> ArcDataset:
        """This dataset with the puzzles and keys of others behind its own.

        Raises:
            ValueError: a puzzle id that two of them have.

        Source: ARChitects' append, which keeps the last of several puzzles of one id.
        """
        challenge: dict[str, Any] = {}
        solutions: dict[str, Any] = {}
        tasks: dict[str, str] = {}
        for ds in (self, *others):
            if clash := challenge.keys() & ds.challenge.keys():
                raise ValueError(f"puzzle {min(clash)!r} is there already, expected each id once")
            challenge |= ds.challenge
            solutions |= ds.solutions
            tasks |= {puzzle: ds.task_of(puzzle) for puzzle in ds.challenge}
        keys = [key for ds in (self, *others) for key in ds.keys]
        is_orig = all(ds.is_orig for ds in (self, *others))
        parts = _collect(challenge, solutions)
        return object.__new__(type(self))._assign(*parts, keys, is_orig, tasks, self.left_out)

    def select_puzzles(self, puzzles: Iterable[str]) -> ArcDataset:
        """The keys of some puzzles, in the order that they have here; an original dataset stays one.

        Raises:
            ValueError: a puzzle that is not there.
        """
        wanted = set(puzzles)
        missing = sorted(wanted - self.challenge.keys())
        if missing:
            raise ValueError(f"no puzzle {missing[0]!r} among {len(self.challenge):,}")
        return self._derived([key for key in self.keys if self.get_base_key(key) in wanted], self.is_orig)

    def grouped_keys(self) -> dict[str, list[list[str]]]:
        """Puzzle id -> test index -> keys; keys without a test index count as index 0."""
        groups: dict[str, list[list[str]]] = {}
        for key in self.keys:
            puzzle, number = split_name(key)
            group = groups.setdefault(puzzle, [])
            group += [[] for _ in range(max(number, 0) + 1 - len(group))]
            group[max(number, 0)].append(key)
        return groups

    def repeat(self, n: int, seed: int | None = None) -> ArcDataset:
        """The keys n times over, each time in a seeded order of its own if there is a seed."""
        rng = None if seed is None else seeded_rng(seed)
        rounds = [
            self.keys if rng is None else [self.keys[i] for i in rng.permutation(len(self.keys))] for _ in range(n)
        ]
        return self.change_keys(key for keys in rounds for key in keys)

    def split(self, n: int, split_seed: int | str, **kwargs: Any) -> list[ArcDataset]:
        """Cut the puzzles into n datasets of about one size.

        Args:
            n: how many.
            split_seed: order of the puzzles before the cut: a seed, or "len": by length.
            kwargs: for "len": as for `get_length`, `reverse` too; a puzzle is as long as its longest key.

        Raises:
            ValueError: not an original dataset, fewer puzzles than n, kwargs beside a seed.
        """
        self._require_original("split")
        puzzles = sorted(self.challenge)
        if not 1 <= n <= len(puzzles):
            raise ValueError(f"{n:,} parts asked for, expected 1 to the maximum of {len(puzzles):,} puzzles")
        if split_seed == "len":
            reverse = kwargs.pop("reverse", False)
            longest = {name: max(self.get_length(k, **kwargs) for k in self._test_keys(name)) for name in puzzles}
            puzzles.sort(key=longest.__getitem__, reverse=reverse)
        elif isinstance(split_seed, str) or kwargs:
            raise ValueError(
                f'split_seed is {split_seed!r} with {sorted(kwargs)}, expected a seed alone, or "len" and options'
            )
        else:
            puzzles = [puzzles[i] for i in seeded_rng(split_seed).permutation(len(puzzles))]
        parts = [puzzles[len(puzzles) * i // n : len(puzzles) * (i + 1) // n] for i in range(n)]
        return [self._derived(sorted(k for p in part for k in self._test_keys(p)), is_orig=True) for part in parts]

    def holdout(self, examples: int = 0, tasks: int = 0, seed: int = 42) -> Holdout:
        """Split off puzzles to measure on, the same ones for the same seed.

        Args:
            examples: puzzles in all that go to `seen`, spread evenly over the tasks that stay; each task keeps at least
                one in `train`. Where every puzzle is a task of its own, whole puzzles.
            tasks: whole tasks that go to `unseen`. Which ones depends on the seed and the tasks' names alone, not on
                the number, sizes or order of the puzzles.
            seed: of both choices.

        Returns:
            Three datasets whose keys are this one's, in order.

        Raises:
            ValueError: more asked for than there is; the message names the maximum.
        """
        puzzles: dict[str, list[str]] = {}
        for puzzle in self.challenge:
            puzzles.setdefault(self.task_of(puzzle), []).append(puzzle)
        if not 0 <= tasks < max(len(puzzles), 1):
            raise ValueError(f"{tasks:,} tasks to hold out, expected 0 to the maximum of {max(len(puzzles) - 1, 0):,}")
        ranked = sorted(puzzles, key=lambda task: seeded_rank(seed, task))
        stay = ranked[tasks:]
        whole = all(len(puzzles[task]) == 1 for task in stay)
        candidates = []  # one puzzle of every task, then a second one of every task, ...
        for place, task in enumerate(stay):
            ordered = sorted(puzzles[task], key=lambda puzzle: seeded_rank(seed, puzzle))
            candidates += [(turn, place, puzzle) for turn, puzzle in enumerate(ordered[: None if whole else -1])]
        maximum = max(len(candidates) - 1, 0) if whole else len(candidates)
        if not 0 <= examples <= maximum:
            raise ValueError(
                f"{examples:,} examples to hold out, expected 0 to the maximum of {maximum:,} beside {tasks} tasks"
            )
        seen = {puzzle for _, _, puzzle in sorted(candidates)[:examples]}
        unseen = {puzzle for task in ranked[:tasks] for puzzle in puzzles[task]}
        parts: tuple[list[str], ...] = ([], [], [])
        for key in self.keys:
            puzzle = key.partition(".")[0].partition("_")[0]
            parts[1 if puzzle in seen else 2 if puzzle in unseen else 0].append(key)
        return Holdout(*(self._derived(keys, self.is_orig) for keys in parts))

    def views(
        self,
        seed: int,
        tp: bool | str = False,
        rt: bool | str = False,
        perm: bool = False,
        keep_background: bool = False,
        shfl_ex: bool = False,
        perm_share: float = 1.0,
    ) -> Views:
        """Views of the keys, made when they are asked for; see `Views`."""
        return Views(self, seed, tp, rt, perm, keep_background, shfl_ex, perm_share)

    def augment_keys(self, keys: Sequence[str], seed: int | None = None, n: int = 1, **options: Any) -> list[str]:
        """Keys of augmented views in upstream's order: n draws of each symmetry of each key, keys running fastest.

        Args:
            keys: keys of this dataset's puzzles.
            seed: of the draws; None: from the system.
            n: draws.
            options: tp, rt, perm, keep_background, shfl_ex, perm_share as in `Views`.

        Source: ARChitects' augment_keys, whose draws of `tp` and `rt` are repeated n times; here every draw is its own.
        """
        views = Views(self.change_keys(keys), seed_words(seed)[0], **options)
        order = np.arange(len(views)).reshape(len(keys), -1).T.ravel()
        return [key for draw in range(n) for key in views.keys(np.full(len(order), draw), order)]

    def augment(self, seed: int | None, n: int = 1, **options: Any) -> ArcDataset:
        """A dataset whose keys are views of this one's, key by key; numpy's global generator is not touched.

        Args:
            seed: of the draws; None: from the system.
            n: draws of each view.
            options: tp, rt, perm, keep_background, shfl_ex, perm_share as in `Views`.

        Source: ARChitects' augment; other draws.
        """
        views = Views(self, seed_words(seed)[0], **options)
        each = len(views.symmetries)
        rows = np.arange(len(views)).reshape(-1, 1, each).repeat(n, axis=1).ravel()
        draws = np.tile(np.arange(n).repeat(each), len(self.keys))
        return self.change_keys(views.keys(draws, rows))

    # -- puzzles and transforms

    def resolve(self, key: str) -> View:
        """A key's grids and transforms.

        Raises:
            ValueError: no such puzzle or test input, or a transform that is not in the grammar.
        """
        name, *transforms = key.split(".")
        puzzle, number = split_name(name)
        entry = self.challenge.get(puzzle)
        if entry is None:
            raise ValueError(f"key {key!r}: no puzzle {puzzle!r} among {len(self.challenge):,}")
        train, test = entry["train"], entry["test"]
        if number >= test.count:
            raise ValueError(f"key {key!r}: no test input {number}, {puzzle} has {test.count}")
        order: Sequence[int] = range(train.count)
        symmetry, colours = (0, 0, 0), COLOURS
        try:
            for transform in transforms:
                if transform in ("tp", "rt"):
                    symmetry = turned(symmetry, transform)
                elif transform.startswith("perm"):
                    new = check_colours(transform)
                    colours = new if colours is COLOURS else "".join(new[int(c)] for c in colours)
                elif transform.startswith("ex"):
                    order = [order[i] for i in check_order(transform, len(order))]
                else:
                    raise ValueError(f"found transform {transform!r}, expected tp, rt, permDDDDDDDDDD or ex2-0-1")
        except ValueError as error:
            raise ValueError(f"key {key!r}: {error}") from None
        solution = self.solutions.get(puzzle) if number >= 0 else None
        query = test.first + number if number >= 0 else -1
        return View(train, order, query, -1 if solution is None else solution.first + number, symmetry, colours)

    def _test_keys(self, puzzle: str) -> list[str]:
        return [f"{puzzle}_{i}" for i in range(len(self.challenge[puzzle]["test"]))] or [puzzle]

    def _require_original(self, what: str) -> None:
        if not self.is_orig:
            raise ValueError(f"{what} works on a dataset as it was loaded, this one's keys have been changed")

    def __len__(self) -> int:
        """How many keys."""
        return len(self.keys)

    def __getitem__(self, key: str | int) -> dict[str, Any]:
        """A view's grids, transformed.

        Args:
            key: a key (of any view of the puzzles here), or a position in `keys`.

        Returns:
            {"key": key, "train": [(input, output), ...], "test": input or None, "solution": output or None}, grids
            uint8.

        Raises:
            ValueError: no such key.
            IndexError: no such position.
        """
        if not isinstance(key, str):
            if not -len(self.keys) <= key < len(self.keys):
                raise IndexError(f"position {key} of {len(self.keys):,} keys")
            key = self.keys[key]
        view, transforms = self.resolve(key), key.split(".")[1:]

        def turned(number: int) -> np.ndarray | None:
            return None if number < 0 else self.transform_array(self.store.grid(number), transforms)

        first = view.train.first
        train = [(turned(first + 2 * i), turned(first + 2 * i + 1)) for i in view.order]
        return {"key": key, "train": train, "test": turned(view.query), "solution": turned(view.solution)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The views of `keys`, as indexing gives them."""
        return (self[key] for key in self.keys)

    def __repr__(self) -> str:
        """Counts, sizes of the grids, and what loading left out."""
        tasks = {self.task_of(puzzle) for puzzle in self.challenge}
        windows = [w for p in self.challenge.values() for w in p.values()] + list(self.solutions.values())
        text = f"ArcDataset({len(self.keys):,} keys of {len(self.challenge):,} puzzles of {len(tasks):,} tasks"
        text += f", {len(self.solutions):,} with solutions"
        if windows:
            used = np.concatenate([np.arange(w.first, w.first + w.count * (1 + isinstance(w, Pairs))) for w in windows])
            sizes = {len(puzzle["train"]) for puzzle in self.challenge.values()}
            sides = np.stack((self.store.heights[used], self.store.widths[used]))
            low, high = sides.min(axis=1), sides.max(axis=1)
            sizes_text = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{min(sizes)}"
            text += f"; {sizes_text} demonstrations; grids {low[0]}x{low[1]} to {high[0]}x{high[1]}"
        if self.left_out:
            text += "; left out: " + ", ".join(f"{count:,} {what}" for what, count in self.left_out.items())
        return text + ")"

    def _repr_html_(self, shown: int = 3) -> str:
        """What a notebook shows: the counts, and the first puzzles as coloured grids."""
        from arc.puzzles.pictures import dataset_html

        keys = self.keys[:shown]
        return dataset_html(repr(self), [self[key] for key in keys], len(self.keys) - len(keys))

    def plot(self, key: str | int) -> Figure:
        """A picture of a view: demonstrations, test input and, where it is known, solution.

        Args:
            key: see `__getitem__`, whose errors it raises.

        Returns:
            A matplotlib figure; a notebook shows it, `savefig` writes it.
        """
        from arc.puzzles.pictures import plot_view

        return plot_view(self[key])

    def content_hash(self) -> str:
        """SHA-256 (hex) of the keys in order and their puzzles' grids; the same wherever and however they were read."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        store, cells = self.store, memoryview(self.store.cells)
        for puzzle in sorted(self.challenge):
            parts = [*self.challenge[puzzle].values(), *([self.solutions[puzzle]] if puzzle in self.solutions else [])]
            digest.update(f"\n{puzzle} {[len(part) for part in parts]}".encode())
            for part in parts:
                used = slice(part.first, part.first + part.count * (1 + isinstance(part, Pairs)))
                heights, widths = store.heights[used], store.widths[used]
                digest.update(heights.tobytes() + widths.tobytes())
                begins = store.offsets[used].tolist()
                areas = (heights.astype(np.int64) * widths).tolist()
                digest.update(b"".join([cells[b : b + area] for b, area in zip(begins, areas, strict=True)]))
        return digest.hexdigest()

    def fingerprint(self, key: str, solutions: bool = True) -> str:
        """SHA-256 (hex) of a puzzle up to symmetries, a permutation of colours and the order of its pairs.

        Args:
            key: any view of the puzzle, or its id. The fingerprint is of the whole puzzle, with all demonstrations and
                tests, whatever the key picks: a view is no other puzzle.
            solutions: False: test inputs count without their outputs. Without solutions they always do; so that a
                puzzle can be compared with one that has none.

        Returns:
            The same for equal puzzles and for no others; see `arc_leaks`, which also compares whole datasets.

        Raises:
            ValueError: see `resolve`.
        """
        self.resolve(key)
        puzzle = split_name(key)[0]
        entry, outputs = self.challenge[puzzle], self.solutions.get(puzzle) if solutions else None
        pairs = [(pair["input"], pair["output"]) for pair in entry["train"]]
        tests = [query["input"] for query in entry["test"]]
        return puzzle_fingerprint([*pairs, *zip(tests, outputs or [None] * len(tests), strict=True)])

    @staticmethod
    def permute_array(a: Any, descriptor: str, invert: bool = False) -> np.ndarray:
        """Recolour a grid (height, width): colour c becomes the digit at position c of `permDDDDDDDDDD`, or back.

        Raises:
            ValueError: the descriptor is not a permutation, or the array no grid.
        """
        lookup = np.array([int(c) for c in check_colours(descriptor)], dtype=np.uint8)
        a = np.asarray(a)
        if a.ndim != 2:
            raise ValueError(f"found an array {a.shape}, expected a grid (height, width)")
        return (np.argsort(lookup).astype(np.uint8) if invert else lookup)[a]

    @classmethod
    def transform_array(
        cls, array: Any, transforms: Sequence[str], apply_perm: bool = True, invert: bool = False
    ) -> np.ndarray | None:
        """Apply the transforms of a key to a grid, or take them back.

        Args:
            array: (height, width), or None, which stays None.
            transforms: such as ["tp", "rt", "perm0123456789"]; `ex...` concerns no single grid and is passed over.
            apply_perm: whether colours are permuted too.
            invert: from the view back to the puzzle.

        Raises:
            ValueError: an unknown transform.
        """
        if array is None:
            return None
        array = np.asarray(array)
        for transform in reversed(transforms) if invert else transforms:
            if transform == "tp":
                array = array.T
            elif transform == "rt":
                array = np.rot90(array, -1 if invert else 1)
            elif transform.startswith("perm"):
                array = cls.permute_array(array, transform, invert) if apply_perm else array
            elif not transform.startswith("ex"):
                raise ValueError(f"found transform {transform!r}, expected tp, rt, permDDDDDDDDDD or ex2-0-1")
        return array

    # -- text

    @classmethod
    def fmt_array(cls, array: Any, lines_sep: str, tf: Sequence[str] | None = None) -> str:
        """A grid's rows of digits, transformed by `tf` first."""
        array = np.asarray(array if tf is None else cls.transform_array(array, tf))
        return lines_sep.join(row.tobytes().decode("ascii") for row in array.astype(np.uint8) + 48)

    @classmethod
    def fmt_input(cls, array: Any, query_beg: str, reply_beg: str, **kwargs: Any) -> str:
        """An input with what stands around it."""
        return query_beg + cls.fmt_array(array, **kwargs) + reply_beg

    @classmethod
    def fmt_output(cls, array: Any, reply_end: str, **kwargs: Any) -> str:
        """An output with its end."""
        return cls.fmt_array(array, **kwargs) + reply_end

    @classmethod
    def fmt_train(
        cls,
        train: Iterable[Mapping[str, Any]],
        preprompt: str,
        query_beg: str,
        reply_beg: str,
        reply_end: str,
        **kwargs: Any,
    ) -> str:
        """The preprompt and all demonstrations."""
        return preprompt + "".join(
            cls.fmt_input(pair["input"], query_beg, reply_beg, **kwargs)
            + cls.fmt_output(pair["output"], reply_end, **kwargs)
            for pair in train
        )

    def fmt_task(
        self,
        key: str,
        preprompt: str,
        query_beg: str,
        reply_beg: str,
        reply_end: str,
        reply: Any = True,
        **kwargs: Any,
    ) -> dict[str, str]:
        """The text of a view, to the letter as upstream writes it.

        Args:
            key: the view.
            preprompt, query_beg, reply_beg, reply_end: the format, see `format_options`.
            reply: True: the solution, if it is known; None: none; or a grid of the untransformed puzzle.
            kwargs: lines_sep.

        Returns:
            key; train (preprompt and demonstrations); query (the test input); input (train + query; "" without a test
            input); reply (only if there is one); text (train + query + reply; train alone without a reply).

        Raises:
            ValueError: see `_resolve`; a reply to a key without a test input.
        """
        view, transforms = self.resolve(key), key.split(".")[1:]
        if reply is True:
            reply = self.store.grid(view.solution) if view.solution >= 0 else None
        elif reply is not None and view.query < 0:
            raise ValueError(f"key {key!r} names no test input that could have a reply, expected PUZZLE_INDEX")
        elif reply is not None:
            reply = check_grid(reply, f"key {key!r}, reply")
        pairs = [view.train[i] for i in view.order]
        task = {
            "key": key,
            "train": self.fmt_train(pairs, preprompt, query_beg, reply_beg, reply_end, tf=transforms, **kwargs),
        }
        task["query"] = task["input"] = ""
        if view.query >= 0:
            task["query"] = self.fmt_input(self.store.grid(view.query), query_beg, reply_beg, tf=transforms, **kwargs)
            task["input"] = task["train"] + task["query"]
        task["text"] = task["train"]
        if reply is not None:
            task["reply"] = self.fmt_output(reply, reply_end, tf=transforms, **kwargs)
            task["text"] = task["input"] + task["reply"]
        return task

    def get_task(
        self,
        key: str,
        max_tokens: int | None = None,
        len_name: str | None = None,
        tokenizer: Any = None,
        **fmt_opts: Any,
    ) -> tuple[str, dict[str, str]]:
        """The text of a view, shortened to a number of tokens by leaving out demonstrations from the end.

        Args:
            key: the view.
            max_tokens: limit; None: no limit. Without BOS: reserve one for it.
            len_name: the entry of the task whose tokens are counted; default "text".
            tokenizer: counts real ids, see `count_tokens`.
            fmt_opts: see `fmt_task`.

        Returns:
            The key, with the `ex...` that shortening has made, and the task (see `fmt_task`).

        Raises:
            ValueError: over the limit even with one demonstration; an unknown key.

        Source: ARChitects' get_task, which ends in a blank assertion where nothing fits.
        """
        asked, count = key, len(self.resolve(key).order)
        while True:
            task = self.fmt_task(key, **fmt_opts)
            if max_tokens is None:
                return key, task
            tokens = self.count_tokens(task[len_name or "text"], tokenizer)
            if tokens <= max_tokens:
                return key, task
            count -= 1
            if count < 1:
                raise does_not_fit(asked, tokens, max_tokens)
            key = shortened_key(key, count)

    @staticmethod
    def count_tokens(text: str, tokenizer: Any = None) -> int:
        """Number of tokens of a text, without BOS.

        Args:
            text: formatted text.
            tokenizer: counts its real ids. None: characters, each `<...>` as one; right for the cut vocabulary only.

        Source: ARChitects' count_tokens, which knows characters alone.
        """
        if tokenizer is not None:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return len(re.sub("<[^<]*>", "x", text))

    @classmethod
    def max_new_tokens(
        cls,
        reply_end: str,
        lines_sep: str,
        max_size: int = MAX_SIDE,
        safety_margin: int = 1,
        tokenizer: Any = None,
        **_: Any,
    ) -> int:
        """Tokens of the longest reply there can be, and a margin; other format options are passed over."""
        largest = np.zeros((max_size, max_size), dtype=np.uint8)
        return cls.count_tokens(cls.fmt_output(largest, reply_end, lines_sep=lines_sep), tokenizer) + safety_margin

    def get_length(
        self,
        key: str,
        len_name: str,
        max_of_transposed: bool = False,
        max_tokens: int | None = None,
        tokenizer: Any = None,
        **fmt_opts: Any,
    ) -> int:
        """Tokens of an entry of a view's task, BOS included; without format options, cells alone.

        Args:
            key: the view.
            len_name: the entry, such as "text" or "input".
            max_of_transposed: of the view and its transpose, the longer one.
            max_tokens: passed over, so that the options of `get_task` can be given as they are.
            tokenizer: see `count_tokens`.
            fmt_opts: see `fmt_task`.
        """
        bos = 1 if fmt_opts else 0
        fmt_opts = fmt_opts or dict.fromkeys(("preprompt", "query_beg", "reply_beg", "reply_end", "lines_sep"), "")
        keys = [key, f"{key}.tp"] if max_of_transposed else [key]
        return bos + max(self.count_tokens(self.fmt_task(k, **fmt_opts)[len_name], tokenizer) for k in keys)

    def sorted_by_len(self, reverse: bool = False, **kwargs: Any) -> ArcDataset:
        """The keys by `get_length`, shortest first; keys of one length stay in order."""
        return self.change_keys(sorted(self.keys, key=lambda key: self.get_length(key, **kwargs), reverse=reverse))

    def convert_with_token_limit(self, quiet: bool = False, **kwargs: Any) -> tuple[list[dict[str, str]], ArcDataset]:
        """`get_task` of every key: the tasks, and a dataset of the keys as shortened. No progress bar if quiet."""
        from tqdm import tqdm

        made = [self.get_task(key, **kwargs) for key in tqdm(self.keys, desc="convert dataset", disable=quiet)]
        return [task for _, task in made], self.change_keys(key for key, _ in made)

    def as_list(self, **kwargs: Any) -> list[dict[str, str]]:
        """The tasks of `convert_with_token_limit`."""
        return self.convert_with_token_limit(**kwargs)[0]

    def decode(
        self, text: str, lines_sep: str, key: str | None = None, reply_end: str | None = None
    ) -> tuple[np.ndarray | None, bool | None, str]:
        """Read a grid from a reply and compare it with the solution.

        The text must be rows of ASCII digits of one length, 1 to 30 each way, and nothing else; one `lines_sep` after
        the last row is allowed (one in all: a second one beside that of `reply_end` is not).

        Args:
            text: the reply; any string.
            lines_sep: what stands between rows.
            key: the view that was asked for: the grid is mapped back through its transforms and compared.
            reply_end: what the reply must end with; what follows the first one is ignored. None: the text is the reply.

        Returns:
            The grid, uint8 (height, width), or None; whether it is correct (None: unknown); and 'ALL_CORRECT',
            'bad_content', 'bad_xy_size', 'sol_unknown', 'unknown' (no key), or 'cant_decode: REASON'.

        Raises:
            ValueError: `lines_sep` or `reply_end` is empty, or the key is not in the grammar; never because of the
                text.

        Source: ARChitects' ArcDataset.decode, which drops whatever is not a digit; strict here.
        """
        if not lines_sep:
            raise ValueError("lines_sep is empty, expected what stands between rows")
        if reply_end == "":
            raise ValueError("reply_end is empty, expected what ends a reply, or None")
        ended = False
        if reply_end is not None:
            text, end, _ = text.partition(reply_end)
            if not end:
                return None, False, "cant_decode: no end of reply"
            ended = reply_end.startswith(lines_sep)
        rows = text.split(lines_sep)
        if len(rows) > 1 and not rows[-1] and not ended:
            rows.pop()
        if len(rows) > MAX_SIDE or len(rows[0]) > MAX_SIDE:
            return None, False, f"cant_decode: more than {MAX_SIDE} rows or columns"
        for number, row in enumerate(rows, 1):
            if not row:
                return None, False, f"cant_decode: row {number} is empty"
            if not (row.isascii() and row.isdigit()):
                return None, False, f"cant_decode: row {number} has something else than digits"
            if len(row) != len(rows[0]):
                return None, False, f"cant_decode: row {number} has another length than row 1"
        grid = (np.frombuffer("".join(rows).encode("ascii"), dtype=np.uint8) - 48).reshape(len(rows), -1)
        if key is None:
            return grid, None, "unknown"
        name, *transforms = key.split(".")
        puzzle, number = split_name(name)
        grid = np.ascontiguousarray(self.transform_array(grid, transforms, invert=True))
        solutions = self.solutions.get(puzzle)
        if solutions is None or not 0 <= number < len(solutions):
            return grid, None, "sol_unknown"
        solution = solutions[number]
        if solution.shape != grid.shape:
            return grid, False, "bad_xy_size"
        return (grid, True, "ALL_CORRECT") if np.array_equal(solution, grid) else (grid, False, "bad_content")

    # -- tests and submissions

    def remove_test_data(self) -> ArcDataset:
        """The demonstrations alone, under the puzzles' ids.

        Raises:
            ValueError: not an original dataset.
        """
        self._require_original("remove_test_data")
        bare = {puzzle: {"train": value["train"], "test": []} for puzzle, value in self.challenge.items()}
        return self._derived(None, False, _collect(bare, {}))

    def move_test_to_train(self) -> ArcDataset:
        """Test pairs as further demonstrations, under the puzzles' ids.

        Raises:
            ValueError: not an original dataset, or a puzzle without solutions.
        """
        self._require_original("move_test_to_train")
        moved = {}
        for puzzle, value in self.challenge.items():
            if puzzle not in self.solutions:
                raise ValueError(f"puzzle {puzzle} has no solutions to move: load_solutions first")
            tests = zip(value["test"], self.solutions[puzzle], strict=True)
            train = [*value["train"], *({**query, "output": grid} for query, grid in tests)]
            moved[puzzle] = {"train": train, "test": []}
        return self._derived(None, True, _collect(moved, {}))

    def get_submission(self, results: Mapping[str, Any] | None = None) -> dict[str, list[dict[str, list[list[int]]]]]:
        """A submission in Kaggle's format, with [[0]] wherever `results` (see `fill_submission`) has no guess.

        Raises:
            ValueError: not an original dataset; see `fill_submission`.
        """
        self._require_original("get_submission")
        empty = {
            puzzle: [{attempt: [[0]] for attempt in ATTEMPTS} for _ in value["test"]]
            for puzzle, value in self.challenge.items()
        }
        if results is not None:
            self.fill_submission(results, empty)
        return empty

    @staticmethod
    def fill_submission(results: Mapping[str, Any], submission: dict[str, list[dict[str, Any]]]) -> None:
        """Write guesses into a submission, in place.

        Args:
            results: puzzle id -> test index -> guesses, best first, each {"output": grid}; those beyond the attempts
                are left.
            submission: as `get_submission` gives it.

        Raises:
            ValueError: a puzzle or test index that the submission does not have.
        """
        for puzzle, tests in results.items():
            if len(tests) > len(submission.get(puzzle, [])):
                raise ValueError(
                    f"results of {puzzle}: {len(tests)} tests, the submission has {len(submission.get(puzzle, []))}"
                )
            for target, guesses in zip(submission[puzzle], tests, strict=False):
                for attempt, guess in zip(ATTEMPTS, guesses, strict=False):
                    target[attempt] = np.asarray(guess["output"]).tolist()

    def validate_submission(self, submission: Mapping[str, Any]) -> float:
        """Score of a submission: for every puzzle the share of its tests of which an attempt is right, summed.

        Raises:
            ValueError: not an original dataset, no solutions, or a puzzle, test or attempt that the submission lacks.
        """
        self._require_original("validate_submission")
        if not self.solutions:
            raise ValueError("there are no solutions to compare with: load_solutions first")
        score = 0.0
        for puzzle, grids in self.solutions.items():
            for number, grid in enumerate(grids):
                try:
                    attempts = [submission[puzzle][number][attempt] for attempt in ATTEMPTS]
                except (KeyError, IndexError, TypeError):
                    raise ValueError(
                        f"the submission has no {' and '.join(ATTEMPTS)} of {puzzle}, test {number}"
                    ) from None
                # Lists as JSON has them: an array of ragged rows would not compare but raise.
                score += any(np.asarray(a, dtype=object).tolist() == grid.tolist() for a in attempts) / len(grids)
        return score


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_sizes(sizes: Sequence[int]) -> list[int]:
    found = [int(size) for size in sizes]
    if not found or min(found) < 1:
        raise ValueError(f"sizes is {tuple(sizes)}, expected numbers of demonstrations, at least 1 each")
    return found


def _cycle_sizes(sizes: Sequence[int], pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes of puzzles that `pairs` pairs are enough for, a test each included, int64 (puzzles,).

    Seeded orders of `sizes`, one after another; sizes that the rest is too short for are passed over.
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


def _valid(name: str) -> str:
    return name.replace("_", "-").replace(".", "-")


def _unique_names(files: Sequence[Path], names: list[str]) -> list[str]:
    """The names, one for each file.

    Raises:
        ValueError: two files have one name.
    """
    first: dict[str, Path] = {}
    for file, name in zip(files, names, strict=True):
        if first.setdefault(name, file) is not file:
            raise ValueError(f'{first[name]} and {file}: duplicate id {name!r} ("_" and "." become "-"): rename one')
    return names


def _collect(
    challenge: Mapping[str, Any], solutions: Mapping[str, Any]
) -> tuple[GridStore, dict[str, dict[str, Window]], dict[str, Grids]]:
    """Bring puzzles into one store: windows on other stores are moved, everything else is checked and copied."""
    stores: dict[int, GridStore] = {}
    grids: list[np.ndarray] = []  # of everything that is in no store yet
    new = GridStore.of_grids([])
    windows: list[tuple[str, str, Window]] = []

    def add(puzzle: str, part: str, kind: type[Window], value: Any) -> None:
        if isinstance(value, kind):
            stores[id(value.store)] = value.store
            windows.append((puzzle, part, value))
        else:
            windows.append((puzzle, part, kind(new, len(grids), len(value) // (2 if kind is Pairs else 1))))
            grids.extend(value)

    for puzzle, value in challenge.items():
        where = f"puzzle {show_name(puzzle)}"
        if not isinstance(puzzle, str) or not puzzle or "_" in puzzle or "." in puzzle or not is_unicode(puzzle):
            raise ValueError(f'{where}: found the id {show(puzzle)}, expected text without "_" and "."')
        given = solutions.get(puzzle)
        if (
            isinstance(value, Mapping)
            and isinstance(value.get("train"), Pairs)
            and isinstance(value.get("test"), Queries)
        ):
            train, test, found = value["train"], value["test"], None
        else:
            train, test, found = check_puzzle(value, where)
        add(puzzle, "train", Pairs, train)
        add(puzzle, "test", Queries, test)
        given = found or None if given is None else given
        if given is None:
            continue
        if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence) or len(given) != len(test):
            raise ValueError(
                f"{where}: found solutions {show(given)}, expected one grid for each of {len(test)} test inputs"
            )
        if not isinstance(given, Grids):
            given = [check_grid(grid, f"{where}, solution {number}") for number, grid in enumerate(given, 1)]
        add(puzzle, "solution", Grids, given)
    if grids or not stores:
        filled = GridStore.of_grids(grids)
        stores[id(new)] = filled
    order = list(stores)
    store = stores[order[0]] if len(order) == 1 else GridStore.joined(list(stores.values()))
    shifts = dict(zip(order, np.cumsum([0, *(len(stores[i].heights) for i in order)]).tolist(), strict=False))
    collected: dict[str, dict[str, Window]] = {}
    known: dict[str, Grids] = {}
    for puzzle, part, window in windows:
        shift = shifts.get(id(window.store), 0)  # an empty window on `new` when `new` has stayed empty
        if window.store is not store:
            window = type(window)(store, window.first + shift, window.count)
        if part == "solution":
            known[puzzle] = window
        else:
            collected.setdefault(puzzle, {})[part] = window
    return store, collected, known


# ---------------------------------------------------------------------------------------------------------------------
# Views, made when they are asked for


class Views:
    """Augmented views of a dataset's keys. Nothing is kept: a view depends on (seed, epoch, index) alone.

    Index counts key by key, within a key its symmetries: with tp and rt "all" these are "", .tp, .rt, .tp.rt, .rt.rt
    and so on. Draws (a random symmetry, colours, order of the demonstrations) are other ones in each epoch.
    """

    def __init__(
        self,
        ds: ArcDataset,
        seed: int,
        tp: bool | str = False,
        rt: bool | str = False,
        perm: bool = False,
        keep_background: bool = False,
        shfl_ex: bool = False,
        perm_share: float = 1.0,
    ):
        """See the class.

        Args:
            ds: the dataset; transforms that its keys have stay, and new ones come after them.
            seed: of all draws.
            tp: transposes: "all" enumerates both, True draws one, False none.
            rt: rotations: "all" enumerates the four, True draws one, False none.
            perm: permute the colours.
            keep_background: colour 0 stays 0.
            shfl_ex: shuffle the demonstrations that the key has.
            perm_share: share of the views, drawn, whose colours are permuted with `perm`; the others keep their own.

        Raises:
            ValueError: tp or rt is something else, or the share is none.
        """
        if not 0 <= perm_share <= 1:
            raise ValueError(f"perm_share is {perm_share}, expected a share from 0 to 1")
        for name, value in (("tp", tp), ("rt", rt)):
            if value not in (True, False, "all"):
                raise ValueError(f'{name} is {value!r}, expected "all", True or False')
        self.ds, self.seed = ds, seed
        self.tp, self.rt = (value if value == "all" else bool(value) for value in (tp, rt))
        self.perm, self.keep_background, self.shfl_ex, self.perm_share = perm, keep_background, shfl_ex, perm_share
        self.symmetries = [
            ".tp" * transposed + ".rt" * turns
            for turns in range(4 if rt == "all" else 1)
            for transposed in range(2 if tp == "all" else 1)
        ]

    def __len__(self) -> int:
        """Views of one epoch."""
        return len(self.ds.keys) * len(self.symmetries)

    def key(self, epoch: int, index: int) -> str:
        """The key of one view.

        Raises:
            IndexError: no such index.
        """
        return self.keys(np.array([epoch]), np.array([index]))[0]

    def keys(self, epochs: np.ndarray, indices: np.ndarray) -> list[str]:
        """The keys of many views at once: 10 times faster than one by one.

        Args:
            epochs, indices: int (rows,).

        Raises:
            IndexError: an index that is not in 0 .. len - 1, or a negative epoch.
        """
        epochs, indices = np.asarray(epochs), np.asarray(indices)
        if not len(indices):
            return []
        if indices.min() < 0 or indices.max() >= len(self) or epochs.min() < 0:
            raise IndexError(
                f"view {indices.max()} (smallest {indices.min()}) of {len(self):,} in epoch {epochs.min()}"
            )
        bases = [self.ds.keys[i] for i in (indices // len(self.symmetries)).tolist()]
        suffixes = [self.symmetries[i] for i in (indices % len(self.symmetries)).tolist()]
        counts = [self._demonstrations(key) for key in bases] if self.shfl_ex else [0]
        draws = counter_draws(self.seed, epochs, indices, 12 + max(counts))
        if self.tp is True or self.rt is True:
            # Transposes stand before rotations, drawn or enumerated, so that a suffix reads the same either way.
            transposed = (draws[:, 0] >> np.uint64(63)).tolist() if self.tp is True else [0] * len(bases)
            turns = (draws[:, 1] >> np.uint64(62)).tolist() if self.rt is True else [0] * len(bases)
            suffixes = [".tp" * t + s + ".rt" * r for t, s, r in zip(transposed, suffixes, turns, strict=True)]
        if self.perm:
            order = draws[:, 2:12]
            if self.keep_background:
                order[:, 0] = 0  # the smallest: colour 0 comes first
            digits = (np.argsort(order, axis=1).astype(np.uint8) + 48).tobytes().decode("ascii")
            permuted = [f"{s}.perm{digits[10 * i : 10 * i + 10]}" for i, s in enumerate(suffixes)]
            if self.perm_share < 1:  # by the bits that no rotation is drawn from
                keep = (draws[:, 1] << np.uint64(2)) / 2.0**64 >= self.perm_share
                permuted = [s if kept else p for s, p, kept in zip(suffixes, permuted, keep.tolist(), strict=True)]
            suffixes = permuted
        if self.shfl_ex:
            order = draws[:, 12:]
            order[np.arange(order.shape[1]) >= np.array(counts)[:, None]] = np.iinfo(np.uint64).max  # sorted behind
            orders = np.argsort(order, axis=1, kind="stable").tolist()
            suffixes = [
                f"{s}.ex{'-'.join(map(str, o[:count]))}" for s, o, count in zip(suffixes, orders, counts, strict=True)
            ]
        return [base + suffix for base, suffix in zip(bases, suffixes, strict=True)]

    def _demonstrations(self, key: str) -> int:
        if ".ex" in key:
            return len(self.ds.resolve(key).order)
        return self.ds.challenge[key.partition(".")[0].partition("_")[0]]["train"].count
