"""Files of puzzles: from bytes to checked grids, with a cache of the parsed grids.

Errors name file, pair and row, counted from 1. The parsed grids of large folders are cached in $ARC_LOADER_CACHE
(default: arc_loader in $XDG_CACHE_HOME or ~/.cache; "off" or empty: no cache). A changed file is parsed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arc.puzzles.grids import MAX_SIDE, GridStore, PathLike, check_pairs, check_puzzle, is_unicode, show

MAX_FILE_BYTES = 100_000_000  # far above any file of puzzles, and parsed within the memory of a small machine
CACHE_VERSION = 1
CACHE_MIN_BYTES = 1_000_000  # parsing less than this takes milliseconds: not worth a file in the user's cache


def read_bytes(path: Path) -> bytes:
    """A file's content. FileNotFoundError: no file; ValueError: it cannot be read, or is too large."""
    expected = "expected a readable JSON file"
    try:
        state = os.stat(path)
        if stat.S_ISDIR(state.st_mode):
            raise ValueError(f"{path}: cannot be read (it is a folder), {expected}")
        if not stat.S_ISREG(state.st_mode):  # reading a pipe or a device might never end
            raise ValueError(f"{path}: cannot be read (it is a pipe, socket or device), {expected}")
        if state.st_size > MAX_FILE_BYTES:
            size = f"{state.st_size:,} bytes, expected at most {MAX_FILE_BYTES:,}"
            raise ValueError(f"{path}: found {size}: leave out some pairs")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); {expected}") from None


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in items:
        if name in value:
            raise ValueError(f"duplicate id {show(name)}")
        value[name] = item
    return value


def parse_json(data: bytes, path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: not UTF-8, not JSON (with line and column), a name twice in an object, nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at {error.start}"
        raise ValueError(f"{path}: found {byte}, expected JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: not JSON at {place} ({error.msg}), expected a complete JSON file") from None
    except RecursionError:
        raise ValueError(f"{path}: lists nested too deeply, expected grids as lists of rows of cells") from None
    except ValueError as error:  # a duplicate id, or an integer of thousands of digits
        raise ValueError(f"{path}: {str(error).split(';')[0]}, expected each id once and cells 0 to 9") from None


# Canonical JSON between the last cell of one row and the first cell of the next, with the rows' brackets.
_TO_OUTPUT, _TO_NEXT_PAIR = b']],"output":[[', b']]},{"input":[['
_BEGIN, _END = b'[{"input":[[', b"]]}]"


def scan_pairs(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Cells, heights and widths of a list of pairs in canonical JSON, by a few passes over the bytes.

    Many times faster than building Python lists. Only white space between tokens may differ from what json.dumps would
    write. For anything else the slower parser reads the file, or says what is wrong.

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
    digits = data.translate(None, b'[]{}",:inputo')  # 5 times faster than array[is_digit]
    return np.frombuffer(digits, dtype=np.uint8) - 48, heights.astype(np.uint8), widths.astype(np.uint8)


class TaskFile(NamedTuple):
    """Where a file's grids are in the store: pairs, then test inputs, then their outputs if `solved`."""

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
        grids, counts = check_pairs(value, f"{path}, pair"), (len(value), -1, 0)
    elif isinstance(value, dict) and "train" in value and "test" in value:
        puzzle = check_puzzle(value, str(path))
        if not puzzle.test:
            raise ValueError(f"{path}, test: found no pairs, expected at least one")
        grids = [*puzzle.train, *puzzle.test, *puzzle.solution]
        counts = (len(puzzle.train) // 2, len(puzzle.test), len(puzzle.solution))
    else:
        kaggle = isinstance(value, dict) and value and all(isinstance(v, dict) and "train" in v for v in value.values())
        hint = "; this looks like Kaggle's format: ArcDataset.load_from_json reads it" if kaggle else ""
        raise ValueError(f'{path}: found {show(value)}, expected a list of pairs or {{"train", "test"}}{hint}')
    store = GridStore.of_grids(grids)
    return store.cells, store.heights, store.widths, counts


def list_json(folder: PathLike, pattern: str = "*.json") -> list[Path]:
    """The folder's .json files by name, hidden ones aside.

    Raises:
        FileNotFoundError: no folder, or no such files.
        ValueError: a file instead of a folder, or a folder that cannot be read.
    """
    folder, expected = Path(folder), "expected a folder of .json files"
    try:
        if not folder.is_dir():
            if folder.is_file():
                raise ValueError(f"{folder} is a file, {expected}; for Kaggle's files: load_from_json")
            os.stat(folder)  # names the reason: a loop of links, say
            raise ValueError(f"{folder} is not a folder, {expected}")
        files = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        os.listdir(folder)  # glob is silent about a folder that cannot be read
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no such folder, {expected}") from None
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror or error}), {expected}") from None
    for path in files:
        if not is_unicode(path.name):
            raise ValueError(f"{folder}: found a file named {show(path.name)}, expected names in UTF-8: rename it")
    if not files:
        raise FileNotFoundError(f"{folder}: found no {pattern}, expected one JSON file for each task")
    return files


def list_rearc(folder: PathLike) -> list[Path]:
    """The task files of a re-arc folder by name: metadata.json names the tasks, tasks/NAME.json is a list of pairs.

    Raises:
        FileNotFoundError, ValueError: no metadata.json, not JSON, or a name that no file can have.
    """
    metadata = Path(folder) / "metadata.json"
    tasks = parse_json(read_bytes(metadata), metadata)
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"{metadata}: found {show(tasks)}, expected an object with the task names")
    for name in tasks:
        # No file system takes names far above 200 characters. Path(name).name is "" for an empty name.
        bad = name in ("", "..") or Path(name).name != name or "\0" in name or len(name) > 200
        if bad or not is_unicode(name):
            raise ValueError(f"{metadata}: found the task name {show(name)}, expected the name of a file in tasks")
    return [Path(folder) / "tasks" / f"{name}.json" for name in sorted(tasks)]


