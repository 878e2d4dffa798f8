"""Files of puzzles: from bytes to grids in one flat array, checked, with a cache.

`arc_loader.ArcDataset` is what users call; this module reads for it. Every grid lies in one flat uint8 array
(`GridStore`), and puzzles are small windows on it, so that a folder of 192,628 pairs is a handful of arrays and not
a million Python objects. Bad data is refused with a message that names file, pair and row, counted from 1.

The parsed grids of large folders are kept in $ARC_LOADER_CACHE (default: arc_loader in $XDG_CACHE_HOME or ~/.cache;
"off" or empty: nowhere) and parsed again when a file has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import reprlib
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAX_SIDE = 30
MAX_FILE_BYTES = 100_000_000  # far above any file of puzzles, and parsed within the memory of a small machine
CACHE_VERSION = 1
CACHE_MIN_BYTES = 1_000_000  # parsing less than this takes milliseconds: not worth a file in the user's cache


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


class Window(Sequence):
    """`count` items of a store from grid `first` on: a Python object for every pair would cost far more than the
    cells."""

    __slots__ = ("count", "first", "store")

    def __init__(self, store: GridStore, first: int, count: int):
        """`count` items from grid number `first` on."""
        self.store, self.first, self.count = store, first, count

    def __len__(self) -> int:
        """Items, not grids."""
        return self.count

    def __getitem__(self, index: Any) -> Any:
        """An item, or a list of those in a slice."""
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(self.count))]
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} of {self.count}")
        return self._item(index % self.count)

    def __repr__(self) -> str:
        """As a list."""
        return repr(list(self))

    def _item(self, index: int) -> Any:
        raise NotImplementedError


class Pairs(Window):
    """Demonstrations as {"input": grid, "output": grid}; in the store, inputs and outputs alternate."""

    __slots__ = ()

    def _item(self, index: int) -> dict[str, np.ndarray]:
        first = self.first + 2 * index
        return {"input": self.store.grid(first), "output": self.store.grid(first + 1)}


class Queries(Window):
    """Test inputs as {"input": grid}."""

    __slots__ = ()

    def _item(self, index: int) -> dict[str, np.ndarray]:
        return {"input": self.store.grid(self.first + index)}


class Grids(Window):
    """Grids, such as the solutions of a puzzle."""

    __slots__ = ()

    def _item(self, index: int) -> np.ndarray:
        return self.store.grid(self.first + index)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking JSON


class _Picture(reprlib.Repr):
    """Pictures of values that stay small, and quick to make, however large or deeply nested the value is."""

    def __init__(self) -> None:
        """Sizes that show a grid of a few cells whole."""
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxstring = 4, 8, 8, 8, 60

    def repr_int(self, x: int, level: int) -> str:
        """An integer; Python refuses to write those of thousands of digits."""
        return repr(x) if x.bit_length() <= 64 else "an integer of more than 64 bits"


_picture = _Picture().repr


def show(value: Any) -> str:
    """A short picture of a value for a message."""
    if isinstance(value, (list, tuple, dict)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    text = _picture(value)
    return text if len(text) <= 60 else text[:57] + "..."


def show_name(name: Any) -> str:
    """A puzzle's or file's name for a message: as it is, or a short picture of it if it is long or not printable."""
    return name if isinstance(name, str) and len(name) <= 60 and name.isprintable() else show(name)


def is_unicode(name: str) -> bool:
    """Whether a name can be written as UTF-8; JSON and file systems can give halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def check_grid(grid: Any, where: str) -> np.ndarray:
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
        raise ValueError(f"{where}: found {show(grid)}, expected a list of rows")
    if not 1 <= len(grid) <= MAX_SIDE:
        raise ValueError(f"{where}: found {len(grid)} rows, expected 1 to {MAX_SIDE}")
    for number, row in enumerate(grid, 1):
        if not isinstance(row, (list, tuple)):
            raise ValueError(f"{where}, row {number}: found {show(row)}, expected a list of cells")
        if not 1 <= len(row) <= MAX_SIDE:
            raise ValueError(f"{where}, row {number}: found {len(row)} cells, expected 1 to {MAX_SIDE}")
        if len(row) != len(grid[0]):
            raise ValueError(f"{where}, row {number}: found {len(row)} cells, expected {len(grid[0])} as in row 1")
        for cell in row:
            # Booleans are integers in Python, and 1.0 equals 1: the type decides.
            if type(cell) is not int and not isinstance(cell, np.integer) or not 0 <= cell <= 9:
                raise ValueError(f"{where}, row {number}: found {show(cell)}, expected integers 0 to 9")
    return np.array(grid, dtype=np.uint8)


