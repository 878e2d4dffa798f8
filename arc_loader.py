"""Puzzles of the ARC kind: loading, views, text, token ids, decoding.

`ArcDataset` reads folders of task files, Kaggle's challenge files and two public collections. Every grid lies in one flat uint8
array; puzzles are small windows on it. A *key* such as `007bbfb7_0.tp.rt.perm0123456789.ex2-0-1` names a view of a puzzle:
puzzle, test index, then transforms in order:

    tp              transpose
    rt              rotate by 90 degrees counter-clockwise (numpy.rot90)
    permDDDDDDDDDD  colour c becomes the digit at position c
    ex2-0-1         order (and subset) of the demonstration pairs; a second `ex` picks from what the first has left

    ds = ArcDataset.load_from_local_json("dataset")
    views = ds.views(seed=42, tp="all", rt="all", perm=True, shfl_ex=True)
    key, task = ds.get_task(views.key(epoch=0, index=5), **format_options("<|eot_id|>"))
    grid, correct, info = ds.decode(task["reply"], lines_sep="\\n", key=key)

Method names and keywords are those of the ARChitects' 2024 loader, so that notebooks written for it port; the code is our own.
It needs numpy and the standard library (tqdm only for progress bars), never torch or transformers: tokenizers are passed in.
Files, pairs and rows are counted from 1 in messages.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAX_SIDE = 30
COLOURS = "0123456789"
ATTEMPTS = ("attempt_1", "attempt_2")
CACHE_VERSION = 1
CACHE_MIN_BYTES = 1_000_000  # parsing less than this takes milliseconds: not worth a file in the user's cache


def format_options(eos_token: str) -> dict[str, str]:
    """The text format: one token per cell once the vocabulary is cut.

    Args:
        eos_token: the tokenizer's end token; every reply ends with it.

    Returns:
        Keyword arguments for `ArcDataset.get_task`, `SampleEncoder` and the like. The preprompt leaves out I and O, which mark
        inputs and outputs.

    Source: the published recipe of the ARChitects.
    """
    return {
        "preprompt": "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyz",
        "query_beg": "I",
        "reply_beg": "\n+/-=O",
        "reply_end": "\n" + eos_token,
        "lines_sep": "\n",
    }


def find_reply_spans(text: str, reply_beg: str, reply_end: str) -> list[tuple[int, int]]:
    """Where the replies of a formatted text are.

    Args:
        text: formatted puzzles.
        reply_beg: what stands before each reply.
        reply_end: what each reply ends with; part of its span.

    Returns:
        Character spans (start, end) of the replies, demonstrations' included. A text that ends with `reply_beg` is a prompt: the
        reply that it asks for has no span.

    Raises:
        ValueError: the text is cut in the middle of a reply, or `reply_beg` or `reply_end` is empty.
    """
    if not reply_beg or not reply_end:
        raise ValueError(f"found reply_beg {reply_beg!r} and reply_end {reply_end!r}: expected text in both to search for")
    spans, position = [], 0
    while (begin := text.find(reply_beg, position)) >= 0:
        begin += len(reply_beg)
        if begin == len(text):
            break
        end = text.find(reply_end, begin)
        if end < 0:
            raise ValueError(
                f"the text is cut in the middle of a reply: the one from character {begin} on has no {reply_end!r}"
            )
        position = end + len(reply_end)
        spans.append((begin, position))
    return spans


# ---------------------------------------------------------------------------------------------------------------------
# Grids in one flat array


class GridStore:
    """Many grids in one flat array of cells.

    Attributes:
        cells: uint8 (cells,), all grids row by row; read-only.
        offsets: int64 (grids,), where each grid begins.
        heights, widths: uint8 (grids,).
    """

    __slots__ = ("cells", "heights", "offsets", "widths")

    def __init__(self, cells: np.ndarray, offsets: np.ndarray, heights: np.ndarray, widths: np.ndarray):
        """See the class."""
        self.cells, self.offsets, self.heights, self.widths = cells, offsets, heights, widths
        cells.flags.writeable = False  # grids that are handed out are windows on it

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its arrays, so that they are read-only again after loading."""
        return GridStore, (self.cells, self.offsets, self.heights, self.widths)

    def grid(self, index: int) -> np.ndarray:
        """Grid number `index`, uint8 (height, width), read-only and not copied."""
        height, width, begin = int(self.heights[index]), int(self.widths[index]), int(self.offsets[index])
        return self.cells[begin : begin + height * width].reshape(height, width)

    @classmethod
    def of_sizes(cls, cells: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> GridStore:
        """A store of grids that lie one after another in `cells`."""
        areas = heights.astype(np.int64) * widths
        return cls(cells, np.cumsum(areas) - areas, heights, widths)

    @classmethod
    def of_grids(cls, grids: Sequence[np.ndarray]) -> GridStore:
        """A store of copies of grids, each uint8 (height, width)."""
        sizes = np.array([grid.shape for grid in grids], dtype=np.uint8).reshape(-1, 2)
        cells = np.concatenate([grid.ravel() for grid in grids]) if grids else np.zeros(0, dtype=np.uint8)
        return cls.of_sizes(cells, sizes[:, 0].copy(), sizes[:, 1].copy())

    @classmethod
    def joined(cls, stores: Sequence[GridStore]) -> GridStore:
        """All grids of the stores in order, as one store."""
        shifts = np.cumsum([0, *(len(store.cells) for store in stores[:-1])])
        return cls(
            np.concatenate([store.cells for store in stores]),
            np.concatenate([store.offsets + shift for store, shift in zip(stores, shifts, strict=True)]),
            np.concatenate([store.heights for store in stores]),
            np.concatenate([store.widths for store in stores]),
        )

    def picked(self, indices: np.ndarray) -> GridStore:
        """The grids of the given numbers in that order, over the same cells."""
        return GridStore(self.cells, self.offsets[indices], self.heights[indices], self.widths[indices])


class _Window(Sequence):
    """`count` items of a store from grid `first` on. 192,628 pairs as Python objects would cost 400 MB; windows cost 2 MB."""

    __slots__ = ("count", "first", "store")

    def __init__(self, store: GridStore, first: int, count: int):
        self.store, self.first, self.count = store, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(self.count))]
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} of {self.count}")
        return self._item(index % self.count)

    def __repr__(self) -> str:
        return repr(list(self))

    def _item(self, index: int) -> Any:
        raise NotImplementedError


class Pairs(_Window):
    """Demonstrations as {"input": grid, "output": grid}; in the store, inputs and outputs alternate."""

    __slots__ = ()

    def _item(self, index: int) -> dict[str, np.ndarray]:
        first = self.first + 2 * index
        return {"input": self.store.grid(first), "output": self.store.grid(first + 1)}


