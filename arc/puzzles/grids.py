"""Grids in one flat array, puzzles as small windows on it, and the checks that every grid passes.

So a folder of 192,628 pairs is a handful of arrays, not a million Python objects. Errors name the puzzle, pair and row,
counted from 1.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

MAX_SIDE = 30
PathLike = str | os.PathLike[str]


class GridStore:
    """Many grids in one flat array of cells.

    Attributes:
        cells: uint8 (cells,), all grids row by row; read-only.
        offsets: int64 (grids,), where each grid begins.
        heights, widths: uint8 (grids,).
    """

    __slots__ = ("cells", "heights", "offsets", "widths")

    def __init__(self, cells: np.ndarray, offsets: np.ndarray, heights: np.ndarray, widths: np.ndarray):
        self.cells, self.offsets, self.heights, self.widths = cells, offsets, heights, widths
        cells.flags.writeable = False  # grids that are handed out are windows on it

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arrays alone: `__init__` makes them read-only again."""
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
    """Some items of a store, created on access: an object for every pair would cost more than its cells."""

    __slots__ = ("_count", "first", "store")
    grids_each = 1  # grids of one item

    def __init__(self, store: GridStore, first: int, count: int):
        self.store, self.first, self._count = store, first, count

    def __len__(self) -> int:
        """Items, not grids."""
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """An item, or a list of those in a slice."""
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"index {index} of {self._count}")
        return self._item(index % self._count)

    def __repr__(self) -> str:
        """As a list."""
        return repr(list(self))

    @property
    def grids(self) -> slice:
        """Numbers of the grids in the store."""
        return slice(self.first, self.first + self._count * self.grids_each)

    def _item(self, index: int) -> Any:
        raise NotImplementedError


class Pairs(Window):
    """Demonstrations as {"input": grid, "output": grid}; in the store, inputs and outputs alternate."""

    __slots__ = ()
    grids_each = 2

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


class Puzzle(TypedDict):
    """A puzzle as windows on a store."""

    train: Pairs
    test: Queries


class PuzzleData(NamedTuple):
    """Puzzles of one store, by id, and where they come from."""

    store: GridStore
    challenge: dict[str, Puzzle]
    solutions: dict[str, Grids]
    tasks: Mapping[str, str] = {}  # puzzle -> the task that it was made from, where that is another name
    left_out: Mapping[str, int] = {}  # what loading left out, and how much of it


class _Picture(reprlib.Repr):
    """Short text for any value: quick and small, however large or deeply nested the value is."""

    def __init__(self) -> None:
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
    """A puzzle's or file's name for a message, shortened if it is long or not printable."""
    return name if isinstance(name, str) and len(name) <= 60 and name.isprintable() else show(name)


def is_unicode(name: str) -> bool:
    """Whether a name can be written as UTF-8: JSON and file systems can give lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def check_grid(grid: Any, where: str) -> np.ndarray:
    """A grid as uint8 (height, width), 1..30 each way, cells 0..9. ValueError otherwise; `where` opens its message."""
    if isinstance(grid, np.ndarray):
        if grid.ndim != 2 or grid.dtype.kind not in "iu":
            array = f"an array {grid.shape} of {grid.dtype}"
            raise ValueError(f"{where}: found {array}, expected (height, width) of integers")
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
    """Input and output of a pair; `solved`: the output must be there."""
    if not isinstance(pair, Mapping) or "input" not in pair:
        raise ValueError(f'{where}: found {show(pair)}, expected {{"input": grid, "output": grid}}')
    if solved and "output" not in pair:
        raise ValueError(f'{where}: found no "output" beside its "input", expected a grid')
    output = check_grid(pair["output"], f"{where}, output") if "output" in pair else None
    return check_grid(pair["input"], f"{where}, input"), output


def check_pairs(pairs: Sequence[Any], where: str) -> list[np.ndarray]:
    """Inputs and outputs of pairs in turn. `where` and the pair's number open an error's message."""
    checked = [_check_pair(pair, f"{where} {number}", solved=True) for number, pair in enumerate(pairs, 1)]
    return [grid for pair in checked for grid in pair if grid is not None]


class CheckedPuzzle(NamedTuple):
    """Checked grids: demonstrations' inputs and outputs in turn, test inputs, and their outputs if known."""

    train: list[np.ndarray]
    test: list[np.ndarray]
    solution: list[np.ndarray]