def _check_pair(pair: Any, where: str, solved: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Input and output of a pair; `solved`: there must be an output, else there may be."""
    if not isinstance(pair, Mapping) or "input" not in pair:
        raise ValueError(f'{where}: found {show(pair)}, expected {{"input": grid, "output": grid}}')
    if solved and "output" not in pair:
        raise ValueError(f'{where}: found no "output" beside its "input", expected a grid')
    result = check_grid(pair["output"], f"{where}, output") if "output" in pair else None
    return check_grid(pair["input"], f"{where}, input"), result


class Puzzle(NamedTuple):
    """Checked grids: demonstrations' inputs and outputs in turn, test inputs, and their outputs if they are known."""

    train: list[np.ndarray]
    test: list[np.ndarray]
    solution: list[np.ndarray]


def check_puzzle(value: Any, where: str) -> Puzzle:
    """The grids of {"train": pairs, "test": pairs with or without outputs}."""
    if not isinstance(value, Mapping) or "train" not in value or "test" not in value:
        raise ValueError(f'{where}: found {show(value)}, expected {{"train": pairs, "test": pairs}}')
    for part in ("train", "test"):
        if isinstance(value[part], (str, Mapping)) or not isinstance(value[part], Sequence):
            raise ValueError(f"{where}, {part}: found {show(value[part])}, expected a list of pairs")
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
    return Puzzle(train, [grid for grid, _ in pairs], outputs)


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        FileNotFoundError, ValueError: it is not there, or cannot be read.
    """
    expected = "expected a readable JSON file"
    try:
        state = os.stat(path)
        if stat.S_ISDIR(state.st_mode):
            raise ValueError(f"{path}: cannot be read (it is a folder), {expected}")
        if not stat.S_ISREG(state.st_mode):  # reading a pipe or a device might never end
            raise ValueError(f"{path}: cannot be read (it is a pipe, socket or device), {expected}")
        if state.st_size > MAX_FILE_BYTES:
            raise ValueError(
                f"{path}: found {state.st_size:,} bytes, expected at most {MAX_FILE_BYTES:,}: leave out some pairs"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); {expected}") from None


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        seen: set[str] = set()
        # set.add gives None: the first name that is in `seen` when it comes.
        raise ValueError(f"duplicate id {show(next(name for name, _ in items if name in seen or seen.add(name)))}")
    return found


def parse_json(data: bytes, path: Path) -> Any:
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


def scan_pairs(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
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


class TaskFile(NamedTuple):
    """Where the grids of a file are in the store: pairs, then test inputs, then their outputs if `solved`."""

    first: int
    pairs: int
    tests: int  # -1: a list of pairs, from which puzzles are made
    solved: bool


def parse_task_file(data: bytes, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int]]:
    """Cells, heights and widths of a task file, and its counts of pairs, tests (-1: a list of pairs) and solutions."""
    scanned = scan_pairs(data)
    if scanned is not None:
        return *scanned, (len(scanned[1]) // 2, -1, 0)
    value = parse_json(data, path)
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{path}: found no pairs, expected a list of input/output pairs")
        pairs = [_check_pair(pair, f"{path}, pair {number}", solved=True) for number, pair in enumerate(value, 1)]
        grids, counts = [grid for pair in pairs for grid in pair], (len(pairs), -1, 0)
    elif isinstance(value, dict) and "train" in value and "test" in value:
        puzzle = check_puzzle(value, str(path))
        if not puzzle.test:
            raise ValueError(f"{path}, test: found no pairs, expected at least one")
        grids = [*puzzle.train, *puzzle.test, *puzzle.solution]
        counts = (len(puzzle.train) // 2, len(puzzle.test), len(puzzle.solution))
    else:
        hint = ""
        if isinstance(value, dict) and value and all(isinstance(v, dict) and "train" in v for v in value.values()):
            hint = "; this looks like Kaggle's format: ArcDataset.load_from_json reads it"
        raise ValueError(f'{path}: found {show(value)}, expected a list of pairs or {{"train", "test"}}{hint}')
    store = GridStore.of_grids(grids)
    return store.cells, store.heights, store.widths, counts


def list_json(folder: str | os.PathLike[str], pattern: str = "*.json") -> list[Path]:
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
    for path in files:
        if not is_unicode(path.name):
            raise ValueError(f"{folder}: found a file named {show(path.name)}, expected names in UTF-8: rename it")
    if not files:
        raise FileNotFoundError(f"{folder}: found no {pattern}, expected one JSON file for each task")
    return files


def list_rearc(folder: str | os.PathLike[str]) -> list[Path]:
    """The task files of a re-arc folder by name: metadata.json names the tasks, tasks/NAME.json is a list of pairs.

    Raises:
        FileNotFoundError, ValueError: no metadata.json, not JSON, or a name that no file in tasks can have.
    """
    metadata = Path(folder) / "metadata.json"
    tasks = parse_json(read_bytes(metadata), metadata)
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"{metadata}: found {show(tasks)}, expected an object with the task names")
    for name in tasks:
        # Longer ones no file system takes.
        if (
            not name
            or not is_unicode(name)
            or Path(name).name != name
            or name == ".."
            or "\0" in name
            or len(name) > 200
        ):
            raise ValueError(f"{metadata}: found the task name {show(name)}, expected the name of a file in tasks")
    return [Path(folder) / "tasks" / f"{name}.json" for name in sorted(tasks)]


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

        def save(path: Path) -> None:
            with path.open("wb") as stream:  # numpy adds a suffix to a name, not to a file
                np.savez(stream, signature=np.frombuffer(signature, dtype=np.uint8), **arrays)

        write_atomically(file, save, several_writers=True)


def read_tasks(files: Sequence[Path]) -> tuple[GridStore, list[TaskFile]]:
    """The grids of task files of one folder, from the cache if there is one that fits.

    Raises:
        ValueError, FileNotFoundError: see `parse_task_file` and `read_bytes`.
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
            part, heights, widths, counts = parse_task_file(read_bytes(path), path)
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
        tasks.append(TaskFile(first, pairs, tests, solved > 0))
        first += 2 * pairs + max(tests, 0) + solved
    return GridStore.of_sizes(cells, heights, widths), tasks


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_atomically(
    path: str | os.PathLike[str], content: str | bytes | Callable[[Path], None], *, several_writers: bool = False
) -> None:
    """Write a file at once: a reader, or a run after a crash, sees the old file or the whole new one.

    The content goes into `NAME.tmp` beside the file, reaches the disk, and takes the name. The umask decides its mode.

    Args:
        path: of the file, in an existing folder.
        content: text (written as UTF-8), bytes, or a function that writes to the path that it is given.
        several_writers: processes may write the file at the same time: each uses another temporary name.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp" if several_writers else f"{path.name}.tmp")
    try:
        if callable(content):
            beside.touch()
            mode = stat.S_IMODE(beside.stat().st_mode)
            content(beside)
            beside.chmod(mode)  # safetensors makes files that only their owner can read
        else:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(beside)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot flush folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