class Queries(_Window):
    """Test inputs as {"input": grid}."""

    __slots__ = ()

    def _item(self, index: int) -> dict[str, np.ndarray]:
        return {"input": self.store.grid(self.first + index)}


class Grids(_Window):
    """Grids, such as the solutions of a puzzle."""

    __slots__ = ()

    def _item(self, index: int) -> np.ndarray:
        return self.store.grid(self.first + index)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking JSON


def _show(value: Any) -> str:
    """A short picture of a value for a message."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    if isinstance(value, (list, tuple, dict)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_grid(grid: Any, where: str) -> np.ndarray:
    """A grid as uint8 (height, width), 1..30 each way, cells 0..9; `where` opens the message of the ValueError otherwise."""
    if isinstance(grid, np.ndarray):
        if grid.ndim != 2 or grid.dtype.kind not in "iu":
            raise ValueError(f"{where}: found an array {grid.shape} of {grid.dtype}, expected (height, width) of integers")
        if 0 < grid.shape[0] <= MAX_SIDE and 0 < grid.shape[1] <= MAX_SIDE and 0 <= grid.min() and grid.max() <= 9:
            return grid.astype(np.uint8)
        grid = grid.tolist()  # for the row in the message
    if not isinstance(grid, (list, tuple)):
        raise ValueError(f"{where}: found {_show(grid)}, expected a list of rows")
    if not 1 <= len(grid) <= MAX_SIDE:
        raise ValueError(f"{where}: found {len(grid)} rows, expected 1 to {MAX_SIDE}")
    for number, row in enumerate(grid, 1):
        if not isinstance(row, (list, tuple)):
            raise ValueError(f"{where}, row {number}: found {_show(row)}, expected a list of cells")
        if not 1 <= len(row) <= MAX_SIDE:
            raise ValueError(f"{where}, row {number}: found {len(row)} cells, expected 1 to {MAX_SIDE}")
        if len(row) != len(grid[0]):
            raise ValueError(f"{where}, row {number}: found {len(row)} cells, expected {len(grid[0])} as in row 1")
        for cell in row:
            # Booleans are integers in Python, and 1.0 equals 1: the type decides.
            if type(cell) is not int and not isinstance(cell, np.integer) or not 0 <= cell <= 9:
                raise ValueError(f"{where}, row {number}: found {_show(cell)}, expected integers 0 to 9")
    return np.array(grid, dtype=np.uint8)


def _check_pair(pair: Any, where: str, output: bool | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Input and output of a pair; `output` says whether there must be one (None: there may be)."""
    if not isinstance(pair, Mapping) or "input" not in pair:
        raise ValueError(f'{where}: found {_show(pair)}, expected {{"input": grid, "output": grid}}')
    if output and "output" not in pair:
        raise ValueError(f'{where}: found no "output" beside its "input", expected a grid')
    result = _check_grid(pair["output"], f"{where}, output") if output is not False and "output" in pair else None
    return _check_grid(pair["input"], f"{where}, input"), result


class _Puzzle(NamedTuple):
    """Checked grids of a puzzle: demonstrations' inputs and outputs in turn, test inputs, and outputs if they are known."""

    train: list[np.ndarray]
    test: list[np.ndarray]
    solution: list[np.ndarray]


def _check_puzzle(value: Any, where: str) -> _Puzzle:
    """The grids of {"train": pairs, "test": pairs with or without outputs}."""
    if not isinstance(value, Mapping) or "train" not in value or "test" not in value:
        raise ValueError(f'{where}: found {_show(value)}, expected {{"train": pairs, "test": pairs}}')
    for part in ("train", "test"):
        if isinstance(value[part], (str, Mapping)) or not isinstance(value[part], Sequence):
            raise ValueError(f"{where}, {part}: found {_show(value[part])}, expected a list of pairs")
    if not len(value["train"]):
        raise ValueError(f"{where}, train: found no pairs, expected at least one")
    train = [
        grid
        for number, pair in enumerate(value["train"], 1)
        for grid in _check_pair(pair, f"{where}, train pair {number}", output=True)
    ]
    pairs = [_check_pair(pair, f"{where}, test pair {number}", output=None) for number, pair in enumerate(value["test"], 1)]
    outputs = [output for _, output in pairs if output is not None]
    if outputs and len(outputs) < len(pairs):
        missing = 1 + [output is None for _, output in pairs].index(True)
        raise ValueError(f'{where}, test pair {missing}: found no "output", expected one as the other test pairs have')
    return _Puzzle(train, [grid for grid, _ in pairs], outputs)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); expected a readable JSON file") from None


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        raise ValueError(f"duplicate id {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _parse_json(data: bytes, path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: not UTF-8, not JSON (with line and column), an object with the same name twice, nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found byte {data[error.start]:#04x} at {error.start}, expected JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: not JSON at {place} ({error.msg}), expected a complete JSON file") from None
    except RecursionError:
        raise ValueError(f"{path}: lists nested too deeply, expected grids as lists of rows of cells") from None
    except ValueError as error:  # a duplicate id, or an integer of thousands of digits
        raise ValueError(f"{path}: {str(error).split(';')[0]}, expected each id once and cells 0 to 9") from None


# What stands in canonical JSON between the last cell of a row and the first of the next, brackets of the rows included.
_TO_OUTPUT, _TO_NEXT_PAIR = b']],"output":[[', b']]},{"input":[['
_BEGIN, _END = b'[{"input":[[', b"]]}]"


