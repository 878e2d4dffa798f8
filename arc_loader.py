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
    grid, correct, info = ds.decode(task["reply"], lines_sep="\\n", key=key)

Method names and keywords are those of the ARChitects' 2024 loader, so that notebooks written for it port; the code is
our own. It needs numpy and the standard library (tqdm only for progress bars), never torch or transformers: tokenizers
are passed in. Files, pairs and rows are counted from 1 in messages.

The parsed grids of large folders are kept in $ARC_LOADER_CACHE (default: arc_loader in $XDG_CACHE_HOME or ~/.cache;
"off" or empty: nowhere) and parsed again when a file has changed.
"""

from __future__ import annotations

import contextlib
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
        Keyword arguments for `ArcDataset.get_task`, `SampleEncoder` and the like. The preprompt leaves out I and O,
        which mark inputs and outputs.

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
        Character spans (start, end) of the replies, demonstrations' included. A text that ends with `reply_beg` is a
        prompt: the reply that it asks for has no span.

    Raises:
        ValueError: the text is cut in the middle of a reply, or `reply_beg` or `reply_end` is empty.
    """
    if not reply_beg or not reply_end:
        raise ValueError(
            f"found reply_beg {reply_beg!r} and reply_end {reply_end!r}: expected text in both to search for"
        )
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
    """`count` items of a store from grid `first` on: a Python object for every pair would cost far more than the
    cells."""

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
    """A grid as uint8 (height, width), 1..30 each way, cells 0..9; else a ValueError whose message `where` opens."""
    if isinstance(grid, np.ndarray):
        if grid.ndim != 2 or grid.dtype.kind not in "iu":
            raise ValueError(
                f"{where}: found an array {grid.shape} of {grid.dtype}, expected (height, width) of integers"
            )
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


