"""The dataset: puzzles, and keys that name views of them. `arc_loader.py` shows how to use it.

Method names and keywords are those of the ARChitects' 2024 loader, so notebooks written for it still run. The code is
new. It needs numpy, never torch; the caller passes the tokenizer. The methods are thin: the other modules do the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from arc.puzzles import formats, submissions
from arc.puzzles.fingerprints import puzzle_fingerprint
from arc.puzzles.grids import MAX_SIDE, Grids, Pairs, PathLike, Puzzle, PuzzleData, Queries, collect
from arc.puzzles.holdout import choose_heldout
from arc.puzzles.keys import (
    View,
    clean_name,
    permute_grid,
    puzzle_of,
    resolve,
    seed_words,
    seeded_rng,
    shortened_key,
    split_name,
    transform_grid,
)
from arc.puzzles.text import count_tokens, does_not_fit, format_grid, format_pairs, format_view, parse_grid
from arc.puzzles.views import Views

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Holdout(NamedTuple):
    """A split: puzzles to train on, held-out puzzles of the same tasks, and all puzzles of held-out tasks."""

    train: ArcDataset
    seen: ArcDataset
    unseen: ArcDataset


class ArcDataset:
    """Puzzles, and keys that name views of them. Methods return new datasets and change nothing.

    Attributes:
        keys: list of keys.
        challenge: puzzle id -> {"train": pairs, "test": inputs}: sequences of {"input": grid, "output": grid} and of
            {"input": grid}.
        solutions: puzzle id -> one grid for each test input; only puzzles whose solutions are known.
        is_orig: whether the keys are whole puzzles as they were loaded.
        left_out: reason -> how many items loading left out.
        store: the grids. The dicts above are views of it: do not write to them.

    Grids are uint8 (height, width) and read-only.
    """

    def __init__(
        self, challenge: Mapping[str, Any], solutions: Mapping[str, Any] | None = None,
        keys: Iterable[str] | None = None, is_orig: bool = False,
    ):  # fmt: skip
        """Check puzzles and copy them into one store. Puzzles of another ArcDataset are not copied.

        Args:
            challenge: puzzle id -> {"train": pairs, "test": pairs}. Grids are lists of rows or integer arrays.
            solutions: puzzle id -> grids; default: the outputs of the test pairs.
            keys: default: every test input, sorted; the bare id of a puzzle without tests.
            is_orig: whether the keys are whole puzzles as they were loaded.

        Raises:
            ValueError: a bad id, pair or grid, named by puzzle, pair and row; a key of an unknown puzzle.
        """
        self._assign(collect(challenge, solutions or {}), keys, is_orig)

    def _assign(self, data: PuzzleData, keys: Iterable[str] | None, is_orig: bool) -> None:
        challenge = data.challenge
        if keys is None:
            keys = sorted(key for name in challenge for key in _test_keys(name, challenge[name]))
        self.keys = list(keys)
        puzzles = dict.fromkeys(map(puzzle_of, self.keys))  # ordered and unique
        for puzzle in puzzles:
            if puzzle not in challenge:
                raise ValueError(f"no puzzle {puzzle!r} among {len(challenge):,}, expected keys of known puzzles")
        self.challenge = {puzzle: challenge[puzzle] for puzzle in puzzles}
        self.solutions = {puzzle: data.solutions[puzzle] for puzzle in puzzles if puzzle in data.solutions}
        self.is_orig, self.store, self.left_out = is_orig, data.store, dict(data.left_out)
        self._tasks = data.tasks

    @classmethod
    def _of(cls, data: PuzzleData, keys: Iterable[str] | None, is_orig: bool) -> ArcDataset:
        dataset = object.__new__(cls)
        dataset._assign(data, keys, is_orig)
        return dataset

    def _data(self) -> PuzzleData:
        return PuzzleData(self.store, self.challenge, self.solutions, self._tasks, self.left_out)

    def _derived(self, keys: Iterable[str] | None, is_orig: bool, data: PuzzleData | None = None) -> ArcDataset:
        data = (data or self._data())._replace(tasks=self._tasks, left_out=self.left_out)
        return self._of(data, keys, is_orig)

    # -- loading

    @classmethod
    def load_from_local_json(
        cls, path: PathLike, n: int | None = None, sizes: Sequence[int] = (6,), seed: int = 42,
        grid_sizes: Sequence[int] | None = None,
    ) -> ArcDataset:  # fmt: skip
        """Load a folder of task files: each a list of pairs, or an official {"train", "test"} puzzle.

        A list of pairs is cut into puzzles in a seeded order; no pair is used twice. An official file is one puzzle.
        Keys come in rounds: the first puzzle of every task, then the second of every task, and so on. So any prefix of
        `keys` covers the tasks evenly.

        Args:
            path: the folder.
            n: how many puzzles; default: all.
            sizes: demonstrations per puzzle, in a seeded cycle. Sizes above a task's remaining pairs are skipped.
            seed: of all draws.
            grid_sizes: (low, high): only pairs whose sides lie within; `left_out` counts the others.

        Returns:
            Puzzles `TASK-ROUND` (official ones: `TASK`). TASK is the file name with "_" and "." replaced by "-".

        Raises:
            FileNotFoundError: no folder or no files.
            ValueError: bad data (named by file, pair and row), a task name twice, n above the maximum, bad settings.
        """
        return cls._of(*formats.read_folder(path, n, sizes, seed, grid_sizes), is_orig=True)

    @classmethod
    def load_from_rearc(
        cls, path: PathLike, n: int, sizes: Sequence[int], seed: int,
        mix_datasets: Mapping[str, ArcDataset] | None = None, shuffle: bool = True,
    ) -> ArcDataset:  # fmt: skip
        """Load a re-arc folder: metadata.json names the tasks, tasks/NAME.json is a list of pairs.

        Args:
            path: the folder.
            n: rounds: puzzles of each task.
            sizes, seed: as in `load_from_local_json`, whose errors it raises too.
            mix_datasets: name -> dataset whose keys are spread over the rounds, as `NAME-KEY`.
            shuffle: whether the order within a round is seeded (else by name).

        Returns:
            Puzzles `rearc-TASKRR`, RR being the round in hexadecimal.

        Raises:
            ValueError: a task with too few pairs for n rounds.

        Source: ARChitects' load_from_rearc; other draws.
        """
        others = {name: (ds._data(), ds.keys) for name, ds in (mix_datasets or {}).items()}
        return cls._of(*formats.read_rearc(path, n, sizes, seed, others, shuffle), is_orig=True)

    @classmethod
    def load_from_json(cls, challenges_file: PathLike) -> ArcDataset:
        """Load Kaggle's challenge file: {id: {"train": pairs, "test": inputs}}. Raises as `load_from_local_json`."""
        return cls._of(formats.read_challenges(challenges_file), None, is_orig=True)

    def load_solutions(self, solutions_file: PathLike) -> ArcDataset:
        """This dataset with the solutions of a Kaggle file: {id: grids}; other puzzles' solutions are ignored.

        Raises as `load_from_local_json`, also for a puzzle with no solutions or the wrong number of them.
        """
        return self._derived(self.keys, self.is_orig, formats.read_solutions(solutions_file, self._data()))

    @classmethod
    def load_from_neoneye(cls, path: PathLike) -> ArcDataset:
        """Load neoneye's data/*/*.json, of each puzzle the highest version. Raises as `load_from_local_json`."""
        return cls._of(formats.read_neoneye(path), None, is_orig=True)

    # -- keys

    @staticmethod
    def base_key_replace_invalid_chars(base_key: str) -> str:
        """A puzzle id without "_" and ".", which have a meaning in keys."""
        return clean_name(base_key)

    get_base_key_and_reply_num = staticmethod(split_name)

    @classmethod
    def get_base_key(cls, key: str) -> str:
        """Puzzle id of a key."""
        return split_name(key)[0]

    def task_of(self, key: str) -> str:
        """The task of a key's puzzle: its file of pairs, else the puzzle itself."""
        puzzle = split_name(key)[0]
        return self._tasks.get(puzzle, puzzle)

    def change_keys(self, keys: Iterable[str]) -> ArcDataset:
        """The same puzzles under other keys; puzzles without a key are dropped. ValueError: an unknown puzzle."""
        return self._derived(keys, is_orig=False)

    def subset(self, n: int) -> ArcDataset:
        """The first n keys. ValueError: there are fewer."""
        if not 1 <= n <= len(self.keys):
            raise ValueError(f"{n:,} keys asked for, expected 1 to the maximum of {len(self.keys):,}")
        return self._derived(self.keys[:n], self.is_orig)

    def append(self, *others: ArcDataset) -> ArcDataset:
        """This dataset followed by the puzzles and keys of others. ValueError: a puzzle id twice.

        Source: ARChitects' append, which keeps the last of several puzzles of one id.
        """
        datasets = (self, *others)
        challenge: dict[str, Any] = {}
        for ds in datasets:
            if clash := challenge.keys() & ds.challenge.keys():
                raise ValueError(f"puzzle {min(clash)!r} is there already, expected each id once")
            challenge |= ds.challenge
        data = collect(challenge, {puzzle: grids for ds in datasets for puzzle, grids in ds.solutions.items()})
        tasks = {puzzle: ds.task_of(puzzle) for ds in datasets for puzzle in ds.challenge}
        keys = [key for ds in datasets for key in ds.keys]
        is_orig = all(ds.is_orig for ds in datasets)
        return self._of(data._replace(tasks=tasks, left_out=self.left_out), keys, is_orig)

    def select_puzzles(self, puzzles: Iterable[str]) -> ArcDataset:
        """The keys of some puzzles, in the order they have here; is_orig stays. ValueError: an unknown puzzle."""
        wanted = set(puzzles)
        if missing := sorted(wanted - self.challenge.keys()):
            raise ValueError(f"no puzzle {missing[0]!r} among {len(self.challenge):,}")
        return self._derived([key for key in self.keys if split_name(key)[0] in wanted], self.is_orig)

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
        """The keys n times over; with a seed, each time in a new order."""
        if seed is None:
            return self.change_keys(self.keys * n)
        rng = seeded_rng(seed)
        return self.change_keys(self.keys[i] for _ in range(n) for i in rng.permutation(len(self.keys)))

    def split(self, n: int, split_seed: int | str, **kwargs: Any) -> list[ArcDataset]:
        """Cut the puzzles into n datasets of about one size.

        `split_seed` orders the puzzles before the cut: a seed, or "len": by the length of the longest key. "len" takes
        `kwargs`: those of `get_length`, and `reverse`.

        Raises:
            ValueError: not an original dataset, fewer puzzles than n, kwargs beside a seed.
        """
        self._require_original("split")
        puzzles = sorted(self.challenge)
        if not 1 <= n <= len(puzzles):
            raise ValueError(f"{n:,} parts asked for, expected 1 to the maximum of {len(puzzles):,} puzzles")
        if split_seed == "len":
            reverse = kwargs.pop("reverse", False)

            def longest(puzzle: str) -> int:
                return max(self.get_length(key, **kwargs) for key in _test_keys(puzzle, self.challenge[puzzle]))

            puzzles.sort(key=longest, reverse=reverse)
        elif isinstance(split_seed, str) or kwargs:
            options = f"{split_seed!r} with {sorted(kwargs)}"
            raise ValueError(f'split_seed is {options}, expected a seed alone, or "len" and options')
        else:
            puzzles = [puzzles[i] for i in seeded_rng(split_seed).permutation(len(puzzles))]
        groups = [puzzles[len(puzzles) * i // n : len(puzzles) * (i + 1) // n] for i in range(n)]
        return [
            self._derived(sorted(k for p in group for k in _test_keys(p, self.challenge[p])), is_orig=True)
            for group in groups
        ]

    def holdout(self, examples: int = 0, tasks: int = 0, seed: int = 42) -> Holdout:
        """Split off puzzles to measure on; the same seed gives the same ones.

        Args:
            examples: puzzles in `seen`, spread evenly over the tasks that stay. Each task keeps at least one in
                `train`, unless every puzzle is a task by itself.
            tasks: whole tasks that go to `unseen`. The choice depends on the seed and the tasks' names alone.
            seed: of both choices.

        Returns:
            Three datasets with this one's keys, in order.

        Raises:
            ValueError: more asked for than there is; the message names the maximum.
        """
        puzzles: dict[str, list[str]] = {}
        for puzzle in self.challenge:
            puzzles.setdefault(self.task_of(puzzle), []).append(puzzle)
        seen, unseen = choose_heldout(puzzles, examples, tasks, seed)
        keys: tuple[list[str], ...] = ([], [], [])
        for key in self.keys:
            puzzle = puzzle_of(key)
            keys[1 if puzzle in seen else 2 if puzzle in unseen else 0].append(key)
        return Holdout(*(self._derived(group, self.is_orig) for group in keys))

    def views(self, seed: int, **options: Any) -> Views:
        """Augmented views of the keys; `options` are those of `Views` from `tp` on."""
        return Views(self, seed, **options)

    def augment_keys(self, keys: Sequence[str], seed: int | None = None, n: int = 1, **options: Any) -> list[str]:
        """Keys of augmented views in upstream's order: n draws of each symmetry of each key, keys running fastest.

        `options` are those of `Views`. Seed None: seeded by the system.

        Source: ARChitects' augment_keys, whose draws of `tp` and `rt` are repeated n times; here every draw is new.
        """
        views = Views(self.change_keys(keys), seed_words(seed)[0], **options)
        order = np.arange(len(views)).reshape(len(keys), -1).T.ravel()
        return [key for draw in range(n) for key in views.keys(np.full(len(order), draw), order)]

    def augment(self, seed: int | None, n: int = 1, **options: Any) -> ArcDataset:
        """A dataset of n draws of each view, key by key; see `augment_keys`.

        Source: ARChitects' augment; other draws, and numpy's global generator is not touched.
        """
        views = Views(self, seed_words(seed)[0], **options)
        symmetries = len(views.symmetries)
        rows = np.arange(len(views)).reshape(-1, 1, symmetries).repeat(n, axis=1).ravel()
        draws = np.tile(np.arange(n).repeat(symmetries), len(self.keys))
        return self.change_keys(views.keys(draws, rows))

    # -- puzzles and transforms

    def resolve(self, key: str) -> View:
        """See `keys.resolve`."""
        return resolve(key, self.challenge, self.solutions)

    def _require_original(self, method: str) -> None:
        if not self.is_orig:
            raise ValueError(f"{method} works on a dataset as it was loaded, this one's keys have been changed")

    def __len__(self) -> int:
        """How many keys."""
        return len(self.keys)

    def __getitem__(self, key: str | int) -> dict[str, Any]:
        """The transformed grids of a view, named by a key or a position in `keys`.

        Returns:
            {"key": key, "train": [(input, output), ...], "test": input or None, "solution": output or None}.

        Raises:
            ValueError, IndexError: no such key, no such position.
        """
        if not isinstance(key, str):
            if not -len(self.keys) <= key < len(self.keys):
                raise IndexError(f"position {key} of {len(self.keys):,} keys")
            key = self.keys[key]
        view, transforms = self.resolve(key), key.split(".")[1:]

        def grid(number: int) -> np.ndarray | None:
            return None if number < 0 else transform_grid(self.store.grid(number), transforms)

        first = view.train.first
        train = [(grid(first + 2 * i), grid(first + 2 * i + 1)) for i in view.order]
        return {"key": key, "train": train, "test": grid(view.query), "solution": grid(view.solution)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The views of `keys`, as indexing gives them."""
        return (self[key] for key in self.keys)

    def __repr__(self) -> str:
        """Counts, sizes of the grids, and what loading left out."""
        tasks = {self.task_of(puzzle) for puzzle in self.challenge}
        text = f"ArcDataset({len(self.keys):,} keys of {len(self.challenge):,} puzzles of {len(tasks):,} tasks"
        text += f", {len(self.solutions):,} with solutions"
        if self.challenge:
            windows = [window.grids for puzzle in self.challenge for window in self._windows(puzzle)]
            heights, widths = (np.concatenate([s[w] for w in windows]) for s in (self.store.heights, self.store.widths))
            sizes = sorted({len(puzzle["train"]) for puzzle in self.challenge.values()})
            text += f"; {sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"; {sizes[0]}"
            text += f" demonstrations; grids {heights.min()}x{widths.min()} to {heights.max()}x{widths.max()}"
        if self.left_out:
            text += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return text + ")"

    def _repr_html_(self, shown: int = 3) -> str:
        """The counts and the first puzzles as coloured grids, for a notebook."""
        from arc.puzzles.pictures import dataset_html

        views = [self[key] for key in self.keys[:shown]]
        return dataset_html(repr(self), views, len(self.keys) - len(views))

    def plot(self, key: str | int) -> Figure:
        """A matplotlib figure of a view: demonstrations, test input and, if known, solution. Raises as indexing."""
        from arc.puzzles.pictures import plot_view

        return plot_view(self[key])

    def _windows(self, puzzle: str) -> list[Pairs | Queries | Grids]:
        entry = self.challenge[puzzle]
        return [entry["train"], entry["test"], *([self.solutions[puzzle]] if puzzle in self.solutions else [])]

    def content_hash(self) -> str:
        """SHA-256 (hex) of the keys in order and their puzzles' grids, whatever files they came from."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        store, cells = self.store, self.store.cells
        for puzzle in sorted(self.challenge):
            windows = self._windows(puzzle)
            digest.update(f"\n{puzzle} {[len(window) for window in windows]}".encode())
            for window in windows:
                heights, widths = store.heights[window.grids], store.widths[window.grids]
                digest.update(heights.tobytes() + widths.tobytes())
                begins = store.offsets[window.grids].tolist()
                areas = (heights.astype(np.int64) * widths).tolist()
                digest.update(b"".join([cells[b : b + area].data for b, area in zip(begins, areas, strict=True)]))
        return digest.hexdigest()

    def fingerprint(self, key: str, solutions: bool = True) -> str:
        """SHA-256 (hex) of a puzzle up to symmetries, a permutation of colours and the order of its pairs.

        Equal puzzles have equal fingerprints, and no others. `find_leaks` compares whole datasets.

        Args:
            key: any view of the puzzle, or its id. All demonstrations and tests count, whatever the key picks.
            solutions: False: test inputs count without outputs, to compare with a puzzle without solutions.

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
        """See `keys.permute_grid`."""
        return permute_grid(a, descriptor, invert)

    @staticmethod
    def transform_array(
        array: Any, transforms: Sequence[str], apply_perm: bool = True, invert: bool = False
    ) -> np.ndarray | None:
        """See `keys.transform_grid`; None stays None."""
        return None if array is None else transform_grid(array, transforms, apply_perm, invert)

    # -- text

    @staticmethod
    def fmt_array(array: Any, lines_sep: str, tf: Sequence[str] | None = None) -> str:
        """A grid's rows of digits, transformed by `tf` first."""
        return format_grid(array, lines_sep, tf or ())

    @classmethod
    def fmt_input(cls, array: Any, query_beg: str, reply_beg: str, **kwargs: Any) -> str:
        """An input between `query_beg` and `reply_beg`."""
        return query_beg + cls.fmt_array(array, **kwargs) + reply_beg

    @classmethod
    def fmt_output(cls, array: Any, reply_end: str, **kwargs: Any) -> str:
        """An output and `reply_end`."""
        return cls.fmt_array(array, **kwargs) + reply_end

    @staticmethod
    def fmt_train(
        train: Iterable[Mapping[str, Any]], preprompt: str, query_beg: str, reply_beg: str, reply_end: str,
        lines_sep: str, tf: Sequence[str] | None = None,
    ) -> str:  # fmt: skip
        """The preprompt and all demonstrations."""
        options: dict[str, Any] = {"lines_sep": lines_sep, "transforms": tf or ()}
        return preprompt + format_pairs(train, query_beg, reply_beg, reply_end, **options)

    def fmt_task(self, key: str, **fmt_opts: Any) -> dict[str, str]:
        """The text of a view, exactly as upstream writes it.

        Args:
            key: the view.
            fmt_opts: see `format_options`; and reply: True (default): the solution, if known; None: none; or a grid of
                the untransformed puzzle.

        Returns:
            key; train (preprompt and demonstrations); query (the test input); input (train + query; "" without a test
            input); reply (only if there is one); text (train + query + reply; train alone without a reply).

        Raises:
            ValueError: see `resolve`; a reply to a key without a test input.
        """
        return format_view(key, self.resolve(key), self.store, **fmt_opts)

    def get_task(
        self, key: str, max_tokens: int | None = None, len_name: str | None = None, tokenizer: Any = None,
        **fmt_opts: Any,
    ) -> tuple[str, dict[str, str]]:  # fmt: skip
        """The text of a view, cut to `max_tokens` by dropping demonstrations from the end.

        Args:
            key: the view.
            max_tokens: limit without BOS: reserve one token for it. None: no limit.
            len_name: the entry of the task whose tokens are counted; default "text".
            tokenizer: see `count_tokens`.
            fmt_opts: see `fmt_task`.

        Returns:
            The key, with the `ex...` of the demonstrations that fit, and the task.

        Raises:
            ValueError: over the limit even with one demonstration; an unknown key.

        Source: ARChitects' get_task, which ends in a blank assertion where nothing fits.
        """
        asked, count = key, len(self.resolve(key).order)
        while True:
            task = self.fmt_task(key, **fmt_opts)
            if max_tokens is None:
                return key, task
            tokens = count_tokens(task[len_name or "text"], tokenizer)
            if tokens <= max_tokens:
                return key, task
            count -= 1
            if count < 1:
                raise does_not_fit(asked, tokens, max_tokens)
            key = shortened_key(key, count)

    count_tokens = staticmethod(count_tokens)

    @classmethod
    def max_new_tokens(
        cls, reply_end: str, lines_sep: str, max_size: int = MAX_SIDE, safety_margin: int = 1, tokenizer: Any = None,
        **_: Any,
    ) -> int:  # fmt: skip
        """Tokens of the longest possible reply, plus a margin. Other format options are ignored."""
        largest = np.zeros((max_size, max_size), dtype=np.uint8)
        return count_tokens(cls.fmt_output(largest, reply_end, lines_sep=lines_sep), tokenizer) + safety_margin

    def get_length(
        self, key: str, len_name: str, max_of_transposed: bool = False, max_tokens: int | None = None,
        tokenizer: Any = None, **fmt_opts: Any,
    ) -> int:  # fmt: skip
        """Tokens of the entry `len_name` of a view's task, BOS included; without format options, cells alone.

        `max_of_transposed` takes the longer of the view and its transpose. `max_tokens` is ignored, so that the options
        of `get_task` can be passed.
        """
        bos = 1 if fmt_opts else 0
        fmt_opts = fmt_opts or dict.fromkeys(("preprompt", "query_beg", "reply_beg", "reply_end", "lines_sep"), "")
        keys = [key, f"{key}.tp"] if max_of_transposed else [key]
        return bos + max(count_tokens(self.fmt_task(k, **fmt_opts)[len_name], tokenizer) for k in keys)

    def sorted_by_len(self, reverse: bool = False, **kwargs: Any) -> ArcDataset:
        """The keys sorted by `get_length`, stably."""
        return self.change_keys(sorted(self.keys, key=lambda key: self.get_length(key, **kwargs), reverse=reverse))

    def convert_with_token_limit(self, quiet: bool = False, **kwargs: Any) -> tuple[list[dict[str, str]], ArcDataset]:
        """`get_task` of every key: the tasks, and a dataset of the shortened keys. quiet: no progress bar."""
        from tqdm import tqdm

        tasks = [self.get_task(key, **kwargs) for key in tqdm(self.keys, desc="convert dataset", disable=quiet)]
        return [task for _, task in tasks], self.change_keys(key for key, _ in tasks)

    def as_list(self, **kwargs: Any) -> list[dict[str, str]]:
        """The tasks of `convert_with_token_limit`."""
        return self.convert_with_token_limit(**kwargs)[0]

    def decode(
        self, text: str, lines_sep: str, key: str | None = None, reply_end: str | None = None
    ) -> tuple[np.ndarray | None, bool | None, str]:
        """Read a grid from a reply and compare it with the solution.

        The text must be rows of ASCII digits of one length, 1 to 30 each way. One `lines_sep` may follow the last row,
        the one in `reply_end` included.

        Args:
            text: the reply; any string.
            lines_sep: separates the rows.
            key: the view of the prompt: its transforms are undone, and the grid is compared.
            reply_end: must end the reply; text after the first one is ignored. None: the whole text is the reply.

        Returns:
            The grid, uint8 (height, width), or None; whether it is correct (None: unknown); and 'ALL_CORRECT',
            'bad_content', 'bad_xy_size', 'sol_unknown', 'unknown' (no key), or 'cant_decode: REASON'.

        Raises:
            ValueError: `lines_sep` or `reply_end` is empty, or the key is bad; never because of the text.

        Source: ARChitects' ArcDataset.decode, which drops everything that is not a digit.
        """
        grid, problem = parse_grid(text, lines_sep, reply_end)
        if grid is None:
            return None, False, f"cant_decode: {problem}"
        if key is None:
            return grid, None, "unknown"
        name, *transforms = key.split(".")
        puzzle, number = split_name(name)
        grid = np.ascontiguousarray(transform_grid(grid, transforms, invert=True))
        solutions = self.solutions.get(puzzle)
        if solutions is None or not 0 <= number < len(solutions):
            return grid, None, "sol_unknown"
        solution = solutions[number]
        if solution.shape != grid.shape:
            return grid, False, "bad_xy_size"
        return (grid, True, "ALL_CORRECT") if np.array_equal(solution, grid) else (grid, False, "bad_content")

    # -- tests and submissions

    def remove_test_data(self) -> ArcDataset:
        """The demonstrations alone, keyed by puzzle. ValueError: not an original dataset."""
        self._require_original("remove_test_data")
        bare = {puzzle: {"train": value["train"], "test": []} for puzzle, value in self.challenge.items()}
        return self._derived(None, False, collect(bare, {}))

    def move_test_to_train(self) -> ArcDataset:
        """Test pairs as further demonstrations. ValueError: not an original dataset, or no solutions."""
        self._require_original("move_test_to_train")
        moved: dict[str, Any] = {}
        for puzzle, value in self.challenge.items():
            if puzzle not in self.solutions:
                raise ValueError(f"puzzle {puzzle} has no solutions to move: load_solutions first")
            tests = zip(value["test"], self.solutions[puzzle], strict=True)
            train = [*value["train"], *({**query, "output": grid} for query, grid in tests)]
            moved[puzzle] = {"train": train, "test": []}
        return self._derived(None, True, collect(moved, {}))

    def get_submission(self, results: Mapping[str, Any] | None = None) -> submissions.Submission:
        """A submission in Kaggle's format, [[0]] where `results` has no guess. For both see `fill_submission`."""
        self._require_original("get_submission")
        submission = submissions.empty_submission(self.challenge)
        submissions.fill_submission(results or {}, submission)
        return submission

    fill_submission = staticmethod(submissions.fill_submission)

    def validate_submission(self, submission: Mapping[str, Any]) -> float:
        """See `submissions.score_submission`. ValueError: also for a dataset that is not original."""
        self._require_original("validate_submission")
        return submissions.score_submission(submission, self.solutions)


def _test_keys(name: str, puzzle: Puzzle) -> list[str]:
    """A key for each test input; the bare id of a puzzle that has none."""
    return [f"{name}_{i}" for i in range(len(puzzle["test"]))] or [name]