def _scan_pairs(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Cells, heights and widths of a list of pairs in canonical JSON, found by a few passes over the bytes.

    20 times faster than building Python lists. Accepts only bytes that the result would be written as (white space between
    tokens aside): whatever is different in any byte gives None and goes to the careful parser, which also finds the message.

    Args:
        data: a file's content.

    Returns:
        uint8 cells (cells,), heights (grids,) and widths (grids,), inputs and outputs in turn; None if not canonical.
    """
    data = data.strip(b" \n\r\t")
    if any(space in data for space in (b" ", b"\n", b"\r", b"\t")):
        names = data.count(b'"input"') + data.count(b'"output"')
        data = data.translate(None, b" \n\r\t")
        if data.count(b'"input"') + data.count(b'"output"') != names:  # white space inside a name
            return None
    if not data.startswith(_BEGIN) or not data.endswith(_END):
        return None
    array = np.frombuffer(data, dtype=np.uint8)
    is_digit = (array - 48) < 10  # uint8 wraps: bytes below "0" become large
    opening, closing = np.flatnonzero(array == ord("[")), np.flatnonzero(array == ord("]"))
    begins, ends = opening[is_digit[opening + 1]], closing[is_digit[closing - 1]]  # brackets of rows, cells inside
    if len(begins) != len(ends) or begins[0] != len(_BEGIN) - 1 or ends[-1] != len(data) - len(_END):
        return None
    gaps, spans = begins[1:] - ends[:-1], ends - begins
    if (gaps < 2).any() or (spans < 2).any() or (spans % 2).any():
        return None
    # 1. Between rows: "],[" inside a grid, else one of two longer texts in turn.
    new_grid = np.flatnonzero(gaps != 2)
    to_output, to_next = new_grid[0::2], new_grid[1::2]
    if len(to_output) != len(to_next) + 1:
        return None
    if (array[ends[:-1][gaps == 2] + 1] != ord(",")).any():
        return None
    for rows, text in ((to_output, _TO_OUTPUT), (to_next, _TO_NEXT_PAIR)):
        if (gaps[rows] != len(text) - 1).any():
            return None
        if (array[ends[rows][:, None] + np.arange(len(text))] != np.frombuffer(text, dtype=np.uint8)).any():
            return None
    # 2. Inside rows: a span of 2w has 2w - 1 bytes. As no two digits touch, it has at most w digits; as there are sum(w) in
    # all, each row has w, in every other place, first and last included. The rest must be commas, so it is enough to count.
    row_widths = spans // 2
    cells = int(row_widths.sum())
    commas = cells - len(row_widths) + len(gaps)  # every text between rows has one
    if np.count_nonzero(is_digit) != cells or (is_digit[1:] & is_digit[:-1]).any():
        return None
    if np.count_nonzero(array == ord(",")) != commas:
        return None
    # 3. Rows of a grid have one length, and grids 1 to 30 of them.
    first_rows = np.concatenate(([0], new_grid + 1))
    heights = np.diff(first_rows, append=len(row_widths))
    widths = row_widths[first_rows]
    if heights.max() > MAX_SIDE or widths.max() > MAX_SIDE or (row_widths != np.repeat(widths, heights)).any():
        return None
    return array[is_digit] - 48, heights.astype(np.uint8), widths.astype(np.uint8)


class _TaskFile(NamedTuple):
    """Where the grids of a file are in the store: pairs, then test inputs, then their outputs if `solved`."""

    first: int
    pairs: int
    tests: int  # -1: a list of pairs, from which puzzles are made
    solved: bool


def _parse_task_file(data: bytes, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int]]:
    """Cells, heights and widths of a task file, and its counts of pairs, tests (-1: a list of pairs) and solutions."""
    scanned = _scan_pairs(data)
    if scanned is not None:
        return *scanned, (len(scanned[1]) // 2, -1, 0)
    value = _parse_json(data, path)
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{path}: found no pairs, expected a list of input/output pairs")
        pairs = [_check_pair(pair, f"{path}, pair {number}", output=True) for number, pair in enumerate(value, 1)]
        grids, counts = [grid for pair in pairs for grid in pair], (len(pairs), -1, 0)
    elif isinstance(value, dict) and "train" in value and "test" in value:
        puzzle = _check_puzzle(value, str(path))
        if not puzzle.test:
            raise ValueError(f"{path}, test: found no pairs, expected at least one")
        grids = [*puzzle.train, *puzzle.test, *puzzle.solution]
        counts = (len(puzzle.train) // 2, len(puzzle.test), len(puzzle.solution))
    else:
        hint = ""
        if isinstance(value, dict) and value and all(isinstance(v, dict) and "train" in v for v in value.values()):
            hint = "; this looks like Kaggle's format: ArcDataset.load_from_json reads it"
        raise ValueError(f'{path}: found {_show(value)}, expected a list of pairs or {{"train", "test"}}{hint}')
    store = GridStore.of_grids(grids)
    return store.cells, store.heights, store.widths, counts


def _list_json(folder: str | os.PathLike[str], pattern: str = "*.json") -> list[Path]:
    """The folder's .json files by name, hidden ones aside.

    Raises:
        FileNotFoundError: no folder, or no such files.
        ValueError: a file instead of a folder, or a folder that cannot be read.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            if folder.is_file():
                raise ValueError(f"{folder} is a file, expected a folder of .json files; for Kaggle's files: load_from_json")
            os.stat(folder)  # names the reason: a loop of links, say
            raise ValueError(f"{folder} is not a folder, expected a folder of .json files")
        files = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        os.listdir(folder)  # glob is silent about a folder that cannot be read
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no such folder, expected a folder of .json files") from None
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror or error}), expected a folder of .json files") from None
    if not files:
        raise FileNotFoundError(f"{folder}: found no {pattern}, expected one JSON file for each task")
    return files


def _cache_file(folder: Path) -> Path | None:
    """Where the parsed grids of a folder are kept; None if the user wants no cache."""
    home = os.environ.get("ARC_LOADER_CACHE")
    if home is None:
        with contextlib.suppress(RuntimeError):  # no home folder
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arc_loader"
    if not home or str(home).lower() == "off":
        return None
    return Path(home) / (hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24] + ".npz")