def _check_pair(pair: Any, where: str, solved: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Input and output of a pair; `solved`: there must be an output, else there may be."""
    if not isinstance(pair, Mapping) or "input" not in pair:
        raise ValueError(f'{where}: found {_show(pair)}, expected {{"input": grid, "output": grid}}')
    if solved and "output" not in pair:
        raise ValueError(f'{where}: found no "output" beside its "input", expected a grid')
    result = _check_grid(pair["output"], f"{where}, output") if "output" in pair else None
    return _check_grid(pair["input"], f"{where}, input"), result


class _Puzzle(NamedTuple):
    """Checked grids: demonstrations' inputs and outputs in turn, test inputs, and their outputs if they are known."""

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
        for grid in _check_pair(pair, f"{where}, train pair {number}", solved=True)
    ]
    pairs = [
        _check_pair(pair, f"{where}, test pair {number}", solved=False) for number, pair in enumerate(value["test"], 1)
    ]
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
        raise ValueError(
            f"{path}: found byte {data[error.start]:#04x} at {error.start}, expected JSON in UTF-8"
        ) from None
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

    Many times faster than building Python lists. Accepts only bytes that the result would be written as (white space
    between tokens aside): whatever is different in any byte gives None and goes to the careful parser, which also finds
    the message.

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
    # 2. Inside rows: a span of 2w has 2w - 1 bytes. As no two digits touch, it has at most w digits; as there are
    # sum(w) in all, each row has w, in every other place, first and last included. The rest must be commas, so it is
    # enough to count them.
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
    digits = np.frombuffer(
        data.translate(None, b'[]{}",:inputo'), dtype=np.uint8
    )  # 5 times faster than array[is_digit]
    return digits - 48, heights.astype(np.uint8), widths.astype(np.uint8)


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
        pairs = [_check_pair(pair, f"{path}, pair {number}", solved=True) for number, pair in enumerate(value, 1)]
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
                raise ValueError(
                    f"{folder} is a file, expected a folder of .json files; for Kaggle's files: load_from_json"
                )
            os.stat(folder)  # names the reason: a loop of links, say
            raise ValueError(f"{folder} is not a folder, expected a folder of .json files")
        files = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        os.listdir(folder)  # glob is silent about a folder that cannot be read
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no such folder, expected a folder of .json files") from None
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be read ({error.strerror or error}), expected a folder of .json files"
        ) from None
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
        heights, widths, counts = (
            np.concatenate(p) if i < 2 else np.array(p) for i, p in enumerate(zip(*parts, strict=True))
        )
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
        raise ValueError(
            f"found {transform!r}, expected different numbers of the {count} demonstrations, 0 to {count - 1}"
        )
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
        challenge: dict[str, dict[str, _Window]],
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
        self._store, self._tasks = store, tasks or {}
        return self

    def _derived(self, keys: Iterable[str] | None, is_orig: bool, collected: tuple[Any, ...] = ()) -> ArcDataset:
        """A dataset of the same tasks, over the same store and puzzles unless others (see `_collect`) are given."""
        parts = collected or (self._store, self.challenge, self.solutions)
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
        options: dict[str, Any] = {
            "rounds": n,
            "name": lambda task, number: f"rearc-{task}{number:02x}",
            "shuffle": shuffle,
        }
        return cls._from_tasks(names, *_read_tasks(files), sizes, seed, place=str(path), mix=mix_datasets, **options)

    @classmethod
    def _from_tasks(
        cls,
        names: Sequence[str],
        store: GridStore,
        files: Sequence[_TaskFile],
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
                rng = _rng(seed, "pairs", names[task])
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
        order = np.lexsort((_rng(seed, "order").random(table.shape[1]) if shuffle else table[0], table[1]))
        store = store.picked(np.concatenate(grids))
        challenge: dict[str, dict[str, _Window]] = {}
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
            draws = _rng(seed, "mix").random(len(keys)) if shuffle else np.zeros(len(keys))
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
        challenge = _parse_json(_read_bytes(path), path)
        if not isinstance(challenge, dict) or not challenge or "train" in challenge:
            raise ValueError(f'{path}: found {_show(challenge)}, expected {{id: {{"train": pairs, "test": inputs}}}}')
        with _named(path):
            return cls(challenge, is_orig=True)

    def load_solutions(self, solutions_file: str | os.PathLike[str]) -> ArcDataset:
        """This dataset with the solutions of a Kaggle file: {id: grids}; ids of other puzzles are passed over.

        Raises:
            FileNotFoundError, ValueError: no such file, bad data, a puzzle without solutions or with another number of
                them.
        """
        path = Path(solutions_file)
        found = _parse_json(_read_bytes(path), path)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: found {_show(found)}, expected {{id: [grid for each test input]}}")
        missing = [puzzle for puzzle in self.challenge if puzzle not in found]
        if missing:
            raise ValueError(
                f"{path}: no solutions of {len(missing):,} puzzles, such as {missing[0]}; expected all puzzles'"
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
        return _valid(base_key)

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
            puzzles = [puzzles[i] for i in _rng(split_seed).permutation(len(puzzles))]
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
        ranked = sorted(puzzles, key=lambda task: _rank(seed, task))
        stay = ranked[tasks:]
        whole = all(len(puzzles[task]) == 1 for task in stay)
        candidates = []  # one puzzle of every task, then a second one of every task, ...
        for place, task in enumerate(stay):
            ordered = sorted(puzzles[task], key=lambda puzzle: _rank(seed, puzzle))
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
    ) -> Views:
        """Views of the keys, made when they are asked for; see `Views`."""
        return Views(self, seed, tp=tp, rt=rt, perm=perm, keep_background=keep_background, shfl_ex=shfl_ex)

    def augment_keys(self, keys: Sequence[str], seed: int | None = None, n: int = 1, **options: Any) -> list[str]:
        """Keys of augmented views in upstream's order: n draws of each symmetry of each key, keys running fastest.

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
            sizes_text = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{min(sizes)}"
            text += f"; {sizes_text} demonstrations; grids {low[0]}x{low[1]} to {high[0]}x{high[1]}"
        if self.left_out:
            text += "; left out: " + ", ".join(f"{count:,} {what}" for what, count in self.left_out.items())
        return text + ")"

    def content_hash(self) -> str:
        """SHA-256 (hex) of the keys in order and their puzzles' grids; the same wherever and however they were read."""
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
        view, transforms = self._resolve(key), key.split(".")[1:]
        if reply is True:
            reply = self._store.grid(view.solution) if view.solution >= 0 else None
        elif reply is not None and view.query < 0:
            raise ValueError(f"key {key!r} names no test input that could have a reply, expected PUZZLE_INDEX")
        elif reply is not None:
            reply = _check_grid(reply, f"key {key!r}, reply")
        pairs = [view.train[i] for i in view.order]
        task = {
            "key": key,
            "train": self.fmt_train(pairs, preprompt, query_beg, reply_beg, reply_end, tf=transforms, **kwargs),
        }
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
                raise _does_not_fit(asked, tokens, max_tokens)
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


def _shortened(key: str, count: int) -> str:
    """A key with only the first `count` of its demonstrations."""
    parts = key.split(".")
    if parts[-1].startswith("ex"):
        parts[-1] = "-".join(parts[-1].split("-")[:count])
    else:
        parts.append("ex" + "-".join(map(str, range(count))))
    return ".".join(parts)


def _does_not_fit(key: str, tokens: int, max_tokens: int) -> ValueError:
    return ValueError(
        f"key {key!r}: {tokens:,} tokens with one demonstration, expected at most {max_tokens:,}: raise the limit or "
        "leave the puzzle out"
    )


def _collect(
    challenge: Mapping[str, Any], solutions: Mapping[str, Any]
) -> tuple[GridStore, dict[str, dict[str, _Window]], dict[str, Grids]]:
    """Bring puzzles into one store: windows on other stores are moved, everything else is checked and copied."""
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
        if (
            isinstance(value, Mapping)
            and isinstance(value.get("train"), Pairs)
            and isinstance(value.get("test"), Queries)
        ):
            train, test, found = value["train"], value["test"], None
        else:
            train, test, found = _check_puzzle(value, where)
        add(puzzle, "train", Pairs, train)
        add(puzzle, "test", Queries, test)
        given = found or None if given is None else given
        if given is None:
            continue
        if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence) or len(given) != len(test):
            raise ValueError(
                f"{where}: found solutions {_show(given)}, expected one grid for each of {len(test)} test inputs"
            )
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

        Raises:
            ValueError: tp or rt is something else.
        """
        for name, value in (("tp", tp), ("rt", rt)):
            if value not in (True, False, "all"):
                raise ValueError(f'{name} is {value!r}, expected "all", True or False')
        self.ds, self.seed = ds, seed
        self.tp, self.rt = (value if value == "all" else bool(value) for value in (tp, rt))
        self.perm, self.keep_background, self.shfl_ex = perm, keep_background, shfl_ex
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
        draws = _draws(self.seed, epochs, indices, 12 + max(counts))
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
            suffixes = [f"{s}.perm{digits[10 * i : 10 * i + 10]}" for i, s in enumerate(suffixes)]
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
            return len(self.ds._resolve(key).order)
        return self.ds.challenge[key.partition(".")[0].partition("_")[0]]["train"].count


# ---------------------------------------------------------------------------------------------------------------------
# Token ids


class _Layout(NamedTuple):
    """Where the grids of a batch of samples stand among its tokens (one token per cell). G grids, S samples."""

    keys: list[str]
    grids: np.ndarray  # int64 (G,), numbers in the store
    sample: np.ndarray  # int64 (G,), which sample each belongs to
    is_output: np.ndarray  # bool (G,)
    rows: np.ndarray  # int64 (G,), rows as turned
    tokens: np.ndarray  # int64 (G,), tokens with what stands around the grid
    lengths: np.ndarray  # int64 (S,), tokens
    symmetries: np.ndarray  # int64 (S, 3), see `_View`
    colours: np.ndarray  # uint8 (S, 10)


class SampleEncoder:
    """Turns keys into token ids, straight from the arrays where the tokenizer gives one token per cell.

    Attributes:
        one_token_per_cell: whether ids are put together from the arrays; else the tokenizer is called on the text.
            Found out by encoding a text that has every number of up to three digits and every seam between the parts.
    """

    def __init__(self, tokenizer: Any, preprompt: str, query_beg: str, reply_beg: str, reply_end: str, lines_sep: str):
        """See the class.

        Args:
            tokenizer: a fast tokenizer, called as those of transformers are.
            preprompt, query_beg, reply_beg, reply_end, lines_sep: the format, see `format_options`.
        """
        self.tokenizer = tokenizer
        self.format = {
            "preprompt": preprompt,
            "query_beg": query_beg,
            "reply_beg": reply_beg,
            "reply_end": reply_end,
            "lines_sep": lines_sep,
        }
        plain, full = self._ids(preprompt), tokenizer(preprompt)["input_ids"]
        added = len(full) - len(plain)
        self.prefix = np.array(full, dtype=np.int32)  # BOS, if the tokenizer adds it, and the preprompt
        self._query_beg, self._reply_beg, self._reply_end, self._lines_sep = (
            np.array(self._ids(text), dtype=np.int32) for text in (query_beg, reply_beg, reply_end, lines_sep)
        )
        digits = [self._ids(digit) for digit in COLOURS]
        self.one_token_per_cell = (
            full[added:] == plain  # nothing is added at the end
            and all(len(ids) == 1 for ids in digits)
            and len({ids[0] for ids in digits}) == 10
            and len(self._lines_sep) == 1
        )
        if self.one_token_per_cell:
            self._digits = np.array([ids[0] for ids in digits], dtype=np.int32)
            self.one_token_per_cell = self._seams_hold()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _seams_hold(self) -> bool:
        """Whether ids of parts, put together, are the ids of the whole."""
        numbers = [f"{i:0{width}d}" for width in (1, 2, 3) for i in range(10**width)]
        long = ["0123456789" * 3, "9876543210" * 3]
        grids = [[a, b] for a in COLOURS for b in COLOURS] + [long, [row[:29] for row in long], numbers]
        text, ids = self.format["preprompt"], list(self.prefix)
        for rows in grids:
            cells = [[*self._digits[[int(c) for c in row]], *self._lines_sep] for row in rows]
            body = [i for row in cells for i in row][: -len(self._lines_sep)]
            grid = self.format["lines_sep"].join(rows)
            text += self.format["query_beg"] + grid + self.format["reply_beg"] + grid + self.format["reply_end"]
            ids += [*self._query_beg, *body, *self._reply_beg, *body, *self._reply_end]
        return list(self.tokenizer(text)["input_ids"]) == [int(i) for i in ids]

    def encode(
        self, ds: ArcDataset, keys: Sequence[str], max_tokens: int | None = None, reply: bool = True
    ) -> list[dict[str, Any]]:
        """Token ids of views; best in batches of 64 or more.

        Args:
            ds: holds the puzzles.
            keys: views.
            max_tokens: limit of all ids, BOS included; demonstrations are left out from the end until a sample fits.
            reply: whether the solution follows the query, where it is known; False: a prompt that ends with
                `reply_beg`.

        Returns:
            A row for each key: key (with the `ex...` that shortening has made), input_ids int32 (tokens,), equal to
            `tokenizer(task["text"])["input_ids"]` (of `task["input"]` for a prompt), and reply_spans int32 (replies,
            2), token positions [start, end) of each reply with its end, demonstrations first.

        Raises:
            ValueError: a sample is too long with one demonstration, a prompt has no test input, or a key is wrong.
        """
        if not self.one_token_per_cell:
            return self._encode_texts(ds, list(keys), max_tokens, reply)
        return self._assemble(ds, self._layout(ds, keys, max_tokens, reply)) if len(keys) else []

    def lengths(
        self, ds: ArcDataset, keys: Sequence[str], max_tokens: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of views, int64 (keys,), and which of them lose demonstrations, bool (keys,). See `encode`."""
        if self.one_token_per_cell:
            layout = self._layout(ds, keys, max_tokens, reply=True)
            made, lengths = layout.keys, layout.lengths
        else:
            rows = self._encode_texts(ds, list(keys), max_tokens, reply=True)
            made = [row["key"] for row in rows]
            lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
        return lengths, np.array([a != b for a, b in zip(keys, made, strict=True)], dtype=bool)

    def too_long(self, ds: ArcDataset, keys: Sequence[str], max_tokens: int, turned: bool = True) -> list[str]:
        """Keys of which not every view fits `max_tokens` with one demonstration, whichever comes first.

        A view's length depends on its orientation, not on its colours: a grid of many rows has more line ends. Where
        digits merge, the count of one token per cell is an upper bound: only puzzles beyond it are given to the
        tokenizer, with the colours they have (Llama 3 merges digits by their number alone, so there it is exact).

        Args:
            ds: holds the puzzles.
            keys: views.
            max_tokens: limit of all ids, BOS included.
            turned: whether views may be turned; False: only the orientation of the keys counts.
        """
        beyond = []
        for begin in range(0, len(keys), 4096):
            part = keys[begin : begin + 4096]
            worst = np.zeros(len(part), dtype=np.int64)
            for turn in (0, 1) if turned else (0,):
                layout = self._layout(ds, part, None, reply=True, turn=turn)
                pair = layout.tokens[:-1] + layout.tokens[1:]
                is_pair = layout.is_output[1:] & ~layout.is_output[:-1]  # no output ever stands first in a sample
                # The last two grids of a sample are its test pair, if it has both; only demonstrations can be left out.
                last = np.cumsum(np.bincount(layout.sample, minlength=len(part))) - 1
                views = [ds._resolve(key) for key in part]
                tests = np.array([view.query >= 0 and view.solution >= 0 for view in views])
                is_pair[last[tests] - 1] = False
                largest = np.zeros(len(part), dtype=np.int64)
                np.maximum.at(largest, layout.sample[1:][is_pair], pair[is_pair])
                worst = np.maximum(worst, len(self.prefix) + largest + np.where(tests, pair[last - 1], 0))
            beyond += [key for key, tokens in zip(part, worst.tolist(), strict=True) if tokens > max_tokens]
        if self.one_token_per_cell:
            return beyond
        return [key for key in beyond if self._longest_text(ds, key, turned) > max_tokens]

    def _longest_text(self, ds: ArcDataset, key: str, turned: bool) -> int:
        texts = [
            ds.fmt_task(f"{key}{turn}.ex{i}", **self.format)["text"]
            for turn in (("", ".tp") if turned else ("",))
            for i in range(len(ds._resolve(key).order))
        ]
        return max(len(ids) for ids in self.tokenizer(texts)["input_ids"])

    def _layout(
        self, ds: ArcDataset, keys: Sequence[str], max_tokens: int | None, reply: bool, turn: int = 0
    ) -> _Layout:
        """Grids and lengths of samples, demonstrations left out as needed; `turn` 1: as if every key was transposed."""
        views = [ds._resolve(key) for key in keys]
        numbers: list[int] = []
        counts = []  # grids of each sample
        for key, view in zip(keys, views, strict=True):
            before, first = len(numbers), view.train.first
            for i in view.order:
                numbers += (first + 2 * i, first + 2 * i + 1)
            if not reply:
                if view.query < 0:
                    raise ValueError(f"key {key!r} names no test input to make a prompt of, expected PUZZLE_INDEX")
                numbers.append(view.query)
            elif view.solution >= 0:
                numbers += (view.query, view.solution)
            counts.append(len(numbers) - before)
        grids, sizes = np.array(numbers, dtype=np.int64), np.array(counts, dtype=np.int64)
        sample = np.arange(len(keys)).repeat(sizes)
        first = np.cumsum(sizes) - sizes
        is_output = (np.arange(len(grids)) - first[sample]) % 2 == 1
        symmetries = np.array([view.symmetry for view in views], dtype=np.int64)
        heights, widths = ds._store.heights[grids].astype(np.int64), ds._store.widths[grids].astype(np.int64)
        rows = np.where(symmetries[sample, 0] ^ turn, widths, heights)
        around = np.where(is_output, len(self._reply_end), len(self._query_beg) + len(self._reply_beg))
        tokens = heights * widths + (rows - 1) + around
        lengths = len(self.prefix) + np.add.reduceat(tokens, first)
        made = list(keys)
        if max_tokens is not None and (lengths > max_tokens).any():
            keep = np.ones(len(grids), dtype=bool)
            for s in np.flatnonzero(lengths > max_tokens).tolist():
                count = len(views[s].order)
                end = first[s] + 2 * count
                pairs = tokens[first[s] : end].reshape(count, 2).sum(axis=1)
                fits = lengths[s] - pairs.sum() + np.cumsum(pairs) <= max_tokens
                kept = int(fits.sum())
                if not kept:
                    raise _does_not_fit(keys[s], int(lengths[s] - pairs[1:].sum()), max_tokens)
                keep[first[s] + 2 * kept : end] = False
                lengths[s] -= pairs[kept:].sum()
                made[s] = _shortened(keys[s], kept)
            grids, sample, is_output, rows, tokens = (a[keep] for a in (grids, sample, is_output, rows, tokens))
        colours = (
            np.frombuffer("".join(view.colours for view in views).encode("ascii"), dtype=np.uint8).reshape(-1, 10) - 48
        )
        return _Layout(made, grids, sample, is_output, rows, tokens, lengths, symmetries, colours)

    def _assemble(self, ds: ArcDataset, layout: _Layout) -> list[dict[str, Any]]:
        """Ids of a batch: what stands around grids is written to its places, all cells at once to the places left."""
        store, grids, sample, rows = ds._store, layout.grids, layout.sample, layout.rows
        heights, widths = store.heights[grids].astype(np.int64), store.widths[grids].astype(np.int64)
        columns = heights + widths - rows
        # A symmetry is affine in flat indices: the view's cell (r, c) is the store's origin + r * down + c * right.
        transposed, mirror_rows, mirror_columns = (layout.symmetries[sample].T == 1).reshape(3, -1)
        down, right = np.where(transposed, 1, widths), np.where(transposed, widths, 1)
        origin = store.offsets[grids] + np.where(mirror_rows, (rows - 1) * down, 0)
        origin += np.where(mirror_columns, (columns - 1) * right, 0)
        down, right = np.where(mirror_rows, -down, down), np.where(mirror_columns, -right, right)
        # One line a row of a grid, its end included but for the last row's.
        grid_of_line = np.arange(len(grids)).repeat(rows)
        ends_of_grids = np.cumsum(rows)
        line = np.arange(len(grid_of_line)) - (ends_of_grids - rows)[grid_of_line]
        line_lengths = columns[grid_of_line] + 1
        line_lengths[ends_of_grids - 1] -= 1
        line_ends = np.cumsum(line_lengths)
        right = right[grid_of_line]
        begins = origin[grid_of_line] + line * down[grid_of_line] - (line_ends - line_lengths) * right
        source = np.arange(line_ends[-1])
        source *= right.repeat(line_lengths)
        source += begins.repeat(line_lengths)
        cells = store.cells.take(source, mode="clip")  # a line's end points beyond its row: replaced below
        lookup = self._digits[layout.colours].ravel()
        body = lookup.take(cells + (10 * sample[grid_of_line]).repeat(line_lengths))
        inner = np.ones(len(line_ends), dtype=bool)
        inner[ends_of_grids - 1] = False
        body[line_ends[inner] - 1] = self._lines_sep[0]

        starts = np.cumsum(layout.lengths) - layout.lengths
        grid_ends = np.cumsum(layout.tokens) + (sample + 1) * len(self.prefix)
        grid_starts = grid_ends - layout.tokens
        ids = np.empty(int(layout.lengths.sum()), dtype=np.int32)
        is_cell = np.ones(len(ids), dtype=bool)
        inputs, outputs = ~layout.is_output, layout.is_output
        for places, part in (
            (starts, self.prefix),
            (grid_starts[inputs], self._query_beg),
            (grid_ends[inputs] - len(self._reply_beg), self._reply_beg),
            (grid_ends[outputs] - len(self._reply_end), self._reply_end),
        ):
            places = places[:, None] + np.arange(len(part))
            ids[places], is_cell[places] = part, False
        ids[is_cell] = body
        owner = sample[outputs]
        spans = np.stack((grid_starts[outputs], grid_ends[outputs]), axis=1) - starts[owner][:, None]
        spans = spans.astype(np.int32)
        span_ends = np.cumsum(np.bincount(owner, minlength=len(starts))).tolist()
        samples = zip(
            layout.keys, starts.tolist(), layout.lengths.tolist(), [0, *span_ends[:-1]], span_ends, strict=True
        )
        # Copies: a row that is kept must not keep its batch.
        return [
            {"key": key, "input_ids": ids[at : at + length].copy(), "reply_spans": spans[a:b].copy()}
            for key, at, length, a, b in samples
        ]

    def _encode_texts(
        self, ds: ArcDataset, keys: list[str], max_tokens: int | None, reply: bool
    ) -> list[dict[str, Any]]:
        """As `encode`, by the tokenizer: digits may merge, but the characters of each token are known."""
        made, counts = list(keys), [len(ds._resolve(key).order) for key in keys]
        rows: list[dict[str, Any] | None] = [None] * len(keys)
        todo = list(range(len(keys)))
        while todo:
            texts, replies = zip(*(self._text(ds, made[i], reply) for i in todo), strict=True)
            encoded = self.tokenizer(list(texts), return_offsets_mapping=True)
            again = []
            for place, i in enumerate(todo):
                ids = encoded["input_ids"][place]
                if max_tokens is not None and len(ids) > max_tokens:
                    counts[i] -= 1
                    if counts[i] < 1:
                        raise _does_not_fit(keys[i], len(ids), max_tokens)
                    made[i] = _shortened(made[i], counts[i])
                    again.append(i)
                    continue
                offsets = np.asarray(encoded["offset_mapping"][place], dtype=np.int64).reshape(-1, 2)
                # A token belongs to a reply if it starts there; BOS and its like have no characters and start nowhere.
                real = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
                bounds = np.searchsorted(offsets[real, 0], np.array(replies[place], dtype=np.int64).reshape(-1, 2))
                spans = np.append(real, len(ids))[bounds]
                spans[:, 1] = np.append(real, 0)[bounds[:, 1] - 1] + 1
                input_ids = np.array(ids, dtype=np.int32)
                rows[i] = {"key": made[i], "input_ids": input_ids, "reply_spans": spans.astype(np.int32)}
            todo = again
        return [row for row in rows if row is not None]

    def _text(self, ds: ArcDataset, key: str, reply: bool) -> tuple[str, list[tuple[int, int]]]:
        """A view's text and the character spans of its replies, from the parts' lengths: no search could be misled."""
        view = ds._resolve(key)
        task = ds.fmt_task(key, **self.format)
        if not reply and view.query < 0:
            raise ValueError(f"key {key!r} names no test input to make a prompt of, expected PUZZLE_INDEX")
        numbers = [n for i in view.order for n in (view.train.first + 2 * i, view.train.first + 2 * i + 1)]
        numbers += [view.query, view.solution] if reply and "reply" in task else []
        heights, widths = ds._store.heights[numbers].astype(int), ds._store.widths[numbers].astype(int)
        rows = widths if view.symmetry[0] else heights
        around = [len(self.format["query_beg"] + self.format["reply_beg"]), len(self.format["reply_end"])] * (
            len(numbers) // 2
        )
        ends = len(self.format["preprompt"]) + np.cumsum(
            heights * widths + (rows - 1) * len(self.format["lines_sep"]) + np.array(around, dtype=int)
        )
        return task["text" if reply else "input"], list(zip(ends[0::2].tolist(), ends[1::2].tolist(), strict=True))