def check_puzzle(value: Any, where: str) -> CheckedPuzzle:
    """The grids of {"train": pairs, "test": pairs with or without outputs}. ValueError otherwise, as `check_grid`."""
    if not isinstance(value, Mapping) or "train" not in value or "test" not in value:
        raise ValueError(f'{where}: found {show(value)}, expected {{"train": pairs, "test": pairs}}')
    for name in ("train", "test"):
        if isinstance(value[name], (str, Mapping)) or not isinstance(value[name], Sequence):
            raise ValueError(f"{where}, {name}: found {show(value[name])}, expected a list of pairs")
    if not len(value["train"]):
        raise ValueError(f"{where}, train: found no pairs, expected at least one")
    train = check_pairs(value["train"], f"{where}, train pair")
    tests = [_check_pair(pair, f"{where}, test pair {i}", solved=False) for i, pair in enumerate(value["test"], 1)]
    outputs = [output for _, output in tests if output is not None]
    if outputs and len(outputs) < len(tests):
        missing = 1 + [output is None for _, output in tests].index(True)
        raise ValueError(f'{where}, test pair {missing}: found no "output", expected one as the other test pairs have')
    return CheckedPuzzle(train, [query for query, _ in tests], outputs)


def collect(challenge: Mapping[str, Any], solutions: Mapping[str, Any], place: str = "") -> PuzzleData:
    """Bring puzzles into one store. Windows on other stores are moved; everything else is checked and copied.

    Args:
        challenge: puzzle id -> {"train": pairs, "test": pairs or inputs}.
        solutions: puzzle id -> grids; they replace the outputs of the puzzle's test pairs.
        place: opens the messages of errors.

    Raises:
        ValueError: a bad id, pair or grid, named by puzzle, pair and row.
    """
    stores: dict[int, GridStore] = {}
    new = GridStore.of_grids([])  # stands for the store of `grids` until that is filled
    grids: list[np.ndarray] = []  # of everything that is in no store yet
    windows: list[tuple[str, str, Window]] = []

    def add(puzzle: str, name: str, kind: type[Window], value: Any) -> None:
        if isinstance(value, kind):
            stores[id(value.store)] = value.store
            windows.append((puzzle, name, value))
        else:
            windows.append((puzzle, name, kind(new, len(grids), len(value) // kind.grids_each)))
            grids.extend(value)

    for puzzle, value in challenge.items():
        where = f"{place}puzzle {show_name(puzzle)}"
        if not isinstance(puzzle, str) or not puzzle or "_" in puzzle or "." in puzzle or not is_unicode(puzzle):
            raise ValueError(f'{where}: found the id {show(puzzle)}, expected text without "_" and "."')
        train, test = (value.get(name) if isinstance(value, Mapping) else None for name in ("train", "test"))
        outputs = None
        if not isinstance(train, Pairs) or not isinstance(test, Queries):
            train, test, outputs = check_puzzle(value, where)
        add(puzzle, "train", Pairs, train)
        add(puzzle, "test", Queries, test)
        known = solutions.get(puzzle)
        known = outputs or None if known is None else known
        if known is None:
            continue
        if isinstance(known, (str, Mapping)) or not isinstance(known, Sequence) or len(known) != len(test):
            expected = f"one grid for each of {len(test)} test inputs"
            raise ValueError(f"{where}: found solutions {show(known)}, expected {expected}")
        if not isinstance(known, Grids):
            known = [check_grid(grid, f"{where}, solution {number}") for number, grid in enumerate(known, 1)]
        add(puzzle, "solution", Grids, known)
    if grids or not stores:
        stores[id(new)] = GridStore.of_grids(grids)
    store = next(iter(stores.values())) if len(stores) == 1 else GridStore.joined(list(stores.values()))
    shifts = dict(zip(stores, np.cumsum([0, *(len(s.heights) for s in stores.values())]).tolist(), strict=False))
    collected: dict[str, dict[str, Any]] = {}
    for puzzle, name, window in windows:
        shift = shifts.get(id(window.store), 0)  # an empty window on `new` when `new` has stayed empty
        if window.store is not store:
            window = type(window)(store, window.first + shift, len(window))
        collected.setdefault(puzzle, {})[name] = window
    puzzles = {puzzle: Puzzle(train=p["train"], test=p["test"]) for puzzle, p in collected.items()}
    return PuzzleData(store, puzzles, {puzzle: p["solution"] for puzzle, p in collected.items() if "solution" in p})