def _read_cache(file: Path, signature: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """What `_write_cache` wrote, if it is whole and the folder's files are the same; never unpickles."""
    try:
        with np.load(file, allow_pickle=False) as archive:  # the archive checks a CRC of every array
            if archive["signature"].tobytes() != signature:
                return None
            arrays = tuple(archive[name] for name in ("cells", "heights", "widths", "counts"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError):
        return None
    cells, heights, widths, counts = arrays
    if any(a.dtype != np.uint8 or a.ndim != 1 for a in arrays[:3]) or counts.dtype != np.int64 or counts.ndim != 2:
        return None
    if not len(heights) or len(heights) != len(widths) or int((heights.astype(np.int64) * widths).sum()) != len(cells):
        return None
    sides = np.concatenate((heights, widths))
    if cells.max() > 9 or sides.min() < 1 or sides.max() > MAX_SIDE or counts.shape[1] != 3:
        return None
    grids = 2 * counts[:, 0] + np.maximum(counts[:, 1], 0) + counts[:, 2]
    return arrays if int(grids.sum()) == len(heights) else None


def _write_cache(file: Path, signature: bytes, **arrays: np.ndarray) -> None:
    """Keep parsed grids; silently not where that is impossible: a cache is a convenience."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                np.savez(stream, signature=np.frombuffer(signature, dtype=np.uint8), **arrays)
            os.replace(name, file)  # at once: another process sees the old file or the new one
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _read_tasks(files: Sequence[Path]) -> tuple[GridStore, list[_TaskFile]]:
    """The grids of task files of one folder, from the cache if there is one that fits.

    Raises:
        ValueError, FileNotFoundError: see `_parse_task_file` and `_read_bytes`.
    """
    cache, signature, total, newest = _cache_file(files[0].parent), b"", 0, 0
    try:
        states = [(path.name, os.stat(path)) for path in files]
        total, newest = sum(s.st_size for _, s in states), max(max(s.st_mtime_ns, s.st_ctime_ns) for _, s in states)
        # ctime too: it tells of a file that was replaced by another of the same size and (copied) date.
        entries = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in states]
        signature = json.dumps([CACHE_VERSION, entries]).encode()
    except OSError:
        cache = None  # reading the file will say what is wrong with it
    if total < CACHE_MIN_BYTES:
        cache = None
    found = _read_cache(cache, signature) if cache else None
    if found is None:
        parts, position = [], 0
        # A cell takes two bytes at least, so this holds all cells; memory that is never written is never resident.
        cells = np.empty(total // 2 + 1, dtype=np.uint8)
        for path in files:
            part, heights, widths, counts = _parse_task_file(_read_bytes(path), path)
            if position + len(part) > len(cells):  # the file has grown since it was looked at
                cells, cache = np.concatenate((cells[:position], np.empty(2 * len(part) + len(cells), np.uint8))), None
            cells[position : position + len(part)] = part
            position += len(part)
            parts.append((heights, widths, counts))
        cells = cells[:position]
        heights, widths, counts = (np.concatenate(p) if i < 2 else np.array(p) for i, p in enumerate(zip(*parts, strict=True)))
        # A file that was written just now may change again within the clock's grain.
        if cache and time.time_ns() - newest > 2_000_000_000:
            _write_cache(cache, signature, cells=cells, heights=heights, widths=widths, counts=counts.astype(np.int64))
    else:
        cells, heights, widths, counts = found
    tasks, first = [], 0
    for pairs, tests, solved in counts.tolist():
        tasks.append(_TaskFile(first, pairs, tests, solved > 0))
        first += 2 * pairs + max(tests, 0) + solved
    return GridStore.of_sizes(cells, heights, widths), tasks


# ---------------------------------------------------------------------------------------------------------------------
# Keys and draws


def _seed_words(seed: int | None, *names: str) -> list[int]:
    if seed is None:
        return [int(word) for word in np.random.SeedSequence().generate_state(2)]
    return [int(seed) % 2**64, *(zlib.crc32(name.encode()) for name in names)]


def _rng(seed: int | None, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names alone; seed None: on nothing."""
    return np.random.default_rng(_seed_words(seed, *names))


def _rank(seed: int, name: str) -> bytes:
    """Place of a name in a seeded order that does not depend on which other names there are."""
    return hashlib.sha256(f"{int(seed)}:{name}".encode()).digest()


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 in, well mixed uint64 out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _draws(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Random uint64 (rows, count) that depend on (seed, epoch, index) and the column alone.

    A numpy generator for each row would do as well, and take 20 times longer than the rest of making a view.

    Source: SplitMix64 (Steele, Lea and Flood 2014), as a counter-based generator.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    state = _mixed(np.full(len(indices), int(seed) % 2**64, dtype=np.uint64) + step)
    state = _mixed(state + epochs.astype(np.uint64) * step)
    state = _mixed(state + indices.astype(np.uint64) * step)
    return _mixed(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * step)


class _View(NamedTuple):
    """A key resolved against a dataset: which grids, and how they are turned and coloured."""

    train: Pairs
    order: Sequence[int]
    query: int  # number of the test input in the store, -1: none
    solution: int  # number of its output, -1: unknown
    symmetry: tuple[int, int, int]  # transpose, then mirror the order of rows, then of columns
    colours: str  # colour c becomes the digit at position c


def _split_name(key: str) -> tuple[str, int]:
    """Puzzle id and test index (-1: none) of a key."""
    name = key.partition(".")[0]
    puzzle, separator, number = name.partition("_")
    if not separator:
        return puzzle, -1
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"key {key!r}: found test index {number!r}, expected PUZZLE_INDEX such as 007bbfb7_0")
    return puzzle, int(number)


def _check_colours(transform: str) -> str:
    """The ten digits of `perm...`."""
    colours = transform[4:]
    if len(colours) != 10 or frozenset(colours) != frozenset(COLOURS):
        raise ValueError(f"found {transform!r}, expected perm and each of the digits 0 to 9 once")
    return colours


def _check_order(transform: str, count: int) -> list[int]:
    """The numbers of `ex...`, each a different one of `count` demonstrations."""
    words = transform[2:].split("-")
    order = [int(word) if word.isascii() and word.isdigit() else -1 for word in words]
    if min(order) < 0 or max(order) >= count or len(set(order)) < len(order):
        raise ValueError(f"found {transform!r}, expected different numbers of the {count} demonstrations, 0 to {count - 1}")
    return order


def _turned(symmetry: tuple[int, int, int], transform: str) -> tuple[int, int, int]:
    """A symmetry (transpose, mirror rows, mirror columns) followed by tp or rt."""
    transposed, rows, columns = symmetry
    # rot90 is a transpose followed by a mirror of the rows.
    return (1 - transposed, columns, rows) if transform == "tp" else (1 - transposed, 1 - columns, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The dataset


class Holdout(NamedTuple):
    """A split: puzzles to train on, other puzzles of the same tasks, puzzles of tasks that `train` has nothing of."""

    train: ArcDataset
    seen: ArcDataset
    unseen: ArcDataset


class ArcDataset:
    """Puzzles, and the keys (views of them) that are worked with. Methods give new datasets; nothing is changed in place.

    Attributes:
        keys: list of keys.
        challenge: puzzle id -> {"train": sequence of {"input": grid, "output": grid}, "test": sequence of {"input": grid}}.
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
            challenge: puzzle id -> {"train": pairs, "test": pairs}; grids are lists of rows or integer arrays. If the test pairs
                have outputs, these are the solutions, unless `solutions` has them.
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
        challenge: dict[str, dict[str, _Window]],
        solutions: dict[str, Grids],
        keys: Iterable[str] | None,
        is_orig: bool,
        tasks: Mapping[str, str] | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> ArcDataset:
        if keys is None:
            keys = sorted(
                key for name, p in challenge.items() for key in ([f"{name}_{i}" for i in range(len(p["test"]))] or [name])
            )
        self.keys = list(keys)
        puzzles = dict.fromkeys(key.partition(".")[0].partition("_")[0] for key in self.keys)  # ordered and unique
        for puzzle in puzzles:
            if puzzle not in challenge:
                raise ValueError(f"no puzzle {puzzle!r} among {len(challenge):,}, expected keys of puzzles that are there")
        self.challenge = {puzzle: challenge[puzzle] for puzzle in puzzles}
        self.solutions = {puzzle: solutions[puzzle] for puzzle in puzzles if puzzle in solutions}
        self.is_orig = is_orig
        self.left_out = dict(left_out or {})
        self._store, self._tasks = store, tasks or {}
        return self

    def _derived(self, keys: Iterable[str] | None, is_orig: bool, **changes: Any) -> ArcDataset:
        """A dataset over the same store."""
        new = object.__new__(type(self))
        challenge, solutions = changes.get("challenge", self.challenge), changes.get("solutions", self.solutions)
        return new._assign(self._store, challenge, solutions, keys, is_orig, self._tasks, self.left_out)

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
        """Load a folder of task files, each a list of pairs of one task, or an official {"train", "test"} puzzle, or a mix.

        From a list of pairs, puzzles of `size` demonstrations and one test are made in a seeded order; no pair is used twice.
        An official file is one puzzle as it is. Puzzles come in rounds: the first of every task in a seeded order, the second
        of every task, and so on, so that any prefix of `keys` is spread evenly over the tasks.

        Args:
            path: the folder. Its parsed grids are cached (see README: ARC_LOADER_CACHE), and read again when a file changes.
            n: how many puzzles; default: all that there are.
            sizes: demonstrations of a puzzle, in a seeded cycle; sizes that a task's rest is too short for are passed over.
                Not for official files.
            seed: of all of it.
            grid_sizes: (low, high): only pairs whose every side is within these bounds; for official files, only such
                demonstrations. What falls out is counted in `left_out`.

        Returns:
            Puzzles `TASK-ROUND` (official ones: `TASK`), TASK being the file name with "_" and "." replaced by "-".

        Raises:
            FileNotFoundError: no folder or no files.
            ValueError: bad data (named by file, pair and row), two files of one task name, more puzzles asked for than there
                are (the message says how many), settings out of range.
        """
        sizes = _check_sizes(sizes)
        if n is not None and n < 1:
            raise ValueError(f"n is {n}, expected at least 1 puzzle")
        if grid_sizes is not None and not (len(grid_sizes) == 2 and 1 <= grid_sizes[0] <= grid_sizes[1]):
            raise ValueError(f"grid_sizes is {grid_sizes}, expected (low, high) with 1 <= low <= high")
        files = _list_json(path)
        names = _unique_names(files, [cls.base_key_replace_invalid_chars(file.stem) for file in files])
        return cls._from_tasks(names, *_read_tasks(files), sizes, seed, grid_sizes=grid_sizes, n=n, place=str(path))

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
        metadata = Path(path) / "metadata.json"
        tasks = _parse_json(_read_bytes(metadata), metadata)
        if not isinstance(tasks, dict) or not tasks:
            raise ValueError(f"{metadata}: found {_show(tasks)}, expected an object with the task names")
        names = sorted(tasks)
        files = [Path(path) / "tasks" / f"{name}.json" for name in names]
        names = _unique_names(files, [cls.base_key_replace_invalid_chars(name) for name in names])
        options: dict[str, Any] = {"rounds": n, "name": lambda task, number: f"rearc-{task}{number:02x}", "shuffle": shuffle}
        return cls._from_tasks(names, *_read_tasks(files), sizes, seed, place=str(path), mix=mix_datasets, **options)

    @classmethod
    def _from_tasks(
        cls,
        names: Sequence[str],
        store: GridStore,
        files: Sequence[_TaskFile],
        sizes: Sequence[int],
        seed: int,
        *,
        place: str,
        name: Callable[[str, int], str] = lambda task, number: f"{task}-{number:03d}",
        rounds: int | None = None,
        n: int | None = None,
        grid_sizes: tuple[int, int] | None = None,
        shuffle: bool = True,
        mix: Mapping[str, ArcDataset] | None = None,
    ) -> ArcDataset:
        """Make puzzles of the tasks' pairs, round by round. The arguments are those of the loaders above."""
        left_out = {"pairs outside grid_sizes": 0, "pairs that fill no puzzle": 0, "tasks without a puzzle": 0}
        grids: list[np.ndarray] = []  # numbers in the store, in the order of the puzzles
        made: list[list[tuple[str, str, int, int, int, bool]]] = []  # round -> (puzzle, task, first grid, size, tests, solved)
        position = 0
        for task, file in zip(names, files, strict=True):
            inputs = file.first + 2 * np.arange(file.pairs)
            if grid_sizes is not None:
                low, high = grid_sizes
                sides = np.stack([a[i] for a in (store.heights, store.widths) for i in (inputs, inputs + 1)])
                inside = ((sides >= low) & (sides <= high)).all(axis=0)
                left_out["pairs outside grid_sizes"] += int((~inside).sum())
                inputs = inputs[inside]
            if file.tests < 0:
                rng = _rng(seed, "pairs", task)
                inputs = inputs[rng.permutation(len(inputs))]
                plan = _cycle_sizes(sizes, len(inputs), rng, rounds)
                if rounds is not None and len(plan) < rounds:
                    raise ValueError(
                        f"{place}: task {task} has {file.pairs} pairs, enough for {len(plan)} rounds of sizes {tuple(sizes)} "
                        f"and a test each, expected {rounds}: lower n, or generate more pairs"
                    )
                left_out["pairs that fill no puzzle"] += len(inputs) - sum(plan) - len(plan)
                inputs = inputs[: sum(plan) + len(plan)]
                tests, after = 1, np.zeros(0, dtype=np.int64)
            else:
                plan, tests = [len(inputs)] if len(inputs) else [], file.tests
                after = file.first + 2 * file.pairs + np.arange(tests * (2 if file.solved else 1) if plan else 0)
            if not plan:
                left_out["tasks without a puzzle"] += 1
            grids += [np.stack((inputs, inputs + 1), axis=1).ravel(), after]
            for number, size in enumerate(plan):
                if number == len(made):
                    made.append([])
                puzzle = name(task, number) if file.tests < 0 else task
                made[number].append((puzzle, task, position, size, tests, file.tests < 0 or file.solved))
                position += 2 * size + (2 if file.tests < 0 else len(after))
        if shuffle:
            for number, entries in enumerate(made):
                made[number] = [entries[i] for i in _rng(seed, f"round {number}").permutation(len(entries))]
        if not made:
            bounds = "" if grid_sizes is None else f" within grid_sizes {tuple(grid_sizes)}"
            raise ValueError(f"{place}: no task has the pairs of one puzzle{bounds}, expected {min(sizes)} and a test")
        puzzles = [entry for entries in made for entry in entries]
        if n is not None and n > len(puzzles):
            raise ValueError(
                f"{place}: {n:,} puzzles asked for, the maximum is {len(puzzles):,} with sizes {tuple(sizes)} and no pair used "
                "twice: lower n"
            )
        store = store.picked(np.concatenate(grids))
        challenge: dict[str, dict[str, _Window]] = {}
        solutions, tasks, keys = {}, {}, [[] for _ in made]
        number = {entry[0]: i for i, entries in enumerate(made) for entry in entries}
        for puzzle, task, first, size, tests, solved in puzzles[:n]:
            if puzzle in challenge:
                raise ValueError(f"{place}: duplicate puzzle id {puzzle!r}: rename a file")
            test = first + 2 * size
            challenge[puzzle] = {"train": Pairs(store, first, size), "test": Queries(store, test, tests)}
            if solved:
                solutions[puzzle] = Grids(store, test + tests, tests)
            tasks[puzzle] = task
            keys[number[puzzle]] += [f"{puzzle}_{i}" for i in range(tests)]
        for title, other in (mix or {}).items():
            title = cls.base_key_replace_invalid_chars(title)
            for round_keys, more in zip(keys, np.array_split(np.array(other.keys, dtype=object), len(keys)), strict=True):
                round_keys += [f"{title}-{key}" for key in more]
            challenge.update({f"{title}-{puzzle}": value for puzzle, value in other.challenge.items()})
            solutions.update({f"{title}-{puzzle}": value for puzzle, value in other.solutions.items()})
            tasks.update({f"{title}-{puzzle}": f"{title}-{other.task_of(puzzle)}" for puzzle in other.challenge})
        if mix and shuffle:
            keys = [[entries[i] for i in _rng(seed, f"mix {r}").permutation(len(entries))] for r, entries in enumerate(keys)]
        if mix:
            store, challenge, solutions = _collect(challenge, solutions)
        left_out = {what: count for what, count in left_out.items() if count}
        flat = [key for entries in keys for key in entries]
        return object.__new__(cls)._assign(store, challenge, solutions, flat, True, tasks, left_out)

    @classmethod
    def load_from_json(cls, challenges_file: str | os.PathLike[str]) -> ArcDataset:
        """Load a challenge file of Kaggle's format: {id: {"train": pairs, "test": inputs}}. The keys are sorted.

        Raises:
            FileNotFoundError, ValueError: no such file, bad data (named by file, puzzle, pair and row), duplicate ids.
        """
        path = Path(challenges_file)
        challenge = _parse_json(_read_bytes(path), path)
        if not isinstance(challenge, dict) or not challenge or "train" in challenge:
            raise ValueError(f'{path}: found {_show(challenge)}, expected {{id: {{"train": pairs, "test": inputs}}}}')
        with _named(path):
            return cls(challenge, is_orig=True)

    def load_solutions(self, solutions_file: str | os.PathLike[str]) -> ArcDataset:
        """This dataset with the solutions of a file of Kaggle's format: {id: grids}; ids of other puzzles are passed over.

        Raises:
            FileNotFoundError, ValueError: no such file, bad data, a puzzle without solutions or with another number of them.
        """
        path = Path(solutions_file)
        found = _parse_json(_read_bytes(path), path)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: found {_show(found)}, expected {{id: [grid for each test input]}}")
        missing = [puzzle for puzzle in self.challenge if puzzle not in found]
        if missing:
            raise ValueError(f"{path}: no solutions of {len(missing):,} puzzles, such as {missing[0]}; expected all puzzles'")
        with _named(path):
            collected = _collect(self.challenge, {puzzle: found[puzzle] for puzzle in self.challenge})
        new = object.__new__(type(self))
        return new._assign(*collected, self.keys, self.is_orig, self._tasks, self.left_out)

    @classmethod
    def load_from_neoneye(cls, path: str | os.PathLike[str]) -> ArcDataset:
        """Load a dataset of neoneye's collection: data/*/*.json, of which the highest version (_vN) of each counts.

        Raises:
            FileNotFoundError, ValueError: as `load_from_local_json`.
        """
        newest: dict[tuple[Path, str], tuple[int, Path]] = {}
        for file in _list_json(Path(path) / "data", "*/*.json"):
            stem, version = re.fullmatch(r"(.*?)(?:_v([0-9]+))?", file.stem, re.DOTALL).groups()
            entry = (int(version or 1), file)
            newest[file.parent, stem] = max(newest.get((file.parent, stem), entry), entry)
        files = sorted(file for _, file in newest.values())
        names = _unique_names(files, [cls.base_key_replace_invalid_chars(file.stem) for file in files])
        puzzles, solutions = {}, {}
        for name, file in zip(names, files, strict=True):
            value = _parse_json(_read_bytes(file), file)
            puzzle = _check_puzzle(value, str(file))
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
        return base_key.replace("_", "-").replace(".", "-")

    @staticmethod
    def get_base_key_and_reply_num(key: str) -> tuple[str, int]:
        """Puzzle id and test index of a key; -1: the key names no test input."""
        return _split_name(key)

    @classmethod
    def get_base_key(cls, key: str) -> str:
        """Puzzle id of a key."""
        return _split_name(key)[0]

    def task_of(self, key: str) -> str:
        """The task that a key's puzzle was made from: a file of pairs; otherwise the puzzle is a task of its own."""
        puzzle = _split_name(key)[0]
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

    def grouped_keys(self) -> dict[str, list[list[str]]]:
        """Puzzle id -> test index -> keys; keys without a test index count as index 0."""
        groups: dict[str, list[list[str]]] = {}
        for key in self.keys:
            puzzle, number = _split_name(key)
            group = groups.setdefault(puzzle, [])
            group += [[] for _ in range(max(number, 0) + 1 - len(group))]
            group[max(number, 0)].append(key)
        return groups

    def repeat(self, n: int, seed: int | None = None) -> ArcDataset:
        """The keys n times over, each time in a seeded order of its own if there is a seed."""
        rng = None if seed is None else _rng(seed)
        rounds = [self.keys if rng is None else [self.keys[i] for i in rng.permutation(len(self.keys))] for _ in range(n)]
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
            raise ValueError(f'split_seed is {split_seed!r} with {sorted(kwargs)}, expected a seed alone, or "len" and options')
        else:
            puzzles = [puzzles[i] for i in _rng(split_seed).permutation(len(puzzles))]
        parts = [puzzles[len(puzzles) * i // n : len(puzzles) * (i + 1) // n] for i in range(n)]
        return [self._derived(sorted(k for p in part for k in self._test_keys(p)), is_orig=True) for part in parts]

    def holdout(self, examples: int = 0, tasks: int = 0, seed: int = 42) -> Holdout:
        """Split off puzzles to measure on, the same ones for the same seed.

        Args:
            examples: puzzles in all that go to `seen`, spread evenly over the tasks that stay; each task keeps at least one in
                `train`. Where every puzzle is a task of its own, whole puzzles.
            tasks: whole tasks that go to `unseen`. Which ones depends on the seed and the tasks' names alone, not on the
                number, sizes or order of the puzzles.
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
        ranked = sorted(puzzles, key=lambda task: _rank(seed, task))
        stay = ranked[tasks:]
        whole = all(len(puzzles[task]) == 1 for task in stay)
        candidates = []  # one puzzle of every task, then a second one of every task, ...
        for place, task in enumerate(stay):
            ordered = sorted(puzzles[task], key=lambda puzzle: _rank(seed, puzzle))
            candidates += [(turn, place, puzzle) for turn, puzzle in enumerate(ordered[: None if whole else -1])]
        maximum = max(len(candidates) - 1, 0) if whole else len(candidates)
        if not 0 <= examples <= maximum:
            raise ValueError(f"{examples:,} examples to hold out, expected 0 to the maximum of {maximum:,} beside {tasks} tasks")
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
    ) -> Views:
        """Views of the keys, made when they are asked for; see `Views`."""
        return Views(self, seed, tp=tp, rt=rt, perm=perm, keep_background=keep_background, shfl_ex=shfl_ex)

    def augment_keys(self, keys: Sequence[str], seed: int | None = None, n: int = 1, **options: Any) -> list[str]:
        """Keys of augmented views, enumerated as upstream does: n draws of each symmetry of each key, keys running fastest.

        Args:
            keys: keys of this dataset's puzzles.
            seed: of the draws; None: from the system.
            n: draws.
            options: tp, rt, perm, keep_background, shfl_ex as in `Views`.

        Source: ARChitects' augment_keys, whose draws of `tp` and `rt` are repeated n times; here every draw is its own.
        """
        views = Views(self.change_keys(keys), _seed_words(seed)[0], **options)
        order = np.arange(len(views)).reshape(len(keys), -1).T.ravel()
        return [key for draw in range(n) for key in views.keys(np.full(len(order), draw), order)]

    def augment(self, seed: int | None, n: int = 1, **options: Any) -> ArcDataset:
        """A dataset whose keys are views of this one's, key by key; numpy's global generator is not touched.

        Args:
            seed: of the draws; None: from the system.
            n: draws of each view.
            options: tp, rt, perm, keep_background, shfl_ex as in `Views`.

        Source: ARChitects' augment; other draws.
        """
        views = Views(self, _seed_words(seed)[0], **options)
        each = len(views.symmetries)
        rows = np.arange(len(views)).reshape(-1, 1, each).repeat(n, axis=1).ravel()
        draws = np.tile(np.arange(n).repeat(each), len(self.keys))
        return self.change_keys(views.keys(draws, rows))

    # -- puzzles and transforms

    def _resolve(self, key: str) -> _View:
        """A key's grids and transforms.

        Raises:
            ValueError: no such puzzle or test input, or a transform that is not in the grammar.
        """
        name, *transforms = key.split(".")
        puzzle, number = _split_name(name)
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
                    symmetry = _turned(symmetry, transform)
                elif transform.startswith("perm"):
                    new = _check_colours(transform)
                    colours = new if colours is COLOURS else "".join(new[int(c)] for c in colours)
                elif transform.startswith("ex"):
                    order = [order[i] for i in _check_order(transform, len(order))]
                else:
                    raise ValueError(f"found transform {transform!r}, expected tp, rt, permDDDDDDDDDD or ex2-0-1")
        except ValueError as error:
            raise ValueError(f"key {key!r}: {error}") from None
        solution = self.solutions.get(puzzle) if number >= 0 else None
        query = test.first + number if number >= 0 else -1
        return _View(train, order, query, -1 if solution is None else solution.first + number, symmetry, colours)

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
            {"key": key, "train": [(input, output), ...], "test": input or None, "solution": output or None}, grids uint8.

        Raises:
            ValueError: no such key.
            IndexError: no such position.
        """
        if not isinstance(key, str):
            if not -len(self.keys) <= key < len(self.keys):
                raise IndexError(f"position {key} of {len(self.keys):,} keys")
            key = self.keys[key]
        view, transforms = self._resolve(key), key.split(".")[1:]

        def turned(number: int) -> np.ndarray | None:
            return None if number < 0 else self.transform_array(self._store.grid(number), transforms)

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
            sides = np.stack((self._store.heights[used], self._store.widths[used]))
            low, high = sides.min(axis=1), sides.max(axis=1)
            text += f"; {min(sizes)} to {max(sizes)} demonstrations; grids {low[0]}x{low[1]} to {high[0]}x{high[1]}"
        if self.left_out:
            text += "; left out: " + ", ".join(f"{count:,} {what}" for what, count in self.left_out.items())
        return text + ")"

    def content_hash(self) -> str:
        """SHA-256 (hex) of the keys in order and of the grids of their puzzles; the same wherever and however they were read."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        store, cells = self._store, memoryview(self._store.cells)
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

    @staticmethod
    def permute_array(a: Any, descriptor: str, invert: bool = False) -> np.ndarray:
        """Recolour a grid (height, width): colour c becomes the digit at position c of `permDDDDDDDDDD`, or back.

        Raises:
            ValueError: the descriptor is not a permutation, or the array no grid.
        """
        lookup = np.array([int(c) for c in _check_colours(descriptor)], dtype=np.uint8)
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
        cls, train: Iterable[Mapping[str, Any]], preprompt: str, query_beg: str, reply_beg: str, reply_end: str, **kwargs: Any
    ) -> str:
        """The preprompt and all demonstrations."""
        return preprompt + "".join(
            cls.fmt_input(pair["input"], query_beg, reply_beg, **kwargs) + cls.fmt_output(pair["output"], reply_end, **kwargs)
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
            key; train (preprompt and demonstrations); query (the test input); input (train + query; "" without a test input);
            reply (only if there is one); text (train + query + reply; train alone without a reply).

        Raises:
            ValueError: see `_resolve`; a reply to a key without a test input.
        """
        view, transforms = self._resolve(key), key.split(".")[1:]
        if reply is True:
            reply = self._store.grid(view.solution) if view.solution >= 0 else None
        elif reply is not None and view.query < 0:
            raise ValueError(f"key {key!r} names no test input that could have a reply, expected PUZZLE_INDEX")
        pairs = [view.train[i] for i in view.order]
        task = {"key": key, "train": self.fmt_train(pairs, preprompt, query_beg, reply_beg, reply_end, tf=transforms, **kwargs)}
        task["query"] = task["input"] = ""
        if view.query >= 0:
            task["query"] = self.fmt_input(self._store.grid(view.query), query_beg, reply_beg, tf=transforms, **kwargs)
            task["input"] = task["train"] + task["query"]
        task["text"] = task["train"]
        if reply is not None:
            task["reply"] = self.fmt_output(reply, reply_end, tf=transforms, **kwargs)
            task["text"] = task["input"] + task["reply"]
        return task

    def get_task(
        self, key: str, max_tokens: int | None = None, len_name: str | None = None, tokenizer: Any = None, **fmt_opts: Any
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
        asked, count = key, len(self._resolve(key).order)
        while True:
            task = self.fmt_task(key, **fmt_opts)
            if max_tokens is None:
                return key, task
            tokens = self.count_tokens(task[len_name or "text"], tokenizer)
            if tokens <= max_tokens:
                return key, task
            count -= 1
            if count < 1:
                raise ValueError(
                    f"key {asked!r}: {tokens:,} tokens with one demonstration, expected at most {max_tokens:,}: raise the "
                    "limit or leave the puzzle out"
                )
            key = _shortened(key, count)

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
        cls, reply_end: str, lines_sep: str, max_size: int = MAX_SIDE, safety_margin: int = 1, tokenizer: Any = None, **_: Any
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
        """`get_task` of every key: the tasks, and a dataset of the keys as they were shortened. Without a progress bar if quiet."""
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

        The text must be rows of ASCII digits of one length, 1 to 30 each way, and nothing else; one `lines_sep` after the last
        row is allowed (one in all: a second one beside that of `reply_end` is not).

        Args:
            text: the reply; any string.
            lines_sep: what stands between rows.
            key: the view that was asked for: the grid is mapped back through its transforms and compared.
            reply_end: what the reply must end with; what follows the first one is ignored. None: the text is the reply.

        Returns:
            The grid, uint8 (height, width), or None; whether it is correct (None: unknown); and 'ALL_CORRECT', 'bad_content',
            'bad_xy_size', 'sol_unknown', 'unknown' (no key), or 'cant_decode: REASON'.

        Raises:
            ValueError: `lines_sep` is empty, or the key is not in the grammar. Never because of the text.

        Source: ARChitects' ArcDataset.decode, which drops whatever is not a digit; strict here.
        """
        if not lines_sep:
            raise ValueError("lines_sep is empty, expected what stands between rows")
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
        puzzle, number = _split_name(name)
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
        return self._replaced({puzzle: {"train": value["train"], "test": []} for puzzle, value in self.challenge.items()}, False)

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
            moved[puzzle] = {"train": [*value["train"], *({**query, "output": grid} for query, grid in tests)], "test": []}
        return self._replaced(moved, True)

    def _replaced(self, challenge: Mapping[str, Any], is_orig: bool) -> ArcDataset:
        """Other puzzles of the same names and tasks, without solutions."""
        new = object.__new__(type(self))
        return new._assign(*_collect(challenge, {}), None, is_orig, self._tasks, self.left_out)

    def get_submission(self, results: Mapping[str, Any] | None = None) -> dict[str, list[dict[str, list[list[int]]]]]:
        """A submission in Kaggle's format, with [[0]] wherever `results` (see `fill_submission`) has no guess.

        Raises:
            ValueError: not an original dataset; see `fill_submission`.
        """
        self._require_original("get_submission")
        empty = {
            puzzle: [{attempt: [[0]] for attempt in ATTEMPTS} for _ in value["test"]] for puzzle, value in self.challenge.items()
        }
        if results is not None:
            self.fill_submission(results, empty)
        return empty

    @staticmethod
    def fill_submission(results: Mapping[str, Any], submission: dict[str, list[dict[str, Any]]]) -> None:
        """Write guesses into a submission, in place.

        Args:
            results: puzzle id -> test index -> guesses, best first, each {"output": grid}; those beyond the attempts are left.
            submission: as `get_submission` gives it.

        Raises:
            ValueError: a puzzle or test index that the submission does not have.
        """
        for puzzle, tests in results.items():
            if len(tests) > len(submission.get(puzzle, [])):
                raise ValueError(f"results of {puzzle}: {len(tests)} tests, the submission has {len(submission.get(puzzle, []))}")
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
                    raise ValueError(f"the submission has no {' and '.join(ATTEMPTS)} of {puzzle}, test {number}") from None
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


def _cycle_sizes(sizes: Sequence[int], pairs: int, rng: np.random.Generator, rounds: int | None) -> list[int]:
    """Sizes of puzzles that `pairs` pairs are enough for, a test each included: seeded orders of `sizes`, one after another."""
    plan: list[int] = []
    while min(sizes) < pairs:
        for size in rng.permutation(sizes).tolist():
            if rounds is not None and len(plan) == rounds:
                return plan
            if size < pairs:
                plan.append(size)
                pairs -= size + 1
    return plan


def _unique_names(files: Sequence[Path], names: list[str]) -> list[str]:
    """The names, one for each file.

    Raises:
        ValueError: two files have one name.
    """
    first: dict[str, Path] = {}
    for file, name in zip(files, names, strict=True):
        if first.setdefault(name, file) is not file:
            raise ValueError(f"{first[name]} and {file}: duplicate id {name!r} (\"_\" and \".\" become \"-\"): rename one")
    return names


def _shortened(key: str, count: int) -> str:
    """A key with only the first `count` of its demonstrations."""
    parts = key.split(".")
    if parts[-1].startswith("ex"):
        parts[-1] = "-".join(parts[-1].split("-")[:count])
    else:
        parts.append("ex" + "-".join(map(str, range(count))))
    return ".".join(parts)


def _collect(
    challenge: Mapping[str, Any], solutions: Mapping[str, Any]
) -> tuple[GridStore, dict[str, dict[str, _Window]], dict[str, Grids]]:
    """Bring puzzles from wherever they are into one store; windows on stores are moved, everything else is checked and copied."""
    stores: dict[int, GridStore] = {}
    grids: list[np.ndarray] = []  # of everything that is in no store yet
    new = GridStore.of_grids([])
    windows: list[tuple[str, str, _Window]] = []

    def add(puzzle: str, part: str, kind: type[_Window], value: Any) -> None:
        if isinstance(value, kind):
            stores[id(value.store)] = value.store
            windows.append((puzzle, part, value))
        else:
            windows.append((puzzle, part, kind(new, len(grids), len(value) // (2 if kind is Pairs else 1))))
            grids.extend(value)

    for puzzle, value in challenge.items():
        where = f"puzzle {puzzle}"
        if not isinstance(puzzle, str) or not puzzle or "_" in puzzle or "." in puzzle:
            raise ValueError(f'{where}: found the id {puzzle!r}, expected text without "_" and "."')
        given = solutions.get(puzzle)
        if isinstance(value, Mapping) and isinstance(value.get("train"), Pairs) and isinstance(value.get("test"), Queries):
            train, test, found = value["train"], value["test"], None
        else:
            train, test, found = _check_puzzle(value, where)
        add(puzzle, "train", Pairs, train)
        add(puzzle, "test", Queries, test)
        given = found or None if given is None else given
        if given is None:
            continue
        if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence) or len(given) != len(test):
            raise ValueError(f"{where}: found solutions {_show(given)}, expected one grid for each of {len(test)} test inputs")
        if not isinstance(given, Grids):
            given = [_check_grid(grid, f"{where}, solution {number}") for number, grid in enumerate(given, 1)]
        add(puzzle, "solution", Grids, given)
    if grids or not stores:
        filled = GridStore.of_grids(grids)
        stores[id(new)] = filled
    order = list(stores)
    store = stores[order[0]] if len(order) == 1 else GridStore.joined(list(stores.values()))
    shifts = dict(zip(order, np.cumsum([0, *(len(stores[i].heights) for i in order)]).tolist(), strict=False))
    collected: dict[str, dict[str, _Window]] = {}
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