class TrainingSamples:
    """Rows for a trainer: a map-style dataset of encoded views. Pickles, forks, and depends on no state.

    Row `epoch * len + index` is the view `index` of that epoch, so that a row number alone says which views an epoch
    has, in whatever process and order the rows are made.

    Attributes:
        dropped: puzzles of which not every view fits `max_tokens` with one demonstration: left out, to be printed.
        views: the views of what is left.
    """

    def __init__(
        self, ds: ArcDataset, encoder: SampleEncoder, max_tokens: int, seed: int, epochs: int = 1, **view_options: Any
    ):
        """See the class.

        Args:
            ds: what is trained on.
            encoder: makes the ids.
            max_tokens: limit of a row, BOS included.
            seed: of the views.
            epochs: how many are planned; see `total_rows`. Later rows are made all the same.
            view_options: tp, rt, perm, keep_background, shfl_ex as in `Views`.
        """
        turned = bool(view_options.get("tp")) or bool(view_options.get("rt"))
        long = {ArcDataset.get_base_key(key) for key in encoder.too_long(ds, ds.keys, max_tokens, turned)}
        self.dropped = [puzzle for puzzle in ds.challenge if puzzle in long]
        kept = ds if not long else ds.change_keys(key for key in ds.keys if ArcDataset.get_base_key(key) not in long)
        self.encoder, self.max_tokens, self.epochs = encoder, max_tokens, epochs
        self.views = kept.views(seed, **view_options)

    @property
    def total_rows(self) -> int:
        """Rows of all planned epochs."""
        return self.epochs * len(self)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.views)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of the first epoch."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row, see `SampleEncoder.encode`."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Many rows at once: many times faster than one by one; torch's DataLoader calls this for a batch.

        Raises:
            IndexError: a negative row, or there are no rows.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        if not len(self) or (len(numbers) and numbers.min() < 0):
            raise IndexError(f"row {rows[0]} of {len(self):,} rows an epoch")
        keys = self.views.keys(numbers // len(self), numbers % len(self))
        return self.encoder.encode(self.views.ds, keys, self.max_tokens)

    def lengths(self, rows: int = 20_000, seed: int = 0) -> np.ndarray:
        """Tokens of a seeded random choice of the first epoch's rows (of all, if there are fewer), int64 (rows,)."""
        return self._survey(rows, seed)[0]

    def shortened(self, rows: int = 20_000, seed: int = 0) -> float:
        """Share of rows that lose demonstrations to fit, over the same choice as `lengths`."""
        lost = self._survey(rows, seed)[1]
        return float(lost.mean()) if len(lost) else 0.0

    def _survey(self, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.sort(_rng(seed, "survey").permutation(len(self))[:rows])
        found = [
            self.encoder.lengths(self.views.ds, self.views.keys(np.zeros_like(part), part), self.max_tokens)
            for part in np.array_split(chosen, max(1, len(chosen) // 1024))
            if len(part)
        ]
        if not found:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
        return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