Parsed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # cells, heights, widths; counts (files, 3)
CACHED = ("cells", "heights", "widths", "counts")


def _cache_file(folder: Path) -> Path | None:
    """Where the parsed grids of a folder are cached; None: the user wants no cache."""
    home: str | Path | None = os.environ.get("ARC_LOADER_CACHE")
    if home is None:
        with contextlib.suppress(RuntimeError):  # no home folder
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arc_loader"
    if not home or str(home).lower() == "off":
        return None
    return Path(home) / (hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24] + ".npz")


def _read_cache(file: Path, signature: bytes) -> Parsed | None:
    """The arrays of `_write_cache`, if they are intact and the folder's files are unchanged; never unpickles."""
    try:
        with np.load(file, allow_pickle=False) as archive:  # the archive checks a CRC of every array
            if archive["signature"].tobytes() != signature:
                return None
            cells, heights, widths, counts = (archive[name] for name in CACHED)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError):
        return None
    if any(a.dtype != np.uint8 or a.ndim != 1 for a in (cells, heights, widths)):
        return None
    if counts.dtype != np.int64 or counts.ndim != 2 or counts.shape[1] != 3:
        return None
    if not len(heights) or len(heights) != len(widths) or int((heights.astype(np.int64) * widths).sum()) != len(cells):
        return None
    sides = np.concatenate((heights, widths))
    if cells.max() > 9 or sides.min() < 1 or sides.max() > MAX_SIDE:
        return None
    grids = 2 * counts[:, 0] + np.maximum(counts[:, 1], 0) + counts[:, 2]
    return (cells, heights, widths, counts) if int(grids.sum()) == len(heights) else None


def _write_cache(file: Path, signature: bytes, parsed: Parsed) -> None:
    """Cache parsed grids. A failure is ignored: the cache only saves time."""
    arrays: dict[str, Any] = dict(zip(CACHED, parsed, strict=True))
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)

        def save(path: Path) -> None:
            with path.open("wb") as stream:  # numpy adds a suffix to a name, not to a file
                np.savez(stream, signature=np.frombuffer(signature, dtype=np.uint8), **arrays)

        write_atomically(file, save, several_writers=True)


def _parse_files(files: Sequence[Path], size: int) -> tuple[Parsed, bool]:
    """Parse files of `size` bytes in all; also whether a file has grown meanwhile."""
    # A cell takes two bytes at least, so this holds all cells; memory that is never written is never resident.
    cells, position, grown = np.empty(size // 2 + 1, dtype=np.uint8), 0, False
    heights, widths, counts = [], [], []
    for path in files:
        new_cells, new_heights, new_widths, new_counts = parse_task_file(read_bytes(path), path)
        end = position + len(new_cells)
        if end > len(cells):
            cells, grown = np.concatenate((cells[:position], np.empty(end + len(cells), np.uint8))), True
        cells[position:end], position = new_cells, end
        heights.append(new_heights)
        widths.append(new_widths)
        counts.append(new_counts)
    return (cells[:position], np.concatenate(heights), np.concatenate(widths), np.array(counts, dtype=np.int64)), grown


def read_tasks(files: Sequence[Path]) -> tuple[GridStore, list[TaskFile]]:
    """The grids of the task files of one folder, from the cache if it fits. Raises as `read_bytes` and `parse_json`."""
    cache, signature, size, newest = _cache_file(files[0].parent), b"", 0, 0
    try:
        states = [(path.name, os.stat(path)) for path in files]
        size, newest = sum(s.st_size for _, s in states), max(max(s.st_mtime_ns, s.st_ctime_ns) for _, s in states)
        # ctime too: it tells of a file that was replaced by another of the same size and (copied) date.
        entries = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in states]
        signature = json.dumps([CACHE_VERSION, entries]).encode()
    except OSError:
        cache = None  # reading the file will say what is wrong with it
    if size < CACHE_MIN_BYTES:
        cache = None
    parsed = _read_cache(cache, signature) if cache else None
    if parsed is None:
        parsed, grown = _parse_files(files, size)
        # A file that was written just now may change again within the clock's grain.
        if cache and not grown and time.time_ns() - newest > 2_000_000_000:
            _write_cache(cache, signature, parsed)
    cells, heights, widths, counts = parsed
    tasks, first = [], 0
    for pairs, tests, solved in counts.tolist():
        tasks.append(TaskFile(first, pairs, tests, solved > 0))
        first += 2 * pairs + max(tests, 0) + solved
    return GridStore.of_sizes(cells, heights, widths), tasks


def write_atomically(
    path: PathLike, content: str | bytes | Callable[[Path], None], *, several_writers: bool = False
) -> None:
    """Write a file at once: a reader, or a run after a crash, sees the old file or the whole new one.

    The content goes into `NAME.tmp`, reaches the disk, and is renamed. The umask decides the mode.

    Args:
        path: of the file, in an existing folder.
        content: text (UTF-8), bytes, or a function that writes to the path it is given.
        several_writers: several processes may write the file at once, so each uses its own temporary name.
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
